"""What `distill doctor` says of the kernels."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import torch

from distill_core.doctor import Diagnostic
from distill_kernels.backends import listing, table_path


def kernels() -> list[Diagnostic]:
    """A row for each op, one for what `auto` goes by, and one for what xformers was built for."""
    rows: dict[str, tuple[list[str], list[str]]] = {}
    for op, backend, answer in listing():
        can, cannot = rows.setdefault(op, ([], []))
        can.append(backend) if answer == "yes" else cannot.append(f"{backend}: {answer}")
    found = [
        Diagnostic("kernels", op, ", ".join(can) + (f"; not {'; not '.join(cannot)}" if cannot else ""))
        for op, (can, cannot) in rows.items()
    ]
    path = table_path(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    auto = str(path) if path.exists() else "built-in order (measure with distill kernels --tune)"
    return [*found, Diagnostic("kernels", "auto goes by", auto), *_xformers()]


def _xformers() -> list[Diagnostic]:
    """Whether its compiled part was built for this torch; read from its own note, since importing it takes seconds."""
    spec = importlib.util.find_spec("xformers")
    note = Path(spec.origin).parent / "cpp_lib.json" if spec is not None and spec.origin else None
    if note is None or not note.is_file():
        return []
    built = json.loads(note.read_text(encoding="utf-8"))["version"]["torch"]
    warning = ""
    if built.partition("+")[0] != torch.__version__.partition("+")[0] or (
        "+cu" in built and torch.version.cuda is None
    ):
        warning = (
            f"its compiled kernels do not load in torch {torch.__version__}, and it warns of that when imported; "
            "distill then leaves its backends alone"
        )
    return [Diagnostic("kernels", "xformers", f"built for torch {built}", warning)]
