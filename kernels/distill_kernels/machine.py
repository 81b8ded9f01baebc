"""What this machine has: packages, a GPU and its kind, a compiler for Triton. Looked up once a process."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])


def _constant(function: _F) -> _F:
    """torch.compiler.assume_constant_result, whose call alone would import torch._dynamo (over a second)."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_caches: list[Callable[[], None]] = []


def once(function: _F) -> _F:
    """Answer once a process for each arguments, a constant to torch.compile; `forget` asks again.

    For what looks at files, or at the card, and is asked at every call of an op.
    """
    cached = functools.cache(function)
    _caches.append(cached.cache_clear)

    @functools.wraps(function)
    def answer(*args: Any) -> Any:
        return cached(*args)

    return _constant(answer)  # type: ignore[return-value]


def forget() -> None:
    """Ask the machine again at the next choice: packages, compiler, card and measured table."""
    for clear in _caches:
        clear()


@once
def why_not_installed(package: str) -> str | None:
    """None when `package` can be imported, without importing it."""
    return None if importlib.util.find_spec(package) else f"the package {package} is not installed"


@_constant
def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU (set before triton is first imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_gpu(package: str, device: torch.device | None) -> str | None:
    """Why what needs `package` and a GPU cannot run on tensors of `device`; None asks for this machine only."""
    missing: str | None = why_not_installed(package)
    if missing is not None:
        return missing
    if device is None:
        return None if torch.cuda.is_available() else "needs a GPU, and torch sees none"
    return None if device.type == "cuda" else f"needs tensors on a GPU, these are on {device}"


assumed_capability: tuple[int, int] | None = None
"""NVIDIA's compute capability of a GPU that is not there, while its choices are asked for (`choices.recorded`)."""


def why_not_new(device: torch.device | None) -> str | None:
    """Why a kernel for NVIDIA's GPUs from Ampere on cannot run there."""
    capability = assumed_capability
    if capability is None and device is not None and torch.version.cuda:
        capability = _capability(device)
    old = capability is not None and capability < (8, 0)
    return "needs compute capability 8.0 or newer" if old else None


@once
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def why_not_triton(device: torch.device | None) -> str | None:
    """Why Triton's kernels cannot run on tensors of `device`; None asks for this machine only."""
    if interpreting():
        missing: str | None = why_not_installed("triton")
        return missing
    reason = why_not_gpu("triton", device)
    if reason is not None:
        return f"{reason} (TRITON_INTERPRET=1 debugs on a CPU)"
    no_compiler: str | None = why_not_new(device) or _why_not_compile()
    return no_compiler


@once
def _why_not_compile() -> str | None:
    """Triton builds its launcher in C when a kernel is first launched."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler: install gcc or clang, or name one in CC"
    headers = Path(sysconfig.get_paths(scheme="posix_prefix")["include"])
    if not (headers / "Python.h").exists():
        return f"Triton needs Python's headers (python3-dev): there is no {headers / 'Python.h'}"
    return None


def device_name(device: torch.device) -> str:
    """What the device calls itself: the GPU's or the CPU's model name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")  # platform.processor() is only "x86_64" on Linux
    model = re.search(r"model name\s*:\s*(.+)", information.read_text()) if information.exists() else None
    return model[1] if model else platform.processor() or platform.machine()
