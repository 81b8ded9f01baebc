"""The order of samples: a pure function of seed and position, each sample once a pass."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from distill_core.data.order import Order, Place


def drawn(case: int) -> tuple[list[int], dict[str, int]]:
    rng = np.random.default_rng(case)
    lengths = [int(n) for n in rng.integers(1, int(rng.integers(2, 60)), int(rng.integers(1, 30)))]
    options = {"seed": case, "streams": int(rng.integers(1, 300)), "shuffle": int(rng.choice([0, 1, 7, 100, 10_000]))}
    return lengths, options


@pytest.mark.parametrize("case", range(60))
def test_each_sample_once_a_pass(case: int) -> None:
    """Catches samples lost or repeated where parts, windows, uneven shards or more streams than samples meet."""
    lengths, options = drawn(case)
    order = Order(lengths, **options)
    every = {(shard, number) for shard, length in enumerate(lengths) for number in range(length)}
    for epoch in range(3):
        places = [order.place(position) for position in range(epoch * order.samples, (epoch + 1) * order.samples)]
        assert {place.epoch for place in places} == {epoch}
        assert Counter((place.shard, place.number) for place in places) == Counter(every)


@pytest.mark.parametrize("case", range(20))
def test_a_position_needs_no_history(case: int) -> None:
    """Catches an order that depends on what was asked before: a resume, or another worker, would read other samples."""
    lengths, options = drawn(case)
    order = Order(lengths, **options)
    positions = np.random.default_rng(case).integers(0, 4 * order.samples, 50)
    expected = {int(p): Order(lengths, **options).place(int(p)) for p in positions}
    assert {int(p): order.place(int(p)) for p in positions} == expected


def test_no_shuffle_keeps_the_order_of_the_data() -> None:
    order = Order([2, 3], seed=1, streams=4, shuffle=0)
    assert [order.place(i) for i in range(6)] == [
        Place(0, 0, 0), Place(0, 0, 1), Place(0, 1, 0), Place(0, 1, 1), Place(0, 1, 2), Place(1, 0, 0),
    ]  # fmt: skip


def test_passes_and_seeds_differ() -> None:
    """Catches an epoch in the same order again, and a seed that changes nothing."""

    def first_pass(seed: int, epoch: int) -> list[Place]:
        order = Order([50, 50], seed=seed, streams=8, shuffle=20)
        return [order.place(epoch * 100 + i)._replace(epoch=0) for i in range(100)]

    drawn = [first_pass(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(drawn) for b in drawn[:i])


def test_a_window_mixes_the_whole_data_and_reads_few_shards() -> None:
    """1,000 shards of 100 samples, 16 streams: 160 samples come from 16 to 32 shards that lie all over the data, and
    the same shards go on being read. Catches batches of one shard, and reads that jump over all files."""
    order = Order([100] * 1000, seed=0, streams=16, shuffle=160)
    in_use = [{order.place(start + i).shard for i in range(160)} for start in range(0, 3200, 160)]
    assert all(16 <= len(shards) <= 32 for shards in in_use)
    assert all(np.std(sorted(shards)) > 150 for shards in in_use), "1,000 / sqrt(12) = 289 if they lie anywhere"
    assert len(set.union(*in_use)) <= 16 * 4


def test_a_shuffle_of_all_is_uniform() -> None:
    """Catches neighbors of a shard that stay neighbors: of 400 samples the distance of two that stand side by side in
    the data must be that of any two."""
    order = Order([100] * 4, seed=0, streams=256, shuffle=10_000)
    distances = []
    for epoch in range(20):
        at = {order.place(epoch * 400 + i)[1:]: i for i in range(400)}
        distances += [abs(at[s, n] - at[s, n + 1]) for s in range(4) for n in range(99)]
    assert abs(np.mean(distances) - 400 / 3) < 4
    assert np.mean([distance <= 4 for distance in distances]) < 0.03


def test_substitutes_are_of_the_same_pass_and_fixed() -> None:
    order = Order([10, 20], seed=5, streams=4, shuffle=8)
    drawn = [order.substitute(40, attempt) for attempt in range(1, 200)]
    assert {place.epoch for place in drawn} == {1}
    assert len(set(drawn)) == 30, "all samples can take its place"
    assert drawn == [Order([10, 20], seed=5, streams=4, shuffle=8).substitute(40, a) for a in range(1, 200)]
