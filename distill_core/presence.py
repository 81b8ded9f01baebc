"""Which samples of a step have what: where a recipe lets some lack a modality or a field (`data.optional`).

What has rows [B] of samples has, of an optional modality, only those of the samples that have it, in the batch's order.
`Present` says which these are on every rank, so that rows of one modality find those of another.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, device


class Present:
    """The samples that have all of some modalities, on every rank.

    A rank without any has one row for them all the same, a filler of weight 0, so that it runs every tower and reaches
    every collective. Where no rank has any, the first one's filler stands for all.
    """

    def __init__(self, masks: NDArray[np.bool_], rank: int = 0) -> None:
        """`masks` [R, B]: of the samples of each rank."""
        self._rows = [np.flatnonzero(mask) for mask in masks]
        self._positions: dict[tuple[int, device], tuple[Present | None, Tensor | None, Tensor]] = {}
        self.batch = masks.shape[1]
        self.samples = sum(map(len, self._rows))
        """On all ranks."""
        self.filler = len(self._rows[rank]) == 0
        """Whether this rank's row is a filler."""
        self.weight = len(self._rows[rank]) * len(masks) / self.samples if self.samples else 0.0
        """Of this rank's mean in the mean over ranks."""
        if not self.samples:
            self._rows[0] = np.zeros(1, np.intp)
        self.counts = [len(rows) for rows in self._rows]
        """Rows of each rank in what is gathered; 0 of one whose row is a filler."""
        self.own = self._rows[rank] if len(self._rows[rank]) else np.zeros(1, np.intp)
        """This rank's samples, by their number in the batch."""
        self.offset = min(sum(self.counts[:rank]), sum(self.counts) - 1)
        """Where this rank's rows begin in what is gathered; some row's place for a filler."""
        self._own_count = self.counts[rank]

    def of(self, x: Tensor, dim: int, outer: Present | None) -> Tensor:
        """This rank's rows, out of those `x` of `outer`; None stands for all samples."""
        if outer is self:
            return x
        own, _ = self._on(x.device, outer)
        return x if own is None else x.index_select(dim, own)

    def of_all_ranks(self, x: Tensor, dim: int, outer: Present | None) -> Tensor:
        """The rows of all ranks, out of those `x` that are gathered of `outer`."""
        return x if outer is self else x.index_select(dim, self._on(x.device, outer)[1])

    def padded(self, x: Tensor, dim: int, each: int = 1) -> Tensor:
        """This rank's rows (`each` of them a sample), as many as the rank with the most has: for a gather."""
        rows = x.narrow(dim, 0, self._own_count * each)
        missing = (max(self.counts) - self._own_count) * each
        if not missing:
            return rows
        shape = list(rows.shape)
        shape[dim] = missing
        return torch.cat([rows, rows.new_zeros(shape)], dim)

    def unpadded(self, x: Tensor, dim: int, each: int = 1) -> Tensor:
        """The rows of all ranks, out of the gathered `padded`."""
        most = max(self.counts) * each
        parts = [x.narrow(dim, rank * most, count * each) for rank, count in enumerate(self.counts) if count]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def places(self, outer: Present | None) -> NDArray[np.intp] | None:
        """Where this rank's rows stand among those of `outer`; None where they are all of them."""
        if outer is None:
            own, size = self.own, self.batch
        elif self.filler:
            own, size = np.zeros(1, np.intp), len(outer.own)
        else:
            own, size = np.searchsorted(outer.own, self.own), len(outer.own)
        return None if len(own) == size else own

    def _places_of_all_ranks(self, outer: Present | None) -> NDArray[np.intp]:
        if not self.samples:
            return np.zeros(1, np.intp)
        if outer is None:
            return np.concatenate([rank * self.batch + rows for rank, rows in enumerate(self._rows)])
        starts = np.cumsum([0, *outer.counts[:-1]])
        parts = zip(starts, outer._rows, self._rows, strict=True)
        return np.concatenate([start + np.searchsorted(there, rows) for start, there, rows in parts])

    def _on(self, where: device, outer: Present | None) -> tuple[Tensor | None, Tensor]:
        """Both of these places on a device."""
        key = (id(outer), where)
        if key not in self._positions:
            own, every = self.places(outer), self._places_of_all_ranks(outer)
            # `outer` is kept, so that no other object gets its id
            self._positions[key] = outer, None if own is None else _to(own, where), _to(every, where)
        return self._positions[key][1:]


class Presence:
    """Which samples of a step have each optional modality or field, on every rank."""

    def __init__(self, masks: Mapping[str, NDArray[np.bool_]], rank: int = 0) -> None:
        """`masks`: name -> [R, B]."""
        self.masks, self.rank = dict(masks), rank
        self._made: dict[bytes, Present] = {}

    def shares(self) -> dict[str, float]:
        """Name -> the share of this rank's samples that have it."""
        return {name: float(mask[self.rank].mean()) for name, mask in self.masks.items()}

    def of(self, names: Collection[str]) -> Present | None:
        """The samples that have all of these; None where all samples have."""
        masks = [mask for name, mask in self.masks.items() if name in names]
        if not masks:
            return None
        mask = np.logical_and.reduce(masks)
        if mask.all():
            return None
        # one object for the same samples: what is of the one is not cut for the other
        return self._made.setdefault(mask.tobytes(), Present(mask, self.rank))


def _to(places: NDArray[np.intp], where: device) -> Tensor:
    return torch.as_tensor(places, dtype=torch.long).to(where, non_blocking=True)
