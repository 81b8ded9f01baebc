"""The stream of samples: once an epoch each, exact state, and what it does with data that cannot be used."""

from __future__ import annotations

import itertools
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from streams import Write, epochs_of, keys_in, stream_of, take

import distill_core.data.stream
from distill_core.batch import Sample, View
from distill_core.data.stream import Failure, Item, SampleViews, ShardStream, unseen
from distill_core.errors import BadSample
from distill_core.registry import Registry


class OneOf:
    """Stands for one loader worker of several, without its process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __call__(self, worker: int, workers: int) -> None:
        info = SimpleNamespace(id=worker, num_workers=workers) if workers else None
        self.monkeypatch.setattr(distill_core.data.stream, "get_worker_info", lambda: info)


@pytest.fixture
def be_worker(monkeypatch: pytest.MonkeyPatch) -> OneOf:
    return OneOf(monkeypatch)


def sample_views(registry: Registry, seed: int = 0) -> SampleViews:
    image, text = registry.get("augmentation", "multi_crop").cls, registry.get("augmentation", "text_crop").cls
    small = {"size": 16, "local_size": 8, "global": 2, "local": 1}
    return SampleViews(
        {
            "image": image(image.Config.model_validate(small)),
            "text": text(text.Config.model_validate({"global": 2, "local": 2})),
        },
        seed,
    )


def same_views(a: Mapping[str, list[View]], b: Mapping[str, list[View]]) -> bool:
    def flat(views: Mapping[str, list[View]]) -> list[Any]:
        return [
            (name, v.role, v.data.tolist() if isinstance(v.data, torch.Tensor) else v.data)
            for name in sorted(views)
            for v in views[name]
        ]

    return flat(a) == flat(b)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("shards", [1, 2, 7])
def test_every_sample_once_an_epoch(
    tmp_path: Path, write_shards: Write, be_worker: OneOf, shards: int, workers: int, world: int
) -> None:
    """Catches samples lost or repeated where shards are dealt, where a few shards are shared out, and in the buffer."""
    paths = write_shards(tmp_path, shards, 7)
    epochs: list[list[str]] = [[], [], []]
    for rank in range(world):
        for worker in range(max(workers, 1)):
            be_worker(worker, workers)
            for all_, mine in zip(epochs, epochs_of(stream_of(paths, rank=rank, world=world), 3), strict=True):
                all_ += mine
    for epoch in epochs:
        assert Counter(epoch) == Counter(keys_in(paths))


def test_shuffled_and_different_each_epoch(tmp_path: Path, write_shards: Write) -> None:
    """Catches an epoch in the shards' order, the same order again, and a seed that changes nothing."""
    paths = write_shards(tmp_path, 4, 6)
    first, second = epochs_of(stream_of(paths), 2)
    assert first != second
    assert keys_in(paths) not in (first, second)
    assert epochs_of(stream_of(paths, seed=4), 1)[0] != first
    order = [[key for key in epoch if key.startswith("train-2-")] for epoch in (first, second)]
    assert order[0] != sorted(order[0]) or order[1] != sorted(order[1]), "samples of one shard stay in order"
    shards = [
        list(dict.fromkeys(key.rsplit("-", 1)[0] for key in epoch))
        for epoch in epochs_of(stream_of(paths, shuffle=1), 4)
    ]
    assert len({tuple(order) for order in shards}) > 1, "without a buffer the shards themselves must still be shuffled"


def test_state_is_plain_integers_and_small(tmp_path: Path, write_shards: Write, registry: Registry) -> None:
    """Catches pixels or texts of the buffer in the state."""
    stream = stream_of(write_shards(tmp_path, 3, 6), sample_views(registry), shuffle=8)
    items = iter(stream)
    for _ in range(5):
        next(items)

    def only_integers(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and only_integers(part) for key, part in value.items())
        if isinstance(value, list):
            return all(only_integers(part) for part in value)
        return type(value) is int

    state = stream.state_dict()
    assert only_integers(state)
    assert len(json.dumps(state)) < 400
    assert len(state["waiting"]) == 2 * 7, "the buffer of 8 holds 7 references after a pick"


@pytest.mark.parametrize(("worker", "workers", "shards"), [(0, 0, 3), (1, 2, 3), (1, 3, 2)])
def test_resumes_from_any_state(
    tmp_path: Path, write_shards: Write, registry: Registry, be_worker: OneOf, worker: int, workers: int, shards: int
) -> None:
    """Items after a resume are those that would have come: mid-epoch, while the buffer drains, at the epoch's end.

    Catches any state that is not saved (picks drawn, buffered references, place in a shard), and views that depend on
    what was read before.
    """
    paths = write_shards(tmp_path, shards, 7)
    be_worker(worker, workers)
    views = sample_views(registry)
    whole, states = [], []
    stream = stream_of(paths, views)
    items = iter(stream)
    states.append(json.dumps(stream.state_dict()))
    for _ in range(30):
        whole.append(next(items))
        states.append(json.dumps(stream.state_dict()))
    kinds = {"drains": 0, "end": 0, "second epoch": 0}
    for done, text in enumerate(states[:-4]):
        state = json.loads(text)
        left = 0 if workers else state["position"] == shards
        kinds["drains"] += bool(left and state["waiting"])
        kinds["end"] += bool(left and not state["waiting"])
        kinds["second epoch"] += state["epoch"] == 1
        resumed = stream_of(paths, views)
        resumed.load_state_dict(state)
        for expected, item in zip(whole[done:], take(resumed, min(8, 30 - done)), strict=False):
            assert isinstance(expected, Item)
            assert item.key == expected.key, f"after {done} items"
            assert same_views(item.views, expected.views), f"after {done} items"
    assert kinds["second epoch"] > 0
    if not workers:
        assert min(kinds.values()) > 0, kinds


def test_state_can_be_saved_again_after_a_resume(tmp_path: Path, write_shards: Write) -> None:
    """Catches a resumed stream whose own state forgets what it restored: a second resume must be exact too."""
    paths = write_shards(tmp_path, 3, 5)
    whole = [item.key for item in take(stream_of(paths), 25)]
    keys: list[str] = []
    state: dict[str, Any] | None = None
    while len(keys) < 25:
        stream = stream_of(paths)
        if state is not None:
            stream.load_state_dict(state)
        keys += [item.key for item in take(stream, 1)]
        state = json.loads(json.dumps(stream.state_dict()))
    assert keys == whole


def test_views_depend_on_seed_epoch_and_key_alone(
    tmp_path: Path, write_shards: Write, registry: Registry, be_worker: OneOf
) -> None:
    """Catches randomness from a worker's or a process's history, and the same views every epoch or for all keys."""
    paths = write_shards(tmp_path, 2, 6)
    views = sample_views(registry)

    def by_key(stream: ShardStream, epochs: int) -> dict[tuple[int, str], Any]:
        found = {}
        items = iter(stream)
        while True:
            item = next(items)
            assert isinstance(item, Item)
            if stream.epoch == epochs:
                return found
            found[stream.epoch, item.key] = item.views

    be_worker(0, 0)
    alone = by_key(stream_of(paths, views, shuffle=1), 2)
    np.random.seed(5)
    torch.manual_seed(5)
    be_worker(1, 2)
    other = by_key(stream_of(paths, views, shuffle=9, seed=77), 2)  # the stream's seed orders; the views' own decides
    assert len(alone) == 24
    assert len(other) == 12
    for at, found in other.items():
        assert same_views(found, alone[at]), at
    for _, key in list(alone)[:12]:
        assert not same_views(alone[0, key], alone[1, key])
    sample = {"__key__": "a", "__url__": "s.tar", **_fields(paths[0])}
    renamed = {**sample, "__key__": "b"}
    assert not same_views(views(sample, 0), views(renamed, 0))
    assert not same_views(views(sample, 0), sample_views(registry, seed=1)(sample, 0))


def _fields(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        members = tar.getmembers()[:2]
        return {m.name.rsplit(".", 1)[1]: tar.extractfile(m).read() for m in members}  # type: ignore[union-attr]


def test_bad_samples_are_passed_over_and_reported(tmp_path: Path, write_shards: Write, registry: Registry) -> None:
    """Catches a bad sample that stops the stream, is handed on, or is lost without its key, shard and reason."""
    fields = _fields(write_shards(tmp_path / "model", 1, 1)[0])
    bad = {
        (0, 1): {"png": b"\x89PNG\r\n\x1a\n nothing more", "txt": fields["txt"]},
        (0, 3): {"png": fields["png"], "json": b'{"captions": ["a bird"'},
        (1, 0): {"png": fields["png"], "json": b'{"captions": []}'},
        (1, 2): {"txt": fields["txt"]},
        (1, 3): {"png": fields["png"], "txt": b"\xff\xfe\xff"},
        (1, 4): {"png": fields["png"][: len(fields["png"]) // 2], "txt": fields["txt"]},
        (0, 4): {"png": fields["png"], "json": b"[1, 2]"},
    }
    paths = write_shards(tmp_path, 2, 6, replace=bad)
    stream = stream_of(paths, sample_views(registry), shuffle=3)
    items, keys = [], []
    for item in stream:
        assert isinstance(item, Item)
        if stream.epoch == 2:
            break
        items.append(item)
        keys.append(item.key)
    expected = {f"train-{i}-{j}" for i, j in bad}
    assert Counter(keys) == Counter({key: 2 for key in keys_in(paths) if key not in expected})
    skipped = [skip for item in items for skip in item.skipped]
    # those at the end of the second epoch travel with the first item of the third
    skipped += item.skipped
    counted = Counter(skip.key for skip in skipped)
    assert set(counted) == expected
    assert all(count >= 2 for count in counted.values()), counted
    reasons = {skip.key: skip.reason for skip in skipped}
    assert "not a readable picture" in reasons["train-0-1"]
    assert "not readable json" in reasons["train-0-3"]
    assert "no caption" in reasons["train-1-0"]
    assert "no picture" in reasons["train-1-2"]
    assert "UTF-8" in reasons["train-1-3"]
    assert "not a readable picture" in reasons["train-1-4"]
    assert "not an object" in reasons["train-0-4"]
    assert {skip.url for skip in skipped} == {str(path) for path in paths}


def test_all_samples_bad_is_one_error(tmp_path: Path, write_shards: Write, registry: Registry) -> None:
    """Catches a stream that turns for ever when nothing can be used."""
    paths = write_shards(
        tmp_path, 2, 3, replace={(i, j): {"png": b"no", "txt": b"a"} for i in (0, 1) for j in range(3)}
    )
    found = list(islice(iter(stream_of(paths, sample_views(registry))), 3))
    assert len(found) == 1
    assert isinstance(found[0], Failure)
    assert re.search(r"no sample can be used: the last 6 .*train-\d-\d.*not a readable picture", found[0].message)


def test_one_bad_shard_of_one_worker_does_not_stop_it(
    tmp_path: Path, write_shards: Write, registry: Registry, be_worker: OneOf
) -> None:
    """A worker whose only shard of this epoch is all bad goes on: the other workers' shards are good.

    Catches a count of bad samples that takes one worker's share for the whole data.
    """
    paths = write_shards(tmp_path, 3, 4, replace={(1, j): {"png": b"no", "txt": b"a"} for j in range(4)})
    met = 0
    for worker in range(3):
        be_worker(worker, 3)
        items = take(stream_of(paths, sample_views(registry)), 12)
        assert not any(item.key.startswith("train-1-") for item in items)
        met += sum(len(item.skipped) for item in items)
    assert met >= 4, "no worker was dealt the bad shard: this test shows nothing"


@pytest.mark.parametrize("world", [1, 3])
def test_a_repeated_shard_has_other_views(tmp_path: Path, write_shards: Write, registry: Registry, world: int) -> None:
    """As often as it is listed; the first place keeps the views of a shard that is listed once.

    Catches copies that are the same bit for bit within an epoch, which a contrastive loss pushes apart.
    """
    paths = write_shards(tmp_path, 2, 3)
    views = sample_views(registry)

    def drawn(shards: list[Path]) -> dict[str, list[Item]]:
        found: dict[str, list[Item]] = {}
        for rank in range(world):
            stream = stream_of(shards, views, rank=rank, world=world)
            for item in stream:
                assert isinstance(item, Item)
                if stream.epoch:
                    break
                found.setdefault(item.key, []).append(item)
        return found

    once, often = drawn(paths), drawn([paths[0], paths[1], paths[0], paths[0]])
    for key, (alone,) in once.items():
        copies = often[key]
        assert len(copies) == (3 if key.startswith("train-0-") else 1)
        assert sum(same_views(copy.views, alone.views) and copy.seed == alone.seed for copy in copies) == 1
        for copy, other in itertools.combinations(copies, 2):
            assert not same_views(copy.views, other.views)
            assert copy.seed != other.seed


@pytest.mark.parametrize(("shards", "workers"), [(64, 48), (7, 3), (5, 4), (6, 3), (2, 3), (9, 8)])
def test_the_share_that_a_pass_does_not_see(
    tmp_path: Path, write_shards: Write, be_worker: OneOf, shards: int, workers: int
) -> None:
    """Counted in streams that take turns, as batches do, averaged over seeds."""
    paths = write_shards(tmp_path, shards, 12)
    shares = []
    for seed in range(4):
        seen = []
        for worker in range(workers):
            be_worker(worker, workers)
            seen += [item.key for item in take(stream_of(paths, shuffle=1, seed=seed), shards * 12 // workers)]
        shares.append(1 - len(set(seen)) / (shards * 12))
    expected = unseen(shards, workers)
    assert (expected > 0) == (shards > workers and shards % workers > 0)
    assert abs(np.mean(shares) - expected) < 0.05
    assert round(unseen(64, 48), 2) == 0.14


class Picky(SampleViews):
    """Views of samples whose key a function allows."""

    def __init__(self, usable: Callable[[str], bool]) -> None:
        super().__init__({}, seed=0)
        self.usable = usable

    def __call__(self, sample: Sample, epoch: int, repeat: int = 0) -> dict[str, list[View]]:
        if not self.usable(sample["__key__"]):
            raise BadSample("not this one")
        return {"epoch": [View(epoch)]}


def stopped(stream: ShardStream, most: int) -> tuple[int, str | None]:
    """How many items came, of `most`, and the failure."""
    for count, item in enumerate(islice(iter(stream), most)):
        if isinstance(item, Failure):
            return count, item.message
    return most, None


def test_the_run_stops_past_a_tolerance_of_bad_samples(tmp_path: Path, write_shards: Write) -> None:
    """One in four is bad: 1,000 are looked at before that is judged, over passes where there are few."""
    paths = write_shards(tmp_path, 2, 60)
    picky = Picky(lambda key: int(key.rsplit("-", 1)[1]) % 4 != 0)
    assert stopped(stream_of(paths, picky, max_bad_fraction=0.3), 2000) == (2000, None)
    assert stopped(stream_of(paths, picky, max_bad_fraction=1.0), 2000) == (2000, None)
    count, message = stopped(stream_of(paths, picky, max_bad_fraction=0.2), 2000)
    assert 550 <= count <= 650, "200 bad ones are reached after 600 good ones"
    assert message is not None
    assert re.search(r"too many samples cannot be used: 201, and 6\d\d can, .*\(0.2\) allows 200; the last: ", message)
    assert "not this one" in message
    count, message = stopped(stream_of(paths, picky, max_bad_fraction=0.0), 2000)
    assert count < 10
    assert message is not None


def test_counts_of_bad_samples_survive_a_resume(tmp_path: Path, write_shards: Write) -> None:
    """Catches a run that is stopped often and so never reaches its tolerance."""
    paths = write_shards(tmp_path, 2, 60)
    picky = Picky(lambda key: int(key.rsplit("-", 1)[1]) % 4 != 0)
    whole, _ = stopped(stream_of(paths, picky, max_bad_fraction=0.2), 2000)
    state, came = stream_of(paths, picky).state_dict(), 0
    while True:
        stream = stream_of(paths, picky, max_bad_fraction=0.2)
        stream.load_state_dict(state)
        count, message = stopped(stream, 100)
        came += count
        if message is not None:
            break
        state = stream.state_dict()
    assert came == whole


@pytest.mark.slow
def test_the_run_stops_past_a_tolerance_of_unreadable_shards(tmp_path: Path, write_shards: Write) -> None:
    """Catches shards that are missing for good while the run trains on half of its data."""
    paths = write_shards(tmp_path, 8, 100)
    away = paths[2]
    away.unlink()
    assert stopped(stream_of(paths, max_bad_fraction=0.15), 6000) == (6000, None)
    count, message = stopped(stream_of(paths, max_bad_fraction=0.1), 6000)
    assert 700 <= count < 1400
    assert message is not None
    assert re.search(r"too many samples cannot be used: 200, and \d+ can", message)
    assert str(away) in message
    for path in paths:
        path.unlink(missing_ok=True)
    assert stopped(stream_of(paths, max_bad_fraction=1.0), 10)[0] == 0, "no run goes on with nothing"


def test_streams_of_few_shards_stay_in_step_where_one_fails(
    tmp_path: Path, write_shards: Write, be_worker: OneOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three streams share two shards; from the second epoch on one of them cannot open the first shard for a while.

    Catches samples of the other shard that come twice or never, since the streams count from different places.
    """
    paths = write_shards(tmp_path, 2, 7)
    epochs: list[list[str]] = [[], [], []]
    for worker in range(3):
        be_worker(worker, 3)
        stream = stream_of(paths)
        for item in stream:
            assert isinstance(item, Item)
            epoch = item.views["epoch"][0].data
            if epoch == 3:
                break
            epochs[epoch].append(item.key)
            if worker == 1 and epoch == 1:
                stream.shards[0] = str(tmp_path / "gone.tar")
            elif worker == 1 and epoch == 2:
                stream.shards[0] = str(paths[0])
    assert Counter(epochs[0]) == Counter(epochs[0]) == Counter(keys_in(paths))
    for epoch in epochs:
        of_second = [key for key in epoch if key.startswith("train-1-")]
        assert Counter(of_second) == Counter(keys_in(paths[1:]))


def test_small_shards_are_shared_out_evenly(tmp_path: Path, write_shards: Write, be_worker: OneOf) -> None:
    """Catches streams that get nothing because each shard by itself has fewer samples than there are streams."""
    paths = write_shards(tmp_path, 4, 3)
    counts = []
    for worker in range(6):
        be_worker(worker, 6)
        counts.append(len(epochs_of(stream_of(paths), 1)[0]))
    assert counts == [2] * 6


def test_fewer_samples_than_streams(tmp_path: Path, write_shards: Write, be_worker: OneOf) -> None:
    """Catches the claim that the shards are empty when it is one worker that gets no sample."""
    paths = write_shards(tmp_path, 1, 2)
    be_worker(2, 3)
    (failure,) = islice(iter(stream_of(paths)), 2)
    assert isinstance(failure, Failure)
    assert "data.workers" in failure.message
    assert "3" in failure.message
