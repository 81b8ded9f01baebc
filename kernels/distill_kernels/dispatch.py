"""What every op shares: a backend record, the choice between backends, the listing of `distill kernels`.

An op is one public function. Its module holds an `Op`: its backends, the order in which `auto` tries
them, and the shape bucket under which a measured table (see `tune.py`) keeps its own order. An explicit
choice that cannot run raises `BackendError` with the reason; nothing falls back silently. What is chosen, and
why the others are not, can be recorded, also for a GPU that is not there: see `choices.py`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import platform
import re
import shutil
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])

# Where each op's `Op` lives, "module:attribute". Imported only when asked about.
OPS: dict[str, str] = {
    "cross_attention": "distill_kernels.attention.cross_attention:OP",
    "cross_attention_pool": "distill_kernels.attention.cross_attention_pool:OP",
    "multi_view_info_nce": "distill_kernels.pairwise.info_nce:OP",
    "multi_view_sigmoid": "distill_kernels.pairwise.sigmoid_loss:OP",
    "packed_attention": "distill_kernels.attention.packed_attention:OP",
    "self_attention": "distill_kernels.attention.self_attention:OP",
}


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


class BackendError(ValueError):
    """A backend was asked for by name and cannot run: the message says why."""


@dataclass(frozen=True)
class Backend:
    """One way to compute an op.

    `why_not(inputs)` is None when the backend can run, else the reason in words. `why_not(None)` asks
    only whether this machine has it. `run(inputs)` computes the op. `inputs` is the op's own record (a
    NamedTuple of arguments).
    """

    name: str
    why_not: Callable[[Any], str | None]
    run: Callable[[Any], Any]


class Order(NamedTuple):
    """What `auto` tries, best guess first, and why: what was measured, or what it is estimated from."""

    names: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Op:
    """An op: its backends and how `auto` chooses among them.

    `order(inputs)` is what `auto` tries; `bucket(inputs)` names the shape class in the measured table;
    `cases(device)` makes the inputs that `tune.tune` times.
    """

    name: str
    backends: tuple[Backend, ...]
    order: Callable[[Any], Order]
    bucket: Callable[[Any], str]
    cases: Callable[[torch.device], Iterable[Any]]
    device: Callable[[Any], torch.device]

    def get(self, name: str) -> Backend:
        """The backend of that name. Raises `BackendError` for an unknown one."""
        for backend in self.backends:
            if backend.name == name:
                return backend
        names = ", ".join(b.name for b in self.backends)
        raise BackendError(f"{self.name}: no backend named {name!r}; there are {names}, and auto")


observer: Callable[[Op, str, Any], Backend] | None = None
"""Stands in for `choose` while choices are recorded (`choices.recorded`)."""


def choose(op: Op, backend: str, inputs: Any) -> Backend:
    """The backend that will run `inputs`.

    Raises `BackendError` when `backend` names one that is unknown or cannot run these inputs, or when
    `auto` finds none that can.
    """
    return choose_here(op, backend, inputs) if observer is None else observer(op, backend, inputs)


def choose_here(op: Op, backend: str, inputs: Any) -> Backend:
    """`choose`, unobserved."""
    if backend != "auto":
        chosen = op.get(backend)
        reason = chosen.why_not(inputs)
        if reason is not None:
            raise BackendError(f"{op.name}: backend {backend!r} cannot run this: {reason}")
        return chosen
    reasons = []
    for name in order_of(op, inputs).names:
        candidate = op.get(name)
        reason = candidate.why_not(inputs)
        if reason is None:
            return candidate
        reasons.append(f"{name}: {reason}")
    raise BackendError(f"{op.name}: no backend can run this ({'; '.join(reasons)})")


def order_of(op: Op, inputs: Any) -> Order:
    """What `auto` tries for `inputs`: what this device's table has measured, then the op's own order."""
    order = op.order(inputs)
    device = str(op.device(inputs))
    # Without a table the bucket is not asked for: under torch.compile it would fix dynamic sizes.
    if _has_table(device):
        known = {b.name for b in op.backends}
        measured = [n for n in _measured(device, op.name, op.bucket(inputs)).split() if n in known]
        if measured:
            return Order((*measured, *order.names), "measured here (distill kernels --tune)")
    return order


def load_op(name: str) -> Op:
    """The `Op` of a registered name. Raises `BackendError` for an unknown one."""
    if name not in OPS:
        raise BackendError(f"no op named {name!r}; there are {', '.join(OPS)}")
    module, attribute = OPS[name].split(":")
    op = getattr(importlib.import_module(module), attribute)
    assert isinstance(op, Op), f"{OPS[name]} is not an Op"
    return op


def listing() -> list[tuple[str, str, str]]:
    """Rows (op, backend, "yes" or why this machine cannot), for `distill kernels`."""
    return [(name, backend.name, backend.why_not(None) or "yes") for name in OPS for backend in load_op(name).backends]


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
    found = re.search(r"model name\s*:\s*(.+)", information.read_text()) if information.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def table_path(device: torch.device) -> Path:
    """The measured table's file, one per device name and torch version.

    It lies in `$DISTILL_KERNEL_TABLES`, or in the user's cache folder.
    """
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", f"{device.type}-{device_name(device)}-torch{torch.__version__}")
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill" / "kernels"
    return Path(os.environ.get("DISTILL_KERNEL_TABLES") or default) / f"{slug}.json"


# Plain bools and strings, because those are the constants that torch.compile can take.
@once
def _has_table(device: str) -> bool:
    return bool(_table(device))


@once
def _measured(device: str, op: str, bucket: str) -> str:
    return " ".join(_table(device).get(op, {}).get(bucket, ()))


@once
def _table(device: str) -> dict[str, dict[str, list[str]]]:
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        return {}  # tensors that only say so: no card was measured
    path = table_path(where)
    table: dict[str, dict[str, list[str]]] = json.loads(path.read_text()) if path.exists() else {}
    return table
