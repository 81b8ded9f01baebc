"""The same batches on any number of ranks and workers, and after any stop that changes it."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiers import drawn_cases

import distill_core.data.loader
from distill_core.batch import Batch, Sample, Skipped, View
from distill_core.data.batches import BatchReader, Item, SampleViews
from distill_core.data.lengths import Lengths, measure
from distill_core.data.loader import Loader
from distill_core.data.order import ShuffledOrder
from distill_core.data.shard import Patience, Shard, ShardError
from distill_core.data.tar_shards import TarShard
from distill_core.errors import BadSample, DataError
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry


class Rows(Shard):
    """A shard of another layout: samples that are made when they are asked for."""

    def __init__(self, name: str, length: int) -> None:
        self.name, self.length = name, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Sample:
        return {"__key__": f"{self.name}-{number}", "__url__": self.name}


class Views(SampleViews):
    """The epoch, in place of views; some samples are bad."""

    def __init__(self, bad: frozenset[str]) -> None:
        super().__init__({}, 0)
        self.bad = bad

    def __call__(self, sample: Sample, epoch: int, repeat: tuple[int, ...] = ()) -> dict[str, list[View]]:
        if sample["__key__"] in self.bad:
            raise BadSample("bad")
        return {"epoch": [View((epoch, *repeat))]}


Row = tuple[str, int, Any, tuple[Skipped, ...]]


def rows_of(items: list[Item]) -> list[Row]:
    return [(item.key, item.seed, item.views["epoch"][0].data, tuple(item.skipped)) for item in items]


def tar_shard(path: Path, length: int) -> TarShard:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(length):
            tar.addfile(tarfile.TarInfo(f"{path.stem}-{number}.txt"), BytesIO())
    return TarShard(path)


def batches(
    reader: BatchReader, start: int, size: int, world: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[Row]]:
    """Step by step, the rows of the joined batch of all ranks, each of which has several workers."""
    ranks: list[list[Iterator[Any]]] = []
    for rank in range(world):
        made = distill_core.data.loader._Batches(reader, start, size, rank, world)
        ranks.append([])
        for worker in range(workers):
            info = SimpleNamespace(id=worker, num_workers=workers)
            monkeypatch.setattr(distill_core.data.loader, "get_worker_info", lambda info=info: info)
            iterator = iter(made)
            first = next(iterator)  # a generator asks for its worker when it is first asked
            ranks[-1].append(iter_with(first, iterator))
    step = 0
    while True:
        yield [row for rank in ranks for row in rows_of(next(rank[step % workers]))]
        step += 1


def iter_with(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


@pytest.mark.parametrize("case", drawn_cases(240, fast=40))
def test_stops_that_change_the_width_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: int) -> None:
    """Layouts, lengths, streams, shuffling, bad samples, batch sizes, ranks, workers and stops are drawn. Catches a
    sample lost, repeated or moved by another number of ranks or workers, at any point of the run."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(case)
    lengths = [int(n) for n in rng.integers(1, int(rng.integers(2, 20)), int(rng.integers(1, 9)))]
    tars = rng.random() < 0.5
    shards: list[Shard] = [
        tar_shard(tmp_path / "shards" / f"{i}.tar", length) if tars else Rows(str(i), length)
        for i, length in enumerate(lengths)
    ]
    total = sum(lengths)
    keys = [f"{i}-{n}" for i, length in enumerate(lengths) for n in range(length)]
    bad = frozenset(key for key in keys if rng.random() < 0.1) if total > 1 else frozenset()
    if len(bad) == total:
        bad = frozenset()
    options: dict[str, Any] = {
        "seed": case,
        "streams": int(rng.choice([1, 3, 16, 256])),
        "shuffle": int(rng.choice([0, 1, 10, 1000])),
    }
    size = int(rng.choice([1, 2, 4, 6, 12]))
    widths = [(w, n) for w in range(1, 5) if size % w == 0 for n in (1, 2, 3, 5)]

    def reader() -> BatchReader:
        lengths = measure(shards, Patience()).samples
        order = ShuffledOrder(lengths, **options)
        return BatchReader(shards, lengths, order, Views(bad), lambda items, _: items, patience=Patience())  # type: ignore[arg-type, return-value]

    steps = max(6, 3 * total // size + 1)
    expected = list(islice(batches(reader(), 0, size, 1, 1, monkeypatch), steps))
    came: list[list[Row]] = []
    while len(came) < steps:
        world, workers = widths[int(rng.integers(len(widths)))]
        until = int(rng.integers(1, 5))
        came += islice(batches(reader(), len(came) * size, size, world, workers, monkeypatch), until)
    assert came[:steps] == expected
    rows = [row for batch in expected for row in batch]
    for epoch in range(len(rows) // total):
        due = rows[epoch * total : (epoch + 1) * total]
        seen = Counter([row[0] if not row[3] else row[3][0].key for row in due])
        assert seen == Counter(keys), "each sample is due once a pass"
        assert {row[0] for row in due} & bad == set()


def keys_of(loader: Loader, count: int) -> list[list[str]]:
    return [batch.keys for batch in islice(loader, count)]


@pytest.mark.slow
def test_a_loader_continues_with_other_workers_and_ranks(tiny_recipe: Path, registry: Registry) -> None:
    """With processes: stopped while batches are prefetched."""
    shards: list[Shard] = [TarShard(path) for path in sorted((tiny_recipe.parent / "shards").glob("train-*.tar"))]
    lengths = measure(shards, Patience())

    def loader(workers: int, size: int, rank: int = 0, world: int = 1) -> Loader:
        recipe = load_recipe(
            tiny_recipe, registry=registry, overrides=[f"data.workers={workers}", f"data.batch_size={size}"]
        )
        return Loader(recipe, shards, lengths, rank=rank, world=world)

    expected = keys_of(loader(0, 6), 12)
    first = loader(3, 6)
    came = keys_of(first, 5)
    state = first.state_dict()
    assert state["position"] == 30
    halves = []
    for rank in range(2):
        one = loader(2, 3, rank, 2)
        one.load_state_dict(state)
        halves.append(keys_of(one, 4))
        later = one.state_dict()
    came += [a + b for a, b in zip(*halves, strict=True)]
    last = loader(1, 6)
    last.load_state_dict(later)
    came += keys_of(last, 3)
    assert came == expected


def test_ranks_that_cannot_share_a_batch_are_refused(tiny_recipe: Path, registry: Registry) -> None:
    shards: list[Shard] = [Rows("a", 9), Rows("b", 9)]
    recipe = load_recipe(tiny_recipe, registry=registry)
    state = Loader(recipe, shards, Lengths([9, 9])).state_dict()
    assert state["batch_size"] == 4
    with pytest.raises(DataError, match="batches of 4 samples cannot be shared by 3 ranks"):
        Loader(recipe, shards, Lengths([9, 9]), world=3).load_state_dict(state)


def test_other_data_is_refused(tiny_recipe: Path, registry: Registry) -> None:
    """Catches a resume on other shards than the run was started on."""
    recipe = load_recipe(tiny_recipe, registry=registry)

    def loader(**lengths: int) -> Loader:
        return Loader(recipe, [Rows(name, n) for name, n in lengths.items()], Lengths(list(lengths.values())))

    state = loader(a=9, b=9, c=4).state_dict()
    loader(a=9, b=9, c=4).load_state_dict(state)
    for other, said in (
        (loader(a=9, b=9), "started on 3 shards and data.source now names 2"),
        (loader(b=9, a=9, c=4), "names other shards than the run was started on, or in another order"),
        (loader(a=9, b=8, c=4), "b: has 8 samples, and had 9 when the run began"),
    ):
        with pytest.raises(DataError, match=said):
            other.load_state_dict(state)


def test_a_shard_of_assumed_length_may_come_back_with_another(tiny_recipe: Path, registry: Registry) -> None:
    """One that could not be opened when the run began, and one that cannot be now."""
    recipe = load_recipe(tiny_recipe, registry=registry)
    shards: list[Shard] = [Rows("a", 9), Rows("b", 5), Rows("c", 4)]
    state = Loader(recipe, shards, Lengths([9, 9, 4], {1: "away"})).state_dict()
    now = Loader(recipe, shards, Lengths([9, 5, 7], {2: "away"}))
    now.load_state_dict(state)
    assert now.lengths.samples == [9, 9, 4]
    assert now.samples == 22, "the order is that of the run's start"
    assert set(now.lengths.unopened) == {1, 2}


def judged(loader: Loader, monkeypatch: pytest.MonkeyPatch, steps: int) -> tuple[int, str | None]:
    """How many batches pass, one sample in four of which is bad."""
    batch = Batch({}, list("abcd"), [Skipped("k", "u", "not this one")])
    monkeypatch.setattr(loader, "_workers", SimpleNamespace(take=lambda seconds: batch))
    for step in range(steps):
        try:
            loader.wait(1.0)
        except DataError as error:
            return step, str(error)
    return steps, None


@pytest.mark.parametrize(("allowed", "stops_after"), [(0.3, None), (1.0, None), (0.2, 249), (0.0, 0)])
def test_the_run_stops_past_a_tolerance_of_bad_samples(
    tiny_recipe: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch, allowed: float, stops_after: int | None
) -> None:
    """1,000 samples are looked at before a quarter of bad ones is judged, over passes and resumes."""
    recipe = load_recipe(tiny_recipe, registry=registry, overrides=[f"data.max_bad_fraction={allowed}"])
    loader = Loader(recipe, [Rows("a", 60), Rows("b", 60)], Lengths([60, 60]))
    steps, message = judged(loader, monkeypatch, 100)
    if message is None:
        state, loader = loader.state_dict(), Loader(recipe, [Rows("a", 60), Rows("b", 60)], Lengths([60, 60]))
        loader.load_state_dict(state)
        more, message = judged(loader, monkeypatch, 400)
        steps += more
    assert steps == (500 if stops_after is None else stops_after)
    if stops_after is not None:
        assert message is not None
        assert "too many samples cannot be used" in message
        assert "not this one" in message


class Away(Rows):
    """A shard that is never there."""

    def __getitem__(self, number: int) -> Sample:
        raise ShardError(f"{self.name}: cannot be read: it is away")


def test_whole_shards_count_against_the_tolerance(tiny_recipe: Path, registry: Registry) -> None:
    """One of eight is missing for good: 12.5 %. Catches a run that trains on a part of its data unasked."""
    shards: list[Shard] = [*(Rows(str(i), 100) for i in range(7)), Away("away", 100)]
    order = ShuffledOrder([100] * 8, seed=1, streams=4, shuffle=50)
    reader = BatchReader(shards, [100] * 8, order, Views(frozenset()), _counted, patience=Patience(retries=0))

    def steps_until_stopped(allowed: float) -> int | None:
        recipe = load_recipe(
            tiny_recipe, registry=registry, overrides=[f"data.max_bad_fraction={allowed}", "data.batch_size=50"]
        )
        loader = Loader(recipe, shards, Lengths([100] * 8))
        for step in range(60):
            batch = reader.batch(range(step * 50, step * 50 + 50))
            loader._workers = SimpleNamespace(take=lambda seconds, batch=batch: batch)  # type: ignore[assignment]
            try:
                loader.wait(1.0)
            except DataError as error:
                messages.append(str(error))
                return step
        return None

    messages: list[str] = []
    assert steps_until_stopped(0.25) is None
    stopped = steps_until_stopped(0.05)
    assert stopped is not None
    assert 19 <= stopped <= 21, "after 1,000 samples"
    assert "too many samples cannot be used" in messages[0]


def _counted(items: Sequence[Item], _: Mapping[str, Item]) -> Batch:
    return Batch({}, [item.key for item in items], [skip for item in items for skip in item.skipped])
