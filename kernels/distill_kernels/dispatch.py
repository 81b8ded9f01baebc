"""What every op shares: a backend record, the choice between backends, the listing of `distill kernels`.

An op is one public function. Its module holds an `Op`: its backends, and what makes the shape class of its inputs. The
order in which `auto` tries them is data (`defaults.py`). An explicit choice that cannot run raises `BackendError` with
the reason; nothing falls back silently. What is chosen, and why the others are not, can be recorded, also for a GPU
that is not there: see `choices.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill_kernels.defaults import measured_here, shape_class, shipped

# Where each op's `Op` lives, "module:attribute". Imported only when asked about.
OPS: dict[str, str] = {
    "cross_attention": "distill_kernels.attention.cross_attention:OP",
    "cross_attention_pool": "distill_kernels.attention.cross_attention_pool:OP",
    "multi_view_info_nce": "distill_kernels.pairwise.info_nce:OP",
    "multi_view_sigmoid": "distill_kernels.pairwise.sigmoid_loss:OP",
    "packed_attention": "distill_kernels.attention.packed_attention:OP",
    "self_attention": "distill_kernels.attention.self_attention:OP",
}


class BackendError(ValueError):
    """A backend was asked for by name and cannot run: the message says why."""


class Inputs:
    """The arguments of one call, as backends see them: the base of each op's own dataclass.

    The conditions of `defaults.csv` and the shape classes name attributes of it.
    """

    @property
    def leading(self) -> Tensor:
        """The tensor that stands for the others: where the call runs, and in what dtype."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.leading.device

    @property
    def products(self) -> torch.dtype:
        """Of the products."""
        return self.leading.dtype

    @property
    def dtype(self) -> str:
        """Of the products, "bfloat16" say."""
        return str(self.products).removeprefix("torch.")

    @property
    def bytes(self) -> int:
        """Of an element of the products."""
        return self.products.itemsize


def anywhere(inputs: Any) -> None:
    """`why_not` of a backend that runs on all inputs, on any machine."""


@dataclass(frozen=True)
class Backend:
    """One way to compute an op.

    `run(inputs)` computes it. `why_not(inputs)` is None when the backend can run, else the reason in words;
    `why_not(None)` asks only whether this machine has it.
    """

    name: str
    run: Callable[[Any], Any]
    why_not: Callable[[Any], str | None] = anywhere


class Order(NamedTuple):
    """What `auto` tries, best guess first, and why: what was measured, or what it is estimated from."""

    names: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Op:
    """An op: its backends, and how its inputs are looked at.

    `shape` names the attributes of inputs that make their shape class (`defaults.shape_class`); `cases(device)` makes
    the inputs that `tune.tune` times; `cheapest(inputs, **coefficients)` orders backends by the op's cost model, where
    it has one.
    """

    name: str
    backends: tuple[Backend, ...]
    shape: str
    cases: Callable[[torch.device], Iterable[Any]]
    cheapest: Callable[..., tuple[str, ...]] | None = None

    def shape_class(self, inputs: Any) -> str:
        """The conditions that stand for inputs like these."""
        return shape_class(self.shape, inputs)

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
    """What `auto` tries for `inputs`: what was measured on this device, then what the package says of its kind."""
    device = str(inputs.device)
    names: tuple[str, ...] = ()
    whys = []
    for rules in (measured_here(op.name, device), shipped(op.name, device)):
        for rule in rules:
            if rule.holds(inputs):
                names += op.cheapest(inputs, **rule.numbers) if op.cheapest and rule.numbers else rule.backends
                whys.append(rule.why)
                break
    if not whys:
        raise BackendError(f"{op.name}: no rule for {device} says what to try; name a backend")
    return Order(names, whys[0])


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
