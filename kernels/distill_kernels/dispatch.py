"""What every op shares: a backend record, the choice between backends, the listing of `distill kernels`.

An op is one public function. Its module holds an `Op`: its backends, and what makes the shape class of its inputs. The
order in which `auto` tries them is data (`defaults.py`). An explicit choice that cannot run raises `BackendError` with
the reason; nothing falls back silently. What is chosen, and why the others are not, can be recorded, also for a GPU
that is not there: see `choices.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from distill_kernels.defaults import Rule, ignore, measured_here, required, shape_class, shipped, table_path
from distill_kernels.machine import once

# Where each op's `Op` lives, "module:attribute". Imported only when asked about. Those that others call stand first.
OPS: dict[str, str] = {
    "cross_attention": "distill_kernels.attention.cross_attention:OP",
    "cross_attention_pool": "distill_kernels.attention.cross_attention_pool:OP",
    "self_attention": "distill_kernels.attention.self_attention:OP",
    "packed_attention": "distill_kernels.attention.packed_attention:OP",
    "multi_view_info_nce": "distill_kernels.pairwise.info_nce:OP",
    "multi_view_sigmoid": "distill_kernels.pairwise.sigmoid_loss:OP",
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

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same call of other tensors."""
        return type(self)(*(_map(value, change) for value in vars(self).values()))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Those of a call's inputs or outputs, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Inputs)):
        for item in vars(value).values() if isinstance(value, Inputs) else value:
            yield from tensors_in(item)


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        items = [_map(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def anywhere(inputs: Any) -> None:
    """`why_not` of a backend that runs on all inputs, on any machine."""


@dataclass(frozen=True)
class Backend:
    """One way to compute an op.

    `run(inputs)` computes it. `why_not(inputs)` is None when the backend can run, else the reason in words;
    `why_not(None)` asks only whether this machine has it. `traceable`: it calls operators that have fake
    implementations, and nothing that only its device has: with tensors without values it runs on any machine.
    """

    name: str
    run: Callable[[Any], Any]
    why_not: Callable[[Any], str | None] = anywhere
    traceable: bool = False


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

    def unknown_in(self, rule: Rule) -> set[str]:
        """What a measured rule names that is no backend of this op, and no part of its shape class."""
        names = {name.removesuffix("<=") for name in self.shape.split()}
        return {*rule.backends} - {b.name for b in self.backends} | {c.name for c in rule.conditions} - names

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
    """What `auto` tries for `inputs`, and why.

    First what correctness asks for, then what was measured on this device, then what the package says of its kind.
    """
    device = str(inputs.device)
    names: tuple[str, ...] = ()
    whys = []
    for rule in (
        _first(required(op.name, device), inputs),
        _measured_for(op, inputs, device),
        _first(shipped(op.name, device), inputs),
    ):
        if rule is not None:
            names += op.cheapest(inputs, **rule.numbers) if op.cheapest and rule.numbers else rule.backends
            whys.append(rule.why)
    if not whys:
        raise BackendError(f"{op.name}: no rule for {device} says what to try; name a backend")
    return Order(names, whys[0])


def _first(rules: tuple[Rule, ...], inputs: Any) -> Rule | None:
    for rule in rules:
        if rule.holds(inputs):
            return rule
    return None


def _measured_for(op: Op, inputs: Any, device: str) -> Rule | None:
    """A table has many rules, one a shape class: it is looked up, where sizes are no symbols of torch.compile's."""
    rules = _measured(op.name, device)
    if not rules:
        return None
    if torch.compiler.is_compiling():
        return _first(rules, inputs)
    return _by_class(op.name, device).get(op.shape_class(inputs))


@once
def _by_class(op: str, device: str) -> dict[str, Rule]:
    return {rule.when: rule for rule in reversed(_measured(op, device))}


@once
def _measured(op: str, device: str) -> tuple[Rule, ...]:
    """`measured_here`, or none, with a warning, where a rule names what the op has not: another version wrote it."""
    rules = measured_here(op, device)
    for rule in rules if op in OPS else ():
        if unknown := load_op(op).unknown_in(rule):
            ignore(table_path(torch.device(device)), f"{op} has no {', '.join(sorted(unknown))}")
            return ()
    return rules


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
