"""What a step calls, what `auto` would choose for it, and why: on this device or as if on a GPU that is not here.

A step on tensors without values (torch's FakeTensor) costs next to nothing. Where choices are asked for as if on a GPU,
each op's inputs are shown to its backends as tensors of that GPU. The step continues with the choice, if that runs here
or needs no device for tensors without values, else with what runs here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from distill_kernels import dispatch, machine
from distill_kernels.dispatch import Backend, Inputs, Op, choose_here, order_of


class Choice(NamedTuple):
    """One call's choice."""

    op: str
    backend: str
    inputs: str  # their shape class
    why: str  # what the order of `auto` goes by, or that the backend was named
    others: tuple[tuple[str, str], ...]  # each other backend, and why it was passed over


@contextmanager
def recorded(device: torch.device | None = None, capability: tuple[int, int] = (9, 0)) -> Iterator[list[Choice]]:
    """The choices of every op called in the block, in order.

    With a CUDA `device` they are those for that device. Where torch sees no GPU, one of this compute capability is
    assumed (9.0: an H100), with the C compiler and the packages of this machine.

    Raises:
        BackendError: in the block, as `choose` does, for a backend that is named and could not run there.
    """
    choices: list[Choice] = []
    elsewhere = device is not None and device.type == "cuda"

    def observe(op: Op, backend: str, inputs: Any) -> Backend:
        shown = _moved(inputs, torch.device("cuda")) if elsewhere else inputs
        chosen = choose_here(op, backend, shown)
        choices.append(_choice(op, backend, chosen, shown))
        traceable = chosen.traceable and isinstance(inputs.leading, FakeTensor)
        if not elsewhere or traceable or chosen.why_not(inputs) is None:
            return chosen
        return Backend(chosen.name, lambda x: _unobserved(op, x))

    assumed = machine.assumed_capability
    if elsewhere and not torch.cuda.is_available():
        machine.assumed_capability = capability
    try:
        with _observed(observe):
            yield choices
    finally:
        machine.assumed_capability = assumed


@contextmanager
def called() -> Iterator[dict[tuple[str, str], Inputs]]:
    """Inputs of each op called in the block, and of each that its other backends would call, by name and shape class.

    The first of their class stand for it, apart from the graph. The block is a step on tensors without values.
    """
    calls: dict[tuple[str, str], Inputs] = {}

    def observe(op: Op, backend: str, inputs: Any) -> Backend:
        key = (op.name, op.shape_class(inputs))
        if key not in calls:
            calls[key] = _detached(inputs)
            with torch.autocast(inputs.device.type, enabled=False):
                for other in op.backends:
                    if other.name != "reference" and other.why_not(inputs) is None:
                        other.run(inputs)
        return choose_here(op, backend, inputs)

    with _observed(observe):
        yield calls


@contextmanager
def _observed(observe: Callable[[Op, str, Any], Backend] | None) -> Iterator[None]:
    before, dispatch.observer = dispatch.observer, observe
    try:
        yield
    finally:
        dispatch.observer = before


def _unobserved(op: Op, inputs: Any) -> Any:
    """What this device's own choice computes."""
    with _observed(None):
        return choose_here(op, "auto", inputs).run(inputs)


def _choice(op: Op, backend: str, chosen: Backend, inputs: Any) -> Choice:
    order = order_of(op, inputs)
    others = []
    for other in op.backends:
        if other.name != chosen.name:
            rank = f"after {chosen.name} in the order" if other.name in order.names else "only when named"
            others.append((other.name, other.why_not(inputs) or (rank if backend == "auto" else "another was named")))
    why = order.why if backend == "auto" else "named"
    return Choice(op.name, chosen.name, op.shape_class(inputs), why, tuple(others))


def _moved(inputs: Inputs, device: torch.device) -> Inputs:
    """Tensors as ones of `device` without values, of the same layout; the host's integers stay where they are read."""

    def move(tensor: Tensor) -> Tensor:
        with FakeTensorMode(allow_non_fake_inputs=True):
            moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return moved.requires_grad_(tensor.requires_grad)

    return inputs.map(move)


def _detached(inputs: Inputs) -> Inputs:
    trains = torch.is_grad_enabled()
    return inputs.map(lambda tensor: tensor.detach().requires_grad_(trains and tensor.requires_grad))
