"""The order of samples: a pure function of seed and position, each sample once a pass."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from distill_core.data.order import Place, ShuffledOrder, WeightedOrder


def drawn(case: int) -> tuple[list[int], dict[str, int]]:
    rng = np.random.default_rng(case)
    lengths = [int(n) for n in rng.integers(1, int(rng.integers(2, 60)), int(rng.integers(1, 30)))]
    options = {"seed": case, "streams": int(rng.integers(1, 300)), "shuffle": int(rng.choice([0, 1, 7, 100, 10_000]))}
    return lengths, options


@pytest.mark.parametrize("case", range(60))
def test_each_sample_once_a_pass(case: int) -> None:
    """Catches samples lost or repeated where parts, windows, uneven shards or more streams than samples meet."""
    lengths, options = drawn(case)
    order = ShuffledOrder(lengths, **options)
    every = {(shard, number) for shard, length in enumerate(lengths) for number in range(length)}
    for epoch in range(3):
        places = [order.place(position) for position in range(epoch * order.samples, (epoch + 1) * order.samples)]
        assert {place.epoch for place in places} == {epoch}
        assert Counter((place.shard, place.number) for place in places) == Counter(every)


@pytest.mark.parametrize("case", range(20))
def test_a_position_needs_no_history(case: int) -> None:
    """Catches an order that depends on what was asked before: a resume, or another worker, would read other samples."""
    lengths, options = drawn(case)
    order = ShuffledOrder(lengths, **options)
    positions = np.random.default_rng(case).integers(0, 4 * order.samples, 50)
    expected = {int(p): ShuffledOrder(lengths, **options).place(int(p)) for p in positions}
    assert {int(p): order.place(int(p)) for p in positions} == expected


def test_no_shuffle_keeps_the_order_of_the_data() -> None:
    order = ShuffledOrder([2, 3], seed=1, streams=4, shuffle=0)
    assert [order.place(i) for i in range(6)] == [
        Place(0, 0, 0), Place(0, 0, 1), Place(0, 1, 0), Place(0, 1, 1), Place(0, 1, 2), Place(1, 0, 0),
    ]  # fmt: skip


def test_passes_and_seeds_differ() -> None:
    """Catches an epoch in the same order again, and a seed that changes nothing."""

    def first_pass(seed: int, epoch: int) -> list[Place]:
        order = ShuffledOrder([50, 50], seed=seed, streams=8, shuffle=20)
        return [order.place(epoch * 100 + i)._replace(epoch=0) for i in range(100)]

    drawn = [first_pass(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(drawn) for b in drawn[:i])


def test_a_window_mixes_the_whole_data_and_reads_few_shards() -> None:
    """1,000 shards of 100 samples, 16 streams: 160 samples come from 16 to 32 shards that lie all over the data, and
    the same shards go on being read. Catches batches of one shard, and reads that jump over all files."""
    order = ShuffledOrder([100] * 1000, seed=0, streams=16, shuffle=160)
    in_use = [{order.place(start + i).shard for i in range(160)} for start in range(0, 3200, 160)]
    assert all(16 <= len(shards) <= 32 for shards in in_use)
    assert all(np.std(sorted(shards)) > 150 for shards in in_use), "1,000 / sqrt(12) = 289 if they lie anywhere"
    assert len(set.union(*in_use)) <= 16 * 4


def test_a_shuffle_of_all_is_uniform() -> None:
    """Catches neighbors of a shard that stay neighbors: of 400 samples the distance of two that stand side by side in
    the data must be that of any two."""
    order = ShuffledOrder([100] * 4, seed=0, streams=256, shuffle=10_000)
    distances = []
    for epoch in range(20):
        at = {order.place(epoch * 400 + i)[1:]: i for i in range(400)}
        distances += [abs(at[s, n] - at[s, n + 1]) for s in range(4) for n in range(99)]
    assert abs(np.mean(distances) - 400 / 3) < 4
    assert np.mean([distance <= 4 for distance in distances]) < 0.03


def test_substitutes_are_of_the_same_pass_and_fixed() -> None:
    order = ShuffledOrder([10, 20], seed=5, streams=4, shuffle=8)
    drawn = [order.substitute(40, attempt) for attempt in range(1, 200)]
    assert {place.epoch for place in drawn} == {1}
    assert len(set(drawn)) == 30, "all samples can take its place"
    assert drawn == [ShuffledOrder([10, 20], seed=5, streams=4, shuffle=8).substitute(40, a) for a in range(1, 200)]


def weighted(case: int, run: int) -> tuple[WeightedOrder, list[list[int]], list[float], dict[int, int]]:
    """An order over two to four sets that take turns in the list of shards, with the shards' lengths."""
    rng = np.random.default_rng(case)
    number = int(rng.integers(2, 5))
    sets: list[list[int]] = [[] for _ in range(number)]
    lengths: dict[int, int] = {}
    for shard in range(number * int(rng.integers(1, 4))):
        sets[shard % number].append(shard)
        lengths[shard] = int(rng.integers(1, 30))
    weights = [float(w) for w in rng.uniform(0.2, 5, number)]
    orders = [ShuffledOrder([lengths[s] for s in shards], seed=case, streams=4, shuffle=50) for shards in sets]
    return WeightedOrder(sets, orders, weights, seed=case, run=run), sets, weights, lengths


@pytest.mark.parametrize("case", range(20))
@pytest.mark.parametrize("run", [1, 6])
def test_sets_come_by_weight_and_each_in_passes_of_its_own(case: int, run: int) -> None:
    """Catches shares that drift, samples of a set that are missed or come too often, and a step of two sets."""
    order, sets, weights, lengths = weighted(case, run)
    places = [order.place(position) for position in range(2000 * run)]
    of_shard = {shard: number for number, shards in enumerate(sets) for shard in shards}
    counts = Counter(of_shard[place.shard] for place in places)
    for number, weight in enumerate(weights):
        assert counts[number] / len(places) == pytest.approx(weight / sum(weights), abs=0.002)
    for shards in sets:
        own = [place for place in places if place.shard in shards]
        every = Counter((shard, number) for shard in shards for number in range(lengths[shard]))
        assert [place.epoch for place in own] == sorted(place.epoch for place in own)
        for epoch in range(own[-1].epoch):
            assert Counter(place[1:] for place in own if place.epoch == epoch) == every
    for step in range(2000):
        assert len({of_shard[place.shard] for place in places[step * run : (step + 1) * run]}) == 1 or run == 1
    if run == 1:
        few = [of_shard[place.shard] for place in places[:100]]
        assert len(set(few)) == len(sets), "sets are mixed, not one after another"


def test_a_substitute_is_of_the_same_set() -> None:
    order, sets, _, _ = weighted(3, 1)
    for position in range(200):
        shard = order.place(position).shard
        (own,) = [shards for shards in sets if shard in shards]
        assert all(order.substitute(position, attempt).shard in own for attempt in range(1, 5))
