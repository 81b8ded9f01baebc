"""Shards that are cut off, unreadable, changed or not there, as training reads them."""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_server import Server
from reading import QUICK, Write, keys_in, passes, reader_of, skipped_in

from distill_core.data.batches import Failure, Item
from distill_core.data.lengths import measure
from distill_core.data.loader import digest
from distill_core.data.shard import Patience
from distill_core.data.tar_shards import TarShard
from distill_core.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def cut(shard: Path, keep: float) -> None:
    data = shard.read_bytes()
    shard.write_bytes(data[: int(len(data.rstrip(b"\0")) * keep)])


def test_the_rest_of_a_truncated_shard_is_counted_once_a_pass(tmp_path: Path, write_shards: Write) -> None:
    """Catches an error that stops training, a loss without a word, and whole samples before the cut that are lost."""
    paths = write_shards(tmp_path, 2, 8)
    cut(paths[1], 0.55)
    for items in passes(reader_of(paths), 2):
        others = {int(item.key[8:]) for item in items if item.key.startswith("train-1-")}
        assert others == set(range(len(others)))
        assert 2 <= len(others) < 8
        assert len(items) == 8 + len(others) + 1
        assert {item.key for item in items} >= set(keys_in(paths[:1]))
        (skip,) = skipped_in(items)
        assert (skip.key, skip.url) == ("(rest of the shard)", str(paths[1]))
        assert "cut off" in skip.reason
        assert "\n" not in str(skip)


def test_a_cut_inside_a_tar_header_is_plain(tmp_path: Path, write_shards: Write) -> None:
    """tarfile takes it for the end of the shard; catches a loss without a word."""
    (path,) = write_shards(tmp_path, 1, 8)
    with tarfile.open(path) as tar:
        header = tar.getmember("train-0-5.png").offset
    path.write_bytes(path.read_bytes()[: header + 100])
    (items,) = passes(reader_of([path]))
    assert {item.key for item in items} == {f"train-0-{j}" for j in range(5)}
    assert "inside a header" in skipped_in(items)[0].reason


@pytest.mark.parametrize("damage", ["missing", "zero bytes", "no entries", "not a tar"])
def test_shards_that_cannot_be_read_are_named(tmp_path: Path, write_shards: Write, damage: str) -> None:
    """Before training an error, in a resumed run a loss that is counted; catches either without the shard's name."""
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
        "missing": "does not exist",
        "zero bytes": "the shard is empty",
        "no entries": "the shard is empty",
        "not a tar": "not a readable tar file",
    }[damage]

    def start() -> None:
        shards = [TarShard(path) for path in paths]
        measure(shards, QUICK)

    with pytest.raises(DataError, match=said) as error:
        start()
    assert str(broken) in str(error.value)
    assert str(paths[0]) not in str(error.value)
    assert "\n" not in str(error.value)
    for items in passes(reader_of(paths), 2):  # its length is taken to be the other's
        assert {item.key for item in items} == set(keys_in(paths[:1]))
        skipped = skipped_in(items)
        assert len(skipped) == 3
        assert {skip.url for skip in skipped} == {str(broken)}
        assert all(str(broken) in str(skip) and "\n" not in str(skip) for skip in skipped)
    with pytest.raises(DataError, match=r"no shard can be read: 1 of 1 failed|does not exist") as error:
        reader_of(paths[1:])
    assert str(broken) in str(error.value)


def test_a_shard_that_goes_is_skipped_and_comes_back(tmp_path: Path, write_shards: Write) -> None:
    """Catches a shard removed between two passes that ends the run, or stays away when it is there again."""
    paths = write_shards(tmp_path, 3, 4)
    away = paths[1].with_suffix(".away")
    reader = reader_of(paths)
    (first,) = passes(reader, 1)
    paths[1].rename(away)
    (second,) = passes(reader, 1, start=1)
    away.rename(paths[1])
    (third,) = passes(reader, 1, start=2)
    assert Counter(item.key for item in first) == Counter(item.key for item in third) == Counter(keys_in(paths))
    assert {item.key for item in second} == set(keys_in([paths[0], paths[2]]))
    assert [skip.key for skip in skipped_in(second)] == ["(whole shard)"] * 4, "one for each sample"
    assert all("No such file" in skip.reason for skip in skipped_in(second))
    assert not skipped_in(first + third)


def test_a_shard_that_is_away_is_tried_once_a_pass(
    tmp_path: Path, write_shards: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a back-off before each of its samples."""
    paths = write_shards(tmp_path, 3, 40)
    reader = reader_of(paths, patience=Patience(retries=3))
    paths[1].unlink()
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    passes(reader, 2)
    assert len(waits) == 3 * 2


def test_no_run_goes_on_with_nothing(tmp_path: Path, write_shards: Write) -> None:
    paths = write_shards(tmp_path, 7, 2)
    reader = reader_of(paths)
    for path in paths:
        path.unlink()
    failure = reader.batch(range(3))
    assert isinstance(failure, Failure)
    assert failure.message.startswith("no shard can be read: the last 5 failed, the last one ")
    assert "No such file" in failure.message
    assert "\n" not in failure.message


def test_the_digest_of_names() -> None:
    """Catches one that a moved folder changes, and one that mixes up shards of two folders."""
    a, b = "/data/one/0.tar", "/data/two/0.tar"
    assert digest([a, b]) == digest(["https://host/x/one/0.tar", "https://host/x/two/0.tar"])
    assert digest([a, b]) not in (digest([b, a]), digest([a, a]), digest([a]), digest([b, b]))
    assert digest([a]) == digest([b]) == digest(["0.tar"]), "one shard alone has its name"
    assert digest(["/d/1.tar", "/d/10.tar"]) == digest(["1.tar", "10.tar"]) != digest(["/d/1.tar", "/d/11.tar"])


def test_no_shards_at_all() -> None:
    with pytest.raises(DataError, match="names none"):
        measure([], QUICK)


def test_the_index_is_kept_and_follows_the_file(
    tmp_path: Path, write_shards: Write, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches headers that are read again by every run, and an index of a file as it no longer is."""
    (path,) = write_shards(tmp_path, 1, 5)
    assert len(TarShard(path)) == 5
    (index,) = (cache / "indexes").iterdir()
    monkeypatch.setattr("distill_core.data.tar_shards.scan", lambda file: pytest.fail("read again"))
    assert len(TarShard(path)) == 5
    monkeypatch.undo()
    monkeypatch.setenv("DISTILL_CACHE", str(cache))
    write_shards(tmp_path, 1, 3)
    os.utime(path, ns=(1, 1))
    assert [TarShard(path)[i]["__key__"] for i in range(3)] == keys_in([path])
    index.write_bytes(index.read_bytes()[:50])
    assert len(TarShard(path)) == 3, "an index that is cut off is made again"


def test_a_cache_that_cannot_be_written_does_no_harm(
    tmp_path: Path, write_shards: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = write_shards(tmp_path, 1, 5)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "file"))
    assert [sample["__key__"] for sample in map(TarShard(path).__getitem__, range(5))] == keys_in([path])


@pytest.mark.parametrize("pack", ["gzip -c", "bzip2 -c", "xz -c"])
def test_compressed_shards_are_copied_once(tmp_path: Path, write_shards: Write, cache: Path, pack: str) -> None:
    """By their content, whatever their name; a file that has changed is copied anew."""
    (path,) = write_shards(tmp_path, 1, 4)
    (other,) = write_shards(tmp_path, 1, 3, prefix="other")
    keys, packed = keys_in([path]), tmp_path / "packed.tar"
    assert os.system(f"{pack} {path} > {packed}") == 0
    assert [sample["__key__"] for sample in map(TarShard(packed).__getitem__, range(4))] == keys
    (copy,) = (cache / "shards").glob("*.tar")
    before = copy.stat().st_ino
    assert len(TarShard(packed)) == 4
    assert copy.stat().st_ino == before
    assert os.system(f"{pack} {other} > {packed}") == 0
    assert TarShard(packed)[2]["__key__"] == "other-0-2"


def test_copies_take_no_more_room_than_they_may(tmp_path: Path, write_shards: Write, cache: Path) -> None:
    """The least recently used go; catches a cache that fills the disk, and a copy that is removed while it is read."""
    paths = write_shards(tmp_path, 6, 3)
    room = 2.5 * paths[0].stat().st_size / 1e9
    shards = [TarShard(f"pipe:cat {path}") for path in paths]
    for turn in range(2):
        for i, shard in enumerate(shards):
            shard.prepare(Patience(shard_cache=room))
            assert shard[turn]["__key__"] == f"train-{i}-{turn}"
            assert len(list((cache / "shards").glob("*.tar"))) <= 2
    assert not list((cache / "shards").glob(".*"))


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


@pytest.mark.parametrize("case", range(40))
def test_drawn_damage_neither_changes_a_resume_nor_goes_uncounted(
    tmp_path: Path, write_shards: Write, case: int
) -> None:
    """Shards, damage and shuffling are drawn. All that an undamaged set would give is there, or named; and another
    reader that begins anywhere reads the same, with the same losses."""
    rng = np.random.default_rng(case)
    paths = write_shards(tmp_path, int(rng.integers(2, 6)), int(rng.integers(3, 9)))
    expected = set(keys_in(paths))
    harm = [damage(path, rng) for path in paths]
    if harm.count("gone") == len(paths):
        return
    options: dict[str, Any] = {"shuffle": int(rng.integers(0, 12)), "streams": int(rng.integers(1, 9)), "seed": case}
    try:
        items = [item for one in passes(reader_of(paths, **options), 2) for item in one]
    except DataError as error:  # all that is left cannot be read
        if "no shard can be read" in str(error):
            return
        raise
    for start in rng.integers(len(items), size=3):
        reader = reader_of(paths, **options)
        again = [reader.item(position) for position in range(int(start), min(int(start) + 7, len(items)))]
        assert plain(again) == plain(items[start : start + 7]), f"{harm}, from {start}"
    named = skipped_in(items)
    broken = {skip.url for skip in named if skip.key.startswith("(")}
    lost = expected - {item.key for item in items}
    for key in lost:
        assert str(paths[int(key.split("-")[1])]) in broken, f"{harm}: {key} is missing in silence"
    if "twice" in harm and not lost:
        assert any("just before it" in skip.reason for skip in named), harm


@pytest.mark.parametrize("case", range(12))
def test_faults_that_pass_change_nothing(tmp_path: Path, write_shards: Write, server: Server, case: int) -> None:
    """The same items from a server that fails now and then as from files. Catches samples that a retry loses."""
    rng = np.random.default_rng(case)
    paths = write_shards(tmp_path, int(rng.integers(1, 4)), int(rng.integers(1, 12)))
    expected = [plain(items) for items in passes(reader_of(paths), 2)]
    urls = [server.url(path) for path in paths]
    kinds: list[int | str] = [404, 503, "refuse", "close", "cut", "stall"]
    for _ in range(6):
        server.faults += [kinds[int(rng.integers(6))] for _ in range(int(rng.integers(1, 3)))] + [None]
    reader = reader_of(urls, patience=Patience(retries=12, timeout=0.3))
    assert [plain(items) for items in passes(reader, 2)] == expected
    assert len(server.requests) > len(paths)


@pytest.mark.parametrize("fault", [404, "refuse", "close", "cut", "stall"])
def test_a_url_that_fails_for_good(tmp_path: Path, write_shards: Write, server: Server, fault: int | str) -> None:
    """One of three: the run starts, its samples are counted, it comes back in a later pass; what a damaged transfer has
    brought is used."""
    paths = write_shards(tmp_path, 3, 30)
    urls = [*map(str, paths[:2]), server.url(paths[2])]
    server.faults = [fault] * 60  # to the index that may stand beside it, too
    reader = reader_of(urls)
    items = passes(reader, 1)[0]
    skipped = skipped_in(items)
    if fault == "cut":
        assert [skip.key for skip in skipped] == ["(rest of the shard)"]
        return
    assert len(skipped) == 30
    assert {skip.url for skip in skipped} == {urls[2]}
    server.faults = []
    later = passes(reader, 1, start=1)[0]
    assert Counter(item.key for item in later) == Counter(keys_in(paths))
