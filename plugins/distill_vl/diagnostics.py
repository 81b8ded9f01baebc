"""What `distill doctor` says of the kernels."""

from __future__ import annotations

import torch

from distill_core import Diagnostic
from distill_kernels.attention.memory_efficient import built_for, why_not_built
from distill_kernels.defaults import table_path
from distill_kernels.dispatch import listing


def kernels() -> list[Diagnostic]:
    """A row for each op, one for what `auto` goes by, and one for what xformers was built for."""
    rows: dict[str, tuple[list[str], list[str]]] = {}
    for op, backend, answer in listing():
        can, cannot = rows.setdefault(op, ([], []))
        can.append(backend) if answer == "yes" else cannot.append(f"{backend}: {answer}")
    lines = [
        Diagnostic("kernels", op, ", ".join(can) + (f"; not {'; not '.join(cannot)}" if cannot else ""))
        for op, (can, cannot) in rows.items()
    ]
    path = table_path(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    auto = str(path) if path.exists() else "the defaults of the package (measure with distill kernels --tune)"
    return [*lines, Diagnostic("kernels", "auto goes by", auto), *_xformers()]


def _xformers() -> list[Diagnostic]:
    """Whether its compiled part was built for this torch."""
    built, reason = built_for(), why_not_built()
    if built is None:
        return []
    if reason is None and "+cu" in built and torch.version.cuda is None:
        reason = f"its kernels were built for torch {built} and this torch has no CUDA"
    advice = "distill leaves its backends alone; the extra `gpu` installs a pair that fits"
    return [Diagnostic("kernels", "xformers", f"built for torch {built}", f"{reason}: {advice}" if reason else "")]
