"""Tensors and modules that are spread over ranks: torch's DTensor and FSDP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

T = TypeVar("T", bound=Tensor)


def is_spread(tensor: Tensor) -> bool:
    """Whether it is a `DTensor`: a part of it, or a copy, on each rank."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be spread over ranks; shares its memory."""
    return cast(Tensor, cast(Any, tensor).to_local()) if is_spread(tensor) else tensor


def joined(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be spread over ranks, every one of which must ask."""
    return cast(Tensor, cast(Any, tensor).full_tensor()) if is_spread(tensor) else tensor


def parts_of(tensor: Tensor) -> int:
    """Over how many ranks its rows are split; 1 where each has a copy."""
    return int(_split_dimension(tensor)[0])


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """First and last (exclusive) of the rows that this rank holds of a tensor that is spread."""
    count, number = _split_dimension(tensor)
    size = -(-len(tensor) // count)
    return min(number * size, len(tensor)), min((number + 1) * size, len(tensor))


def _split_dimension(tensor: Tensor) -> tuple[int, int]:
    """(number of parts, this rank's)."""
    spread = cast(Any, tensor)
    for dimension, placement in enumerate(spread.placements if is_spread(tensor) else ()):
        if placement.is_shard():
            assert placement.dim == 0
            return spread.device_mesh.size(dimension), spread.device_mesh.get_local_rank(dimension)
    return 1, 0


def spread_like(rows: Tensor, like: Tensor) -> Tensor:
    """The tensor that is spread as `like` is, of which this rank holds `rows` (those of `rows_of`)."""
    from torch.distributed.tensor import DTensor

    of = cast(Any, like)
    rows = rows.to(like.device, copy=True)
    return DTensor.from_local(rows, of.device_mesh, of.placements, shape=like.shape, stride=like.stride())


def apart(tensors: Iterable[T]) -> list[list[T]]:
    """Tensors that are whole on each rank, and those that are spread: torch's `foreach` operators take one kind."""
    kinds: tuple[list[T], list[T]] = [], []
    for tensor in tensors:
        kinds[is_spread(tensor)].append(tensor)
    return [kind for kind in kinds if kind]


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Inside, every rank holds all parameters of what is spread over ranks, and no forward pass reaches a collective:
    ranks may make unequal numbers of them. Every rank must enter and leave."""
    modules = list(_fsdp_modules(model))
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


@contextmanager
def gradients_stay(model: nn.Module, stay: bool) -> Iterator[None]:
    """If `stay`, backward passes inside add up gradients on each rank, and leave it to a later one to average them."""
    modules = list(_fsdp_modules(model)) if stay else []
    for module in modules:
        module.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for module in modules:
            module.set_requires_gradient_sync(True, recurse=False)


def _fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    if dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        yield from (module for module in model.modules() if isinstance(module, FSDPModule))


def global_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """The L2 norm of all gradients, those spread over ranks included: a 0-dim tensor, equal on all ranks."""
    norms = [nn.utils.get_total_norm(alike) for alike in apart(gradients)]
    norms = [joined(norm).to(device) for norm in norms]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
