"""Shards that are cut off, unreadable, changed or not there."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from faulty_server import Server
from streams import TellEpoch, Write, keys_in, stream_of, take

import distill_core.data.stream
from distill_core.data.shards import Patience, check
from distill_core.data.stream import Failure, Item, ShardStream, digest
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


def test_a_cut_inside_a_tar_header_is_plain(tmp_path: Path, write_shards: Write) -> None:
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
    """Before training (`check`) an error, later a loss that is counted; catches either without the shard's name."""
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
    items = take(stream_of(paths), 9)
    assert {item.key for item in items} == set(keys_in(paths[:1]))
    skipped = [skip for item in items for skip in item.skipped]
    assert 2 <= len(skipped) <= 3, "once a pass"
    assert {(skip.key, skip.url) for skip in skipped} == {("(whole shard)", str(broken))}
    assert all(str(broken) in str(skip) and "\n" not in str(skip) for skip in skipped)
    (failure,) = islice(iter(stream_of(paths[1:])), 2)
    assert isinstance(failure, Failure)
    assert "no shard can be read" in failure.message
    assert str(broken) in failure.message
    assert "\n" not in failure.message


def test_a_shard_that_goes_is_skipped_and_comes_back(tmp_path: Path, write_shards: Write) -> None:
    """Catches a shard removed between two passes that ends the run, or stays away when it is there again."""
    paths = write_shards(tmp_path, 3, 4)
    away = paths[1].with_suffix(".away")
    stream = stream_of(paths, shuffle=1)
    items = iter(stream)
    passes: list[list[str]] = [[], [], []]
    for epoch, keys in enumerate(passes):
        while len(keys) < (8 if epoch == 1 else 12):
            item = next(items)
            assert isinstance(item, Item)
            assert item.views["epoch"][0].data == epoch
            keys.append(item.key)
        if epoch == 0:
            paths[1].rename(away)
        elif epoch == 1:
            away.rename(paths[1])
    assert sorted(passes[0]) == sorted(passes[2]) == sorted(keys_in(paths))
    assert sorted(passes[1]) == sorted(keys_in([paths[0], paths[2]]))


def test_a_shard_that_goes_while_it_is_read(tmp_path: Path, write_shards: Write) -> None:
    """An open file can be read to its end; a resume then finds nothing at its place, nor its samples of the buffer.

    Catches a resume that ends the run, losses that are not named one by one, and other samples that change for it.
    """
    paths = write_shards(tmp_path, 3, 6)
    whole = [item.key for item in take(stream_of(paths), 15)]
    for done in range(1, 15):
        stream = stream_of(paths)
        take(stream, done)
        state = stream.state_dict()
        buffered = {(shard, offset) for shard, offset in stream.waiting}
        open_shard = {int(key.split("-")[1]) for key in whole[done:]} & {shard for shard, _ in buffered}
        for gone in sorted(open_shard):
            away = paths[gone].rename(paths[gone].with_suffix(".away"))
            resumed = stream_of(paths)
            resumed.load_state_dict(state)
            items = take(resumed, 10)
            away.rename(paths[gone])
            first = [item.key for item in items if item.views["epoch"][0].data == 0]
            left = [key for key in whole[done:] if int(key.split("-")[1]) != gone]
            # the shard's samples that the buffer did not hold yet are missed there, so only the set can be the same
            assert set(first) <= {*left, *keys_in(paths)}
            assert not any(key.startswith(f"train-{gone}-") for key in first)
            named = [skip for item in items for skip in item.skipped if skip.key.startswith("(sample")]
            lost = {offset for shard, offset in buffered if shard == gone}
            assert {skip.key for skip in named} == {f"(sample {offset})" for offset in lost}
            assert {skip.url for skip in named} == {str(paths[gone])}
            assert all("No such file" in skip.reason for skip in named)


def test_a_changed_data_set_is_refused(tmp_path: Path, write_shards: Write) -> None:
    """Catches a resume on other shards than the run was started on."""
    paths = write_shards(tmp_path, 3, 6)
    stream = stream_of(paths)
    take(stream, 4)
    others = write_shards(tmp_path, 3, 6, prefix="others")
    for shards, said in (
        (paths[:2], "3 shards and data.source now names 2"),
        ([paths[1], paths[0], paths[2]], "names other shards than the run was started on, or in another order"),
        (others, "names other shards"),
        ([*paths[:2], others[2]], "names other shards"),
    ):
        refusing = stream_of(shards)
        refusing.load_state_dict(stream.state_dict())
        (failure,) = islice(iter(refusing), 2)
        assert isinstance(failure, Failure)
        assert said in failure.message
        assert "\n" not in failure.message
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    elsewhere = [moved / path.name for path in paths]
    for path, other in zip(paths, elsewhere, strict=True):
        other.write_bytes(path.read_bytes())
    resumed = stream_of(elsewhere)
    resumed.load_state_dict(stream.state_dict())
    assert [item.key for item in take(resumed, 20)] == [item.key for item in take(stream_of(paths), 24)][4:]
    state = stream.state_dict()
    write_shards(tmp_path, 3, 1)
    resumed = stream_of(paths)
    resumed.load_state_dict(state)
    (failure,) = islice(iter(resumed), 2)
    assert isinstance(failure, Failure)
    assert "it has changed" in failure.message


def test_the_digest_of_names() -> None:
    """Catches one that a moved folder changes, and one that mixes up shards of two folders."""
    a, b = "/data/one/0.tar", "/data/two/0.tar"
    assert digest([a, b]) == digest(["https://host/x/one/0.tar", "https://host/x/two/0.tar"])
    assert digest([a, b]) not in (digest([b, a]), digest([a, a]), digest([a]), digest([b, b]))
    assert digest([a]) == digest([b]) == digest(["0.tar"]), "one shard alone has its name"
    assert digest(["/d/1.tar", "/d/10.tar"]) == digest(["1.tar", "10.tar"]) != digest(["/d/1.tar", "/d/11.tar"])


def test_no_shards_at_all() -> None:
    with pytest.raises(DataError, match="names none"):
        check([])


def damage(path: Path, rng: np.random.Generator) -> str:
    """One of the ways in which a shard is broken for good."""
    how = str(rng.choice(["none", "none", "cut", "bit", "twice", "gone", "name"]))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        contents = [(info.name, tar.extractfile(info).read()) for info in members]  # type: ignore[union-attr]
    if how == "cut":
        path.write_bytes(data[: int(rng.integers(len(data)))])
    elif how == "bit":
        data[int(rng.choice(members).offset) + int(rng.integers(512))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
    elif how == "gone":
        path.unlink()
    elif how != "none":
        at = 2 * int(rng.integers(len(contents) // 2))
        again = contents[at : at + 2] if how == "twice" else [("caf\udce9.png", b"1"), ("caf\udce9.txt", b"2")]
        with tarfile.open(path, "w") as tar:
            for name, content in [*contents[: at + 2], *again, *contents[at + 2 :]]:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return how


def plain(items: list[Item]) -> list[tuple[Any, ...]]:
    return [(item.key, item.seed, item.views["epoch"][0].data, *map(str, item.skipped)) for item in items]


@pytest.mark.slow
@pytest.mark.parametrize("case", range(40))
def test_drawn_damage_neither_changes_a_resume_nor_goes_uncounted(
    tmp_path: Path, write_shards: Write, monkeypatch: pytest.MonkeyPatch, case: int
) -> None:
    """Shards, damage, buffer, workers and stopping points are drawn. All that an undamaged set would give is there, or
    named; and each stop continues as if there had been none, with the same losses."""
    rng = np.random.default_rng(case)
    shards, size, workers = (int(rng.integers(low, high)) for low, high in ((2, 6), (3, 9), (1, 4)))
    paths = write_shards(tmp_path, shards, size)
    expected = set(keys_in(paths))
    harm = [damage(path, rng) for path in paths]
    if harm.count("gone") == shards:
        return
    shuffle = int(rng.integers(1, 8))
    seen: list[Item] = []
    for worker in range(workers):
        info = SimpleNamespace(id=worker, num_workers=workers) if workers > 1 else None
        monkeypatch.setattr(distill_core.data.stream, "get_worker_info", lambda info=info: info)
        stream = stream_of(paths, shuffle=shuffle, seed=case, max_bad_fraction=1.0)
        items: list[Item] = []
        states = [stream.state_dict()]
        for item in islice(iter(stream), 3 * shards * size):
            if isinstance(item, Failure):
                assert "no shard can be read" in item.message or "fewer samples" in item.message, item.message
                break
            items.append(item)
            states.append(stream.state_dict())
        for stop in rng.integers(len(states), size=3):
            resumed = stream_of(paths, shuffle=shuffle, seed=case, max_bad_fraction=1.0)
            resumed.load_state_dict(states[stop])
            rest = items[stop : stop + 7]
            again = [item for item in islice(iter(resumed), len(rest)) if isinstance(item, Item)]
            assert plain(again) == plain(rest), f"{harm}, stopped after {stop}"
        seen += items
    named = [skip for item in seen for skip in item.skipped]
    lost = expected - {item.key for item in seen}
    broken = {skip.url for skip in named if skip.key.startswith("(")}
    for key in lost:
        assert str(paths[int(key.split("-")[1])]) in broken, f"{harm}: {key} is missing in silence"
    if "twice" in harm and not lost:
        assert any("just before it" in skip.reason for skip in named), harm


@pytest.mark.parametrize("case", range(12))
def test_faults_that_pass_change_nothing(tmp_path: Path, write_shards: Write, server: Server, case: int) -> None:
    """The same items from a server that fails now and then as from files. Catches samples that a retry loses."""
    rng = np.random.default_rng(case)
    paths = write_shards(tmp_path, int(rng.integers(1, 4)), int(rng.integers(1, 12)))
    quick = Patience(retries=3, timeout=0.3)
    expected = [(item.key, item.seed) for item in take(stream_of(paths), 30)]
    urls = [server.url(path) for path in paths]
    kinds: list[int | str] = [404, 503, "refuse", "close", "cut", "stall"]
    for _ in range(6):
        server.faults += [kinds[int(rng.integers(6))] for _ in range(int(rng.integers(1, 4)))] + [None]
    stream = ShardStream(urls, TellEpoch(), seed=3, shuffle=5, patience=quick)
    items = take(stream, 30)
    assert [(item.key, item.seed) for item in items] == expected
    assert not [skip for item in items for skip in item.skipped]
    assert len(server.requests) > len(paths)
