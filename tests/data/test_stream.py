"""The stream of samples: once an epoch each, exact state, and what it does with data that cannot be used."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from streams import Write, epochs_of, keys_in, stream_of, take

import distill_core.data.stream
from distill_core.data.stream import Failure, Item, SampleViews, ShardStream
from distill_core.registry import Registry
from distill_core.types import View


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
            (name, v.role, v.source, v.data.tolist() if isinstance(v.data, torch.Tensor) else v.data)
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
