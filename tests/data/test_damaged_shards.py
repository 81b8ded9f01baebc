"""Shards that are cut off, unreadable, changed or not there."""

from __future__ import annotations

import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from streams import Write, keys_in, stream_of, take

from distill_core.data.shards import check
from distill_core.data.stream import Failure
from distill_core.errors import DataError


def cut(shard: Path, keep: float) -> None:
    data = shard.read_bytes()
    shard.write_bytes(data[: int(len(data.rstrip(b"\0")) * keep)])


def test_the_rest_of_a_truncated_shard_is_passed_over(tmp_path: Path, write_shards: Write) -> None:
    """Catches an error that stops training, a loss without a word, and a resume that stumbles over the cut."""
    paths = write_shards(tmp_path, 2, 8)
    cut(paths[1], 0.55)
    check([str(path) for path in paths])
    stream = stream_of(paths, shuffle=1)
    whole = take(stream, 30)
    first = Counter(item.key for item in whole if item.views["epoch"][0].data == 0)
    assert {key: first[key] for key in keys_in(paths[:1])} == dict.fromkeys(keys_in(paths[:1]), 1)
    others = sorted(key for key in first if key.startswith("train-1-"))
    assert others == [f"train-1-{j}" for j in range(len(others))]
    assert 2 <= len(others) < 8
    (skip,) = [skip for item in whole[:20] for skip in item.skipped][:1]
    assert skip.url == str(paths[1])
    assert str(paths[1]) in skip.reason
    for done in range(1, 20):
        stream = stream_of(paths, shuffle=1)
        take(stream, done)
        resumed = stream_of(paths, shuffle=1)
        resumed.load_state_dict(stream.state_dict())
        assert [item.key for item in take(resumed, 5)] == [item.key for item in whole[done : done + 5]]


def test_a_cut_inside_a_tar_header_is_told(tmp_path: Path, write_shards: Write) -> None:
    """tarfile takes it for the end of the shard; catches a loss without a word."""
    (path,) = write_shards(tmp_path, 1, 8)
    with tarfile.open(path) as tar:
        header = tar.getmember("train-0-5.png").offset
    path.write_bytes(path.read_bytes()[: header + 100])
    items = take(stream_of([path], shuffle=1), 12)
    assert {item.key for item in items} == {f"train-0-{j}" for j in range(5)}
    (skip,) = [skip for item in items[:8] for skip in item.skipped][:1]
    assert skip.url == str(path)
    assert "cut off" in skip.reason


@pytest.mark.parametrize("damage", ["missing", "zero bytes", "no entries", "not a tar"])
def test_shards_that_cannot_be_read_are_named(tmp_path: Path, write_shards: Write, damage: str) -> None:
    """Both before training (`check`) and when a shard goes bad later; catches errors without the shard's name."""
    paths = write_shards(tmp_path, 2, 3)
    broken = paths[1]
    if damage == "missing":
        broken.unlink()
    elif damage == "zero bytes":
        broken.write_bytes(b"")
    elif damage == "no entries":
        with tarfile.open(broken, "w"):
            pass
    else:
        broken.write_bytes(b"this is no tar file" * 100)
    said = {
        "missing": "1 of 2 shards do not exist",
        "zero bytes": "the shard is empty",
        "no entries": "the shard is empty",
        "not a tar": "not a readable tar file",
    }[damage]
    with pytest.raises(DataError, match=said) as error:
        check([str(path) for path in paths])
    assert str(broken) in str(error.value)
    assert str(paths[0]) not in str(error.value)
    assert "\n" not in str(error.value)
    found = list(islice(iter(stream_of(paths)), 20))
    assert isinstance(found[-1], Failure)
    assert str(broken) in found[-1].message
    assert "\n" not in found[-1].message


def test_a_changed_data_set_is_refused(tmp_path: Path, write_shards: Write) -> None:
    """Catches a resume on other shards than the run was started on."""
    paths = write_shards(tmp_path, 3, 6)
    stream = stream_of(paths)
    take(stream, 4)
    with pytest.raises(DataError, match=r"3 shards and data\.source now names 2"):
        stream_of(paths[:2]).load_state_dict(stream.state_dict())
    state = stream.state_dict()
    write_shards(tmp_path, 3, 1)
    resumed = stream_of(paths)
    resumed.load_state_dict(state)
    (failure,) = islice(iter(resumed), 2)
    assert isinstance(failure, Failure)
    assert "it has changed" in failure.message


def test_no_shards_at_all() -> None:
    with pytest.raises(DataError, match="names none"):
        check([])
