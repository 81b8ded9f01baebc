"""Tensors that are spread over ranks: each rank's part on the way into a checkpoint, and any rows on the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill_core.system import distributed
from distill_core.system.sharded import is_spread, local, parts_of, rows_of, spread_like


class Parts:
    """A tensor that ranks have saved in parts, the first rows first. `parts[first:last]` are rows of the whole."""

    def __init__(self, shape: Sequence[int], parts: Sequence[Tensor]) -> None:
        self.shape = torch.Size(shape)
        self._parts = parts

    def __getitem__(self, rows: slice) -> Tensor:
        first, last, _ = rows.indices(self.shape[0])
        start, pieces = 0, []
        for part in self._parts:
            pieces.append(part[max(0, first - start) : max(0, last - start)])
            start += len(part)
        return torch.cat(pieces)


@dataclass(frozen=True)
class Split:
    """A state as ranks write it: `common` by the first of them, with None for each tensor that is in parts; this rank's
    `parts`; and `spread`, [places, shape, number among the parts] of each. `count` parts make a whole."""

    common: Any
    parts: list[Tensor]
    spread: list[tuple[list[Any], list[int], int]]
    count: int


def split(state: Any) -> Split:
    """Copies in the host's memory of what this rank writes, so that training may go on."""
    writes_common = distributed.rank() == 0
    spread: list[tuple[list[Any], list[int], int]] = []
    parts: list[Tensor] = []
    counts = {1}

    def copied(value: Any, places: list[Any]) -> Any:
        if isinstance(value, Mapping):
            return {key: copied(inner, [*places, key]) for key, inner in value.items()}
        if isinstance(value, list):
            return [copied(inner, [*places, number]) for number, inner in enumerate(value)]
        if not isinstance(value, Tensor):
            return value
        count = parts_of(value)
        if count == 1:
            return _to_host(local(value)) if writes_common else None
        if distributed.rank() < count:  # the others hold copies of the same parts
            parts.append(_to_host(local(value)))
        spread.append((places, list(value.shape), len(spread)))
        counts.add(count)
        return None

    common = copied(state, [])
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return Split(common, parts, spread, max(counts))


def _to_host(tensor: Tensor) -> Tensor:
    """A copy; from a GPU one into pinned memory, which is complete after the next synchronisation."""
    if tensor.is_cuda:
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor.detach(), non_blocking=True)
    return tensor.detach().clone()


def laid_out_like(saved: Any, own: Tensor) -> Any:
    """A saved tensor, or its `Parts`, as `own` is laid out: of one that is spread over ranks this rank's rows alone are
    read."""
    if is_spread(own) and isinstance(saved, Tensor | Parts) and saved.shape == own.shape:
        first, last = rows_of(own)
        return spread_like(saved[first:last], own)
    return saved[:] if isinstance(saved, Parts) else saved


def map_tree(function: Callable[[Any], Any], tree: Any) -> Any:
    """The tree of mappings and lists with `function` of each leaf."""
    if isinstance(tree, Mapping):
        return {key: map_tree(function, value) for key, value in tree.items()}
    return [map_tree(function, value) for value in tree] if isinstance(tree, list) else function(tree)
