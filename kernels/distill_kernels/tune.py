"""Measure every backend that can run here and write the table by which `auto` then chooses."""

from __future__ import annotations

import csv
import math
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from distill_kernels.defaults import COLUMNS, measured_rows, table_path
from distill_kernels.dispatch import OPS, Backend, BackendError, Inputs, Op, load_op, order_of, tensors_in
from distill_kernels.machine import device_name, forget, interpreting
from distill_kernels.measure import interleaved


class Time(NamedTuple):
    """Of one backend for the inputs of one shape class; infinite where memory did not suffice."""

    op: str
    inputs: str  # the shape class
    backend: str
    milliseconds: float


def tune(
    device: torch.device,
    cases: Iterable[tuple[str, Inputs]] | None = None,
    *,
    rounds: int = 7,
    report: Callable[[list[Time]], None] = lambda times: None,
) -> Path:
    """Time backends on `device`, forward and backward, and add what was measured to its table, whose path is returned.

    `cases` are names of ops with inputs that stand for their shape class (`choices.called`); they need no values, for
    they are made anew. Without them, each op's own cases are timed. An op is timed after those that it calls, so that
    a form is timed with the attention that it would take. When an op is done, its rows replace those of the same
    classes, and are used from the next call on. `report` gets the times of each class, fastest first.

    On a CPU the time is this process's CPU time, else wall time. `reference` is a candidate only where the order
    names it.

    Raises:
        BackendError: under TRITON_INTERPRET=1, whose times mean nothing.
        OSError: the table cannot be written.
    """
    if interpreting():
        raise BackendError("unset TRITON_INTERPRET before tuning: interpreted kernels are not what would run")
    by_op: dict[str, list[Inputs]] = {}
    for name, inputs in cases or ():
        by_op.setdefault(name, []).append(inputs)
    path = table_path(device)
    for name in OPS:
        op = load_op(name)
        orders = {}
        for inputs in op.cases(device) if cases is None else by_op.get(name, ()):
            when = op.shape_class(inputs)
            milliseconds = _times(op, inputs if cases is None else with_values(inputs, device), rounds)
            order = sorted(milliseconds, key=lambda backend: milliseconds[backend])
            orders[when] = " ".join(backend for backend in order if math.isfinite(milliseconds[backend]))
            report([Time(name, when, backend, milliseconds[backend]) for backend in order])
        if orders:
            _add(path, op, orders, device)
            forget()
    return path


def _times(op: Op, inputs: Inputs, rounds: int) -> dict[str, float]:
    """Milliseconds of each candidate."""
    order = order_of(op, inputs).names
    candidates = [b for b in op.backends if b.why_not(inputs) is None and (b.name != "reference" or b.name in order)]
    calls, milliseconds = {}, {}
    for backend in candidates:
        calls[backend.name] = _forward_backward(backend, inputs)
        try:
            calls[backend.name]()
        except torch.OutOfMemoryError:
            del calls[backend.name]
            milliseconds[backend.name] = math.inf
    for name, seconds in interleaved(calls, rounds=rounds, device=inputs.device).items():
        milliseconds[name] = 1e3 * (seconds.process if inputs.device.type == "cpu" else seconds.wall)
    return milliseconds


def with_values(inputs: Inputs, device: torch.device) -> Inputs:
    """The same call on `device`, in the same layout.

    Rows are about of unit length, as embeddings and normalised tokens are, and scalars are 10, a usual scale of logits.
    Integers and masks keep their values.
    """

    def make(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(device)
        if tensor.ndim == 0:
            made = torch.full((), 10.0, dtype=tensor.dtype, device=device)
        else:
            last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
            memory = torch.randn(last + 1 if tensor.numel() else 0, dtype=tensor.dtype, device=device)
            made = (memory * tensor.shape[-1] ** -0.5).as_strided(tensor.shape, tensor.stride())
        return made.detach().requires_grad_(tensor.requires_grad)

    return inputs.map(make)


def _add(path: Path, op: Op, orders: dict[str, str], device: torch.device) -> None:
    """Put the orders, by shape class, before the table's other rows; in one rename."""
    evidence = f"{device_name(device)}, torch {torch.__version__}"
    rows: list[tuple[str, ...]] = [
        (op.name, device.type, "", when, order, "", "measured", evidence, "here (distill kernels --tune)")
        for when, order in orders.items()
        if order
    ]
    for row in measured_rows(path):
        if row.op != op.name or not (row.rule.when in orders or op.unknown_in(row.rule)):
            rows.append(row.fields)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{secrets.token_hex(4)}.partial")  # another process may tune as well
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    partial.replace(path)


def _forward_backward(backend: Backend, inputs: Inputs) -> Callable[[], None]:
    def call() -> None:
        outputs = [t for t in tensors_in(backend.run(inputs)) if t.requires_grad]
        if outputs:
            leaves = [t for t in tensors_in(inputs) if t.requires_grad]
            ones = [torch.ones_like(t) for t in outputs]
            torch.autograd.grad(outputs, leaves, ones, allow_unused=True)

    return call
