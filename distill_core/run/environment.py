"""The versions, device and git state that a run's report records. Environment variables are not recorded."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_core.system.extras import project

if TYPE_CHECKING:
    from torch import device

PACKAGES = ("torch", "torchvision", "triton", "xformers", "numpy", "webdataset", "torchdata")


def environment(where: device | None, packages: Iterable[str] = ()) -> dict[str, Any]:
    """`versions`, `device` where there is one, and `git` where the working directory is in a repository."""
    facts: dict[str, Any] = {"versions": versions(packages)}
    if where is not None:
        facts["device"] = device_name(where)
    if (state := git_state()) is not None:
        facts["git"] = state
    return facts


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Versions of Python and of those installed among this project, `PACKAGES` and `packages`; the machine type."""
    result = {"python": platform.python_version(), "machine": platform.machine()}
    for name in dict.fromkeys([project(), *PACKAGES, *packages]):
        if (release := installed(name)) is not None:
            result[name] = release
    return result


def installed(package: str) -> str | None:
    """The version of an installed package; None where it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(where: device) -> str:
    """`cpu (MODEL)` or `cuda:0 (MODEL)`."""
    if where.type == "cuda":
        import torch

        return f"{where} ({torch.cuda.get_device_name(where)})"
    information = Path("/proc/cpuinfo")  # platform.processor() is only "x86_64" on Linux
    model = re.search(r"model name\s*:\s*(.+)", information.read_text()) if information.exists() else None
    name = model[1] if model else platform.processor()
    return f"{where} ({name})" if where.type == "cpu" and name else str(where)


def git_state(folder: str = ".") -> dict[str, Any] | None:
    """The commit, and whether tracked files differ from it; None where there is no git, repository or commit."""

    def ask(*arguments: str) -> str:
        command = ["git", "-C", folder, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None
