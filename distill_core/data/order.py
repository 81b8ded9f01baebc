"""Which sample stands where in an endless, shuffled run over shards: a pure function of a seed and a position.

Nothing is remembered from one position to the next, so a run continues exactly from a single number, its position,
on any number of ranks and workers.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


def stable_hash(*parts: Any) -> int:
    """A 63-bit hash of its arguments, the same in every process and release."""
    text = "\x1f".join(str(part) for part in parts)
    return int(struct.unpack("<Q", hashlib.blake2b(text.encode(), digest_size=8).digest())[0] >> 1)


class Place(NamedTuple):
    """Sample `number` of shard `shard`, read in pass `epoch` over the data."""

    epoch: int
    shard: int
    number: int


class Order(Protocol):
    """Which sample stands at a position, which counts from the run's start over all passes."""

    samples: int
    """Of a pass; at least 1."""

    def place(self, position: int) -> Place:
        """The sample at a position."""
        ...

    def substitute(self, position: int, attempt: int) -> Place:
        """A sample to take where that at `position` cannot be used; another one for each attempt."""
        ...


class ShuffledOrder:
    """Pass after pass over N samples, each once a pass.

    1. The shards are put in an order drawn for the pass, their samples in one row.
    2. The row is cut into `streams` parts of equal length (to one sample), which are read in turns, a sample of each.
    3. What comes out is shuffled in windows of `shuffle` samples.

    So a window holds samples of all over the data, though as few shards as there are streams are read at a time.
    `shuffle` 0 keeps the order of the shards and their samples.
    """

    def __init__(self, lengths: Sequence[int], *, seed: int, streams: int, shuffle: int) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.samples = int(self.lengths.sum())
        self.seed, self.shuffle = seed, shuffle
        self.streams = min(streams, self.samples) if shuffle else 1
        self._pass = lru_cache(maxsize=2)(self._draw_pass)
        self._window = lru_cache(maxsize=4)(self._draw_window)

    def place(self, position: int) -> Place:
        """See `Order`."""
        epoch, index = divmod(position, self.samples)
        return self._at(epoch, self._shuffled(epoch, index))

    def substitute(self, position: int, attempt: int) -> Place:
        """See `Order`: of the same pass."""
        epoch = position // self.samples
        return self._at(epoch, stable_hash(self.seed, "substitute", position, attempt) % self.samples)

    def _shuffled(self, epoch: int, index: int) -> int:
        """Where the `index`-th sample of a pass stands in the row."""
        if self.shuffle == 0:
            return index
        window, offset = divmod(index, self.shuffle)
        turn, stream = divmod(int(window * self.shuffle + self._window(epoch, window)[offset]), self.streams)
        length, longer = divmod(self.samples, self.streams)
        return stream * length + min(stream, longer) + turn

    def _at(self, epoch: int, row: int) -> Place:
        shards, ends = self._pass(epoch)
        nth = int(np.searchsorted(ends, row, side="right"))
        shard = int(shards[nth])
        return Place(epoch, shard, row - int(ends[nth] - self.lengths[shard]))

    def _draw_pass(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shards of a pass in order [shards], and where in the row each ends [shards]."""
        shards = np.arange(len(self.lengths))
        if self.shuffle:
            shards = np.random.default_rng(stable_hash(self.seed, "shards", epoch)).permutation(shards)
        return shards, np.cumsum(self.lengths[shards])

    def _draw_window(self, epoch: int, window: int) -> NDArray[np.int64]:
        size = min(self.shuffle, self.samples - window * self.shuffle)
        return np.random.default_rng(stable_hash(self.seed, "window", epoch, window)).permutation(size)


BLOCK = 1000
"""Positions that hold as many samples of each set as its weight says, to one."""


class WeightedOrder:
    """Several sets, each in passes of its own, in shares of the positions that `weights` say.

    With `run` above 1 the positions of a step, `run` of them, are all of one set.
    """

    def __init__(
        self,
        sets: Sequence[Sequence[int]],
        orders: Sequence[Order],
        weights: Sequence[float],
        *,
        seed: int,
        run: int = 1,
    ) -> None:
        """Set i holds the shards `sets[i]`; `orders[i]` numbers them from 0. All weights are above 0."""
        self.sets, self.orders, self.seed, self.run = [list(shards) for shards in sets], list(orders), seed, run
        self.samples = sum(order.samples for order in self.orders)
        self.counts = _shares(weights, BLOCK)
        self._block = lru_cache(maxsize=4)(self._draw_block)

    def place(self, position: int) -> Place:
        """See `Order`."""
        number, inner = self._inner(position)
        return self._outer(number, self.orders[number].place(inner))

    def substitute(self, position: int, attempt: int) -> Place:
        """See `Order`: of the same set."""
        number, inner = self._inner(position)
        return self._outer(number, self.orders[number].substitute(inner, attempt))

    def _inner(self, position: int) -> tuple[int, int]:
        """The set at a position, and the position in the set's own order."""
        step, offset = divmod(position, self.run)
        block, index = divmod(step, BLOCK)
        chosen, earlier = self._block(block)
        number = int(chosen[index])
        return number, (block * self.counts[number] + int(earlier[index])) * self.run + offset

    def _outer(self, number: int, place: Place) -> Place:
        return place._replace(shard=self.sets[number][place.shard])

    def _draw_block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The set at each position of a block [BLOCK], and how often it stands before in the block [BLOCK]."""
        chosen = np.repeat(np.arange(len(self.sets)), self.counts)
        np.random.default_rng(stable_hash(self.seed, "sets", block)).shuffle(chosen)
        earlier = np.zeros_like(chosen)
        for number in range(len(self.sets)):
            at = chosen == number
            earlier[at] = np.arange(at.sum())
        return chosen, earlier


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in the weights' proportions, at least 1 each, that add up to `total` (largest remainders)."""
    exact = np.asarray(weights, dtype=np.float64) / np.sum(weights) * total
    shares = np.maximum(np.floor(exact).astype(int), 1)
    for _ in range(int(abs(total - shares.sum()))):
        sign = np.sign(total - shares.sum())
        shares[int(np.argmax((exact - shares) * sign))] += sign
    return [int(share) for share in shares]
