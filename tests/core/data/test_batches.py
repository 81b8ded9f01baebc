"""What a loader's worker makes of positions: samples, their views, and what it does with data that cannot be used."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reading import Write, keys_in, passes, reader_of, skipped_in

from distill_core.batch import View
from distill_core.data.batches import Failure, Item, SampleViews
from distill_core.errors import DataError
from distill_core.registry import Registry


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


def plain(views: Mapping[str, list[View]]) -> list[Any]:
    return [
        (name, view.role, view.data.tolist() if isinstance(view.data, torch.Tensor) else str(view.data))
        for name in sorted(views)
        for view in views[name]
    ]


def _fields(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        members = tar.getmembers()[:2]
        return {m.name.rsplit(".", 1)[1]: tar.extractfile(m).read() for m in members}  # type: ignore[union-attr]


def test_views_depend_on_seed_epoch_and_key_alone(tmp_path: Path, write_shards: Write, registry: Registry) -> None:
    """Catches randomness from a worker's or a process's history, and the same views every epoch or for all keys."""
    paths = write_shards(tmp_path, 2, 6)
    views = sample_views(registry)

    def by_key(**options: int) -> dict[tuple[int, str], Any]:
        drawn = passes(reader_of(paths, views, **options), 2)
        return {(epoch, item.key): plain(item.views) for epoch, items in enumerate(drawn) for item in items}

    once = by_key(shuffle=1)
    np.random.seed(5)
    torch.manual_seed(5)
    assert by_key(shuffle=9, seed=77, streams=2) == once, "the order's seed orders; the views' own decides"
    assert len(once) == 24
    for _, key in list(once)[:12]:
        assert once[0, key] != once[1, key]
    sample = {"__key__": "a", "__url__": "s.tar", **_fields(paths[0])}
    assert plain(views(sample, 0)) != plain(views({**sample, "__key__": "b"}, 0))
    assert plain(views(sample, 0)) != plain(sample_views(registry, seed=1)(sample, 0))


def test_bad_samples_are_replaced_and_reported(tmp_path: Path, write_shards: Write, registry: Registry) -> None:
    """Catches a bad sample that stops the run, is handed on, is counted where it only would have taken another's place,
    or is lost without its key, shard and reason."""
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
    for items in passes(reader_of(paths, sample_views(registry)), 3):
        skipped = skipped_in(items)
        assert Counter(skip.key for skip in skipped) == {f"train-{i}-{j}": 1 for i, j in bad}
        counts = Counter(item.key for item in items)
        assert set(counts) == set(keys_in(paths)) - {skip.key for skip in skipped}
        assert sum(counts.values()) == 12
        twice = [item for item in items if counts[item.key] > 1]
        assert len({str(plain(item.views)) for item in twice}) == len(twice), "a substitute has views of its own"
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
    """Catches a worker that turns for ever when nothing can be used."""
    paths = write_shards(
        tmp_path, 2, 3, replace={(i, j): {"png": b"no", "txt": b"a"} for i in (0, 1) for j in range(3)}
    )
    reader = reader_of(paths, sample_views(registry))
    failure = reader.batch(range(4))
    assert isinstance(failure, Failure)
    assert "no sample can be used: 1000 in a row were tried, the first one sample 'train-" in failure.message
    assert "not a readable picture" in failure.message


def test_a_repeated_shard_has_other_views(tmp_path: Path, write_shards: Write, registry: Registry) -> None:
    """As often as it is listed; the first place keeps the views of a shard that is listed once.

    Catches copies that are the same bit for bit within an epoch, which a contrastive loss pushes apart.
    """
    paths = write_shards(tmp_path, 2, 3)
    views = sample_views(registry)
    (alone,) = passes(reader_of(paths, views))
    (items,) = passes(reader_of([*paths, paths[0], paths[0]], views))
    by_key: dict[str, list[Item]] = {}
    for item in items:
        by_key.setdefault(item.key, []).append(item)
    assert Counter(len(copies) for copies in by_key.values()) == {3: 3, 1: 3}
    for item in alone:
        drawn = [plain(copy.views) for copy in by_key[item.key]]
        assert drawn.count(plain(item.views)) == 1
        assert len({str(one) for one in drawn}) == len(drawn)
        assert len({copy.seed for copy in by_key[item.key]}) == len(drawn)


def test_a_shard_whose_length_has_changed_is_not_read(tmp_path: Path, write_shards: Write) -> None:
    """Catches sample numbers that mean other samples than when the run began."""
    paths = write_shards(tmp_path, 3, 4)
    reader = reader_of(paths)
    for path in write_shards(tmp_path, 2, 3):
        assert path in paths
    (items,) = passes(reader)
    assert {item.key for item in items} == {f"train-2-{j}" for j in range(4)}
    assert len(skipped_in(items)) == 8
    assert all("has 3 samples now, and had 4 when the run began" in skip.reason for skip in skipped_in(items))


def test_a_bug_of_an_augmentation_is_no_bad_sample(tmp_path: Path, write_shards: Write) -> None:
    class Buggy(SampleViews):
        def __call__(self, sample: Any, epoch: int, repeat: tuple[int, ...] = ()) -> dict[str, list[View]]:
            raise DataError("a bug")

    failure = reader_of(write_shards(tmp_path, 1, 3), Buggy({}, 0)).batch(range(2))
    assert failure == Failure("a bug")
