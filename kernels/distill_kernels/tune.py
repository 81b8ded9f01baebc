"""Measure every backend that can run here and write the table by which `auto` then chooses."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_kernels.defaults import COLUMNS, table_path
from distill_kernels.dispatch import OPS, Backend, BackendError, Inputs, load_op
from distill_kernels.machine import device_name, forget, interpreting
from distill_kernels.measure import interleaved


def tune(device: torch.device, *, rounds: int = 7) -> tuple[Path, list[tuple[str, str, str, float]]]:
    """Time all backends of all ops on `device`, forward and backward, and write the measured table.

    Returns the table's path and rows (op, shape class, backend, milliseconds), fastest first in each class. On
    CPU the time is this process's CPU time, else wall time. `reference` is not a candidate where another
    backend can run. The current process uses the new table from its next call on.

    Raises:
        BackendError: under TRITON_INTERPRET=1, whose times mean nothing.
    """
    if interpreting():
        raise BackendError("unset TRITON_INTERPRET before tuning: interpreted kernels are not what would run")
    evidence = f"{device_name(device)}, torch {torch.__version__}"
    rules, rows = [], []
    for op_name in OPS:
        op = load_op(op_name)
        for inputs in op.cases(device):
            runnable = [b for b in op.backends if b.why_not(inputs) is None]
            candidates = [b for b in runnable if b.name != "reference"] or runnable
            calls = {b.name: _forward_backward(b, inputs) for b in candidates}
            seconds = interleaved(calls, rounds=rounds, device=device)
            times = {n: s.process if device.type == "cpu" else s.wall for n, s in seconds.items()}
            order = sorted(times, key=lambda n: times[n])
            when = op.shape_class(inputs)
            why = "here (distill kernels --tune)"
            rules.append((op_name, device.type, "", when, " ".join(order), "", "measured", evidence, why))
            rows += [(op_name, when, name, times[name] * 1e3) for name in order]
    path = table_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rules)
    partial.replace(path)
    forget()
    return path, rows


def _forward_backward(backend: Backend, inputs: Any) -> Callable[[], None]:
    def call() -> None:
        outputs = [t for t in _tensors(backend.run(inputs)) if t.requires_grad]
        if outputs:
            leaves = [t for t in _tensors(inputs) if t.requires_grad]
            ones = [torch.ones_like(t) for t in outputs]
            torch.autograd.grad(outputs, leaves, ones, allow_unused=True)

    return call


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Inputs)):
        for item in vars(value).values() if isinstance(value, Inputs) else value:
            yield from _tensors(item)
