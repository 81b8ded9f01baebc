"""What `distill doctor` says of the kernels."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version

import torch

from distill_core import Diagnostic, install
from distill_kernels.attention.memory_efficient import why_not_built
from distill_kernels.defaults import table_path, why_not_readable
from distill_kernels.dispatch import listing


def kernels() -> list[Diagnostic]:
    """A row for each op, one for what `auto` goes by, and one for the pair of torch and xformers."""
    rows: dict[str, tuple[list[str], list[str]]] = {}
    for op, backend, answer in listing():
        can, cannot = rows.setdefault(op, ([], []))
        can.append(backend) if answer == "yes" else cannot.append(f"{backend}: {answer}")
    lines = [
        Diagnostic("kernels", op, ", ".join(can) + (f"; not {'; not '.join(cannot)}" if cannot else ""))
        for op, (can, cannot) in rows.items()
    ]
    path = table_path(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    auto = str(path) if path.exists() else "the defaults of the package (measure with distill kernels --tune RECIPE)"
    problem = why_not_readable(path)
    warning = f"{problem}: the file is ignored; delete it, or run distill kernels --tune again" if problem else ""
    return [*lines, Diagnostic("kernels", "auto goes by", auto, warning), *_xformers()]


def _xformers() -> list[Diagnostic]:
    """The pair of torch and xformers, whether its kernels load, and what to do where they do not."""
    if importlib.util.find_spec("xformers") is None:
        return [Diagnostic("kernels", "xformers", "not installed: distill leaves its backends alone")]
    pair = f"{version('xformers')} with torch {torch.__version__}"
    reason = why_not_built()
    if reason is None:
        return [Diagnostic("kernels", "xformers", f"{pair}: its kernels load")]
    advice = (
        f"distill leaves its backends alone. On a machine with a GPU, `{install('gpu')}` installs a pair "
        "that fits; so does any torch from PyTorch's index for that CUDA"
    )
    return [Diagnostic("kernels", "xformers", f"{pair}: its kernels do not load", f"{reason}: {advice}")]
