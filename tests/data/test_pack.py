"""`distill data pack`: the same bytes however it is run, nothing lost without being named."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reading import Write, keys_in

from distill_core import BadSample, DataError, Sample, Shard, TarShard, UserError, tar_shards
from distill_core.cli import main
from distill_data import writing
from distill_data.pack import Packer, pack, parse_size
from distill_data.row import Named
from distill_data.writing import member_key

OPTIONS: dict[str, Any] = {
    "prefix": "train",
    "samples": 4,
    "most_bytes": None,
    "side": None,
    "quality": 90,
    "checked": True,
    "jobs": 1,
}


class ListShard(Shard):
    """Samples in memory."""

    def __init__(self, name: str, samples: Sequence[Sample]) -> None:
        self.name, self._samples = name, samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: int) -> Sample:
        return self._samples[number]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))


def picture(width: int, height: int, kind: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(file, kind, **options)
    return file.getvalue()


def files(folder: Path) -> dict[str, bytes]:
    """All that was written, but for the folder's own name in the report."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    if "pack.json" in found:
        found["pack.json"] = found["pack.json"].replace(os.fsencode(folder), b"")
    return found


def samples(folder: Path) -> list[Sample]:
    shards = sorted(folder.glob("*.tar"))
    return [sample for shard in shards for sample in TarShard(shard)]


def in_memory(fields: Sequence[Mapping[str, Any]]) -> Named:
    listed = [{"__key__": f"k{i}", "__url__": "memory", **sample} for i, sample in enumerate(fields)]
    return Named("memory", {"data": [ListShard("memory", listed)]})


@pytest.mark.parametrize("most_bytes", [None, 9000])
def test_any_number_of_jobs_writes_the_same_bytes(tmp_path: Path, write_shards: Write, most_bytes: int | None) -> None:
    """Threads finish in any order. Would catch samples that are written as they come."""
    shards = {name: write_shards(tmp_path, count, 7, prefix=name) for name, count in (("a", 2), ("b", 1))}
    sets = {name: [TarShard(path) for path in paths] for name, paths in shards.items()}
    for jobs in (1, 3):
        pack(Named("", sets), tmp_path / f"out{jobs}", **OPTIONS | {"jobs": jobs, "most_bytes": most_bytes, "side": 9})
    one, three = files(tmp_path / "out1"), files(tmp_path / "out3")
    assert one == three
    if most_bytes is None:
        assert [len(TarShard(path)) for path in sorted((tmp_path / "out1").glob("*.tar"))] == [4, 4, 4, 2, 4, 3]
    expected = keys_in(sorted(tmp_path.glob("?-*.tar")))
    assert [sample["__key__"] for sample in samples(tmp_path / "out1")] == expected


def nth(function: Callable[..., Any], n: int) -> Callable[..., Any]:
    """`function`, but the process is killed in place of its n-th call."""
    calls = 0

    def killed(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    return killed


KILLS = {
    "in the first shard": (writing._OpenShard, "add", 2),
    "in the third shard": (writing._OpenShard, "add", 10),
    "before the index": (TarShard, "write_index", 2),
    "before the journal": (writing.Folder, "_note", 3),
    "while the line is written": (writing.os, "fsync", 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_pack_continues_to_the_same_bytes(tmp_path: Path, write_shards: Write, kill: str) -> None:
    """Would catch a half-written shard that passes for whole, and one that is written twice or left out."""
    replace = {(0, 2): {"png": b"broken", "txt": b"a"}}
    source = Named("", {"data": [TarShard(path) for path in write_shards(tmp_path, 2, 9, replace=replace)]})
    pack(source, tmp_path / "whole", **OPTIONS)

    def child() -> None:
        owner, name, n = KILLS[kill]
        setattr(owner, name, nth(getattr(owner, name), n))
        pack(source, tmp_path / "killed", **OPTIONS)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "pack.json").exists()
    report = pack(source, tmp_path / "killed", **OPTIONS | {"jobs": 2})
    assert report["samples"] == 17
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_what_is_written_already_is_not_read_again(
    tmp_path: Path, write_shards: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a shard of it has gone since: that one is written again, and those after it."""
    source = Named("", {"data": [TarShard(path) for path in write_shards(tmp_path, 2, 6)]})
    pack(source, tmp_path / "out", **OPTIONS)
    before = files(tmp_path / "out")
    positions: list[int] = []
    make = Packer.__call__

    def noted(self: Packer, position: int) -> Any:
        positions.append(position)
        return make(self, position)

    monkeypatch.setattr(Packer, "__call__", noted)
    pack(source, tmp_path / "out", **OPTIONS)
    assert positions == []
    (tmp_path / "out" / "train-000001.tar").unlink()
    pack(source, tmp_path / "out", **OPTIONS)
    assert positions == list(range(4, 12))
    assert files(tmp_path / "out") == before


def test_ctrl_c_leaves_a_state_to_continue(
    tmp_path: Path, write_shards: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "in", 1, 11)
    command = ["data", "pack", str(tmp_path / "in"), str(tmp_path / "out"), "--samples", "4", "--jobs", "1"]
    make = Packer.__call__

    def interrupted(self: Packer, position: int) -> Any:
        if position == 9:
            raise KeyboardInterrupt
        return make(self, position)

    with monkeypatch.context() as patch:
        patch.setattr(Packer, "__call__", interrupted)
        with pytest.raises(SystemExit) as end:
            main(command)
    assert end.value.code == 130
    assert "the same command continues" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob(".*"))
    main(command)
    assert [sample["__key__"] for sample in samples(tmp_path / "out")] == keys_in(sorted((tmp_path / "in").iterdir()))


def test_a_line_of_the_journal_that_was_cut_off(
    tmp_path: Path, write_shards: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a kill or a full disk: the shard counts as not written."""
    source = Named("", {"data": [TarShard(path) for path in write_shards(tmp_path, 1, 11)]})
    pack(source, tmp_path / "whole", **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(writing.Folder, "finish", lambda self, more: {})
        pack(source, tmp_path / "cut", **OPTIONS)
    journal = tmp_path / "cut" / "pack.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 4
    journal.write_text("".join(lines[:2]) + lines[2][:20])
    pack(source, tmp_path / "cut", **OPTIONS)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_full_disk_leaves_a_state_to_continue(
    tmp_path: Path, write_shards: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Named("", {"data": [TarShard(path) for path in write_shards(tmp_path, 1, 11)]})
    pack(source, tmp_path / "whole", **OPTIONS)
    add, calls = writing.tarfile.TarFile.addfile, iter(range(15))

    def full(self: Any, member: Any, file: Any) -> None:
        if next(calls) == 14:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, member, file)

    with monkeypatch.context() as patch:
        patch.setattr(writing.tarfile.TarFile, "addfile", full)
        with pytest.raises(UserError, match=r"No space left on device\. The same command continues in"):
            pack(source, tmp_path / "full", **OPTIONS)
    assert sorted(files(tmp_path / "full")) == ["pack.jsonl", "train-000000.tar", "train-000000.tar.index.npy"]
    pack(source, tmp_path / "full", **OPTIONS)
    assert files(tmp_path / "full") == files(tmp_path / "whole")


def test_two_processes_do_not_write_to_one_folder(tmp_path: Path, write_shards: Write) -> None:
    source = Named("", {"data": [TarShard(path) for path in write_shards(tmp_path, 1, 3)]})
    with writing.Folder(tmp_path / "out", "pack", {}).open(), pytest.raises(UserError, match="another process"):
        pack(source, tmp_path / "out", **OPTIONS)


def test_a_folder_of_something_else_is_refused(tmp_path: Path, write_shards: Write) -> None:
    source = Named("", {"data": [TarShard(path) for path in write_shards(tmp_path / "in", 1, 3)]})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt already"):
        pack(source, tmp_path / "out", **OPTIONS)
    pack(source, tmp_path / "other", **OPTIONS)
    with pytest.raises(UserError, match="was begun with other side, quality"):
        pack(source, tmp_path / "other", **OPTIONS | {"side": 10})
    write_shards(tmp_path / "in", 1, 4)
    with pytest.raises(UserError, match="was begun with other source"):
        pack(source, tmp_path / "other", **OPTIONS)


BAD: dict[str, tuple[Mapping[str, Any], str]] = {
    "no picture": ({"jpg": b"no picture"}, "field jpg: not a readable picture"),
    "empty picture": ({"png": b""}, "field png: not a readable picture"),
    "cut picture": ({"png": picture(20, 20)[:200]}, "field png: not a readable picture"),
    "text": ({"txt": b"caf\xe9"}, "field txt: not UTF-8 (byte 3)"),
    "json": ({"json": b'{"caption": '}, "field json: not json"),
    "json's text": ({"json": b'"\xff"'}, "field json: not UTF-8"),
    "nothing": ({}, "it has no field"),
    "an object": ({"cls": 3}, "field cls: int, not bytes"),
    "twice": ({"jpg": b"", "JPG": b""}, "stands twice"),
    "a path": ({"a/b": b""}, "no extension of a file"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_used_is_left_out_and_named(tmp_path: Path, bad: str) -> None:
    fields, reason = BAD[bad]
    report = pack(in_memory([{"txt": b"good"}, fields, {"txt": b"too"}]), tmp_path / "out", **OPTIONS)
    assert [sample["__key__"] for sample in samples(tmp_path / "out")] == ["k0", "k2"]
    (shard,) = report["shards"]
    (skipped,) = shard["skipped"]
    assert (skipped["key"], skipped["url"]) == ("k1", "memory")
    assert reason in skipped["reason"]
    assert sum(report["skipped"].values()) == 1


def test_damage_of_a_shard_is_named(tmp_path: Path, write_shards: Write) -> None:
    """Of one that is cut off the rest is packed, and what follows the damage is named as one loss."""
    cut, whole = write_shards(tmp_path, 2, 8)
    os.truncate(cut, 15_000)
    report = pack(Named("", {"data": [TarShard(cut), TarShard(whole)]}), tmp_path / "out", **OPTIONS)
    assert 8 < report["samples"] < 16
    (reason,) = report["skipped"]
    assert "cut off" in reason
    (skipped,) = [line for shard in report["shards"] for line in shard["skipped"]]
    assert skipped["url"] == str(cut)


def test_a_key_that_stands_twice_in_a_row(tmp_path: Path) -> None:
    """A reader of the shard would take the second for a part of the first."""
    report = pack(
        in_memory([{"txt": b"1"}, {"__key__": "k0", "txt": b"2"}, {"__key__": "k0", "png": picture(5, 5)}]),
        tmp_path / "out",
        **OPTIONS,
    )
    assert [sample["txt"] for sample in samples(tmp_path / "out")] == [b"1"]
    assert report["skipped"] == {"its key is that of the sample just before it": 2}


def test_keys_that_no_file_can_bear_are_written_so_that_they_can(tmp_path: Path) -> None:
    """A reader takes the first dot for the end of the key, and other programs would unpack outside the folder."""
    keys = ["a.b", "a.c", "../up", "/etc/x", "__meta__/y", "fine/é", "x" * 300]
    listed = [{"__key__": key, "__url__": "memory", "txt": key.encode()} for key in keys]
    report = pack(Named("", {"data": [ListShard("memory", listed)]}), tmp_path / "out", **OPTIONS)
    written = samples(tmp_path / "out")
    assert [sample["txt"].decode() for sample in written] == keys
    assert [sample["__key__"] for sample in written] == [member_key(key) for key in keys]
    assert list(report["notes"].values()) == [5]
    for sample in written:
        assert not sample["__key__"].startswith("/")
        assert ".." not in sample["__key__"]
    with pytest.raises(BadSample):
        member_key("")


def test_pictures_are_made_smaller_and_stay_what_they_are(tmp_path: Path) -> None:
    """Sizes, formats, EXIF; what is small enough keeps its bytes."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = [
        ("jpg", picture(90, 60, "JPEG", exif=exif.tobytes()), (45, 30), "JPEG"),
        ("png", picture(40, 80, "PNG", "RGBA"), (30, 60), "PNG"),
        ("png", picture(40, 80, "PNG", "P"), (30, 60), "PNG"),
        ("webp", picture(64, 64, "WEBP"), (30, 30), "WEBP"),
        ("jpg", picture(70, 90, "JPEG", "CMYK"), (30, 39), "JPEG"),
        ("gif", picture(60, 60, "GIF", "P"), (30, 30), "PNG"),
        ("png", picture(30, 200), (30, 200), "PNG"),
        ("png", picture(70, 70, "PNG", "1"), (30, 30), "PNG"),
    ]
    source = in_memory([{field: data, "txt": b"a"} for field, data, _, _ in pictures])
    report = pack(source, tmp_path / "out", **OPTIONS | {"side": 30})
    assert report["notes"] == {"pictures made smaller, to 30 pixels": 7}
    for sample, (field, data, size, kind) in zip(samples(tmp_path / "out"), pictures, strict=True):
        name = "png" if field == "gif" else field
        with Image.open(io.BytesIO(sample[name])) as made:
            assert (made.size, made.format) == (size, kind)
        if size == (30, 200):
            assert sample[name] == data
    with Image.open(io.BytesIO(samples(tmp_path / "out")[0]["jpg"])) as made:
        assert made.getexif()[0x0112] == 6


def test_a_picture_that_would_take_the_place_of_another(tmp_path: Path) -> None:
    """A gif becomes a png, and there is one: neither is lost in silence."""
    source = in_memory([{"gif": picture(60, 60, "GIF", "P"), "png": picture(8, 8)}, {"txt": b"a"}])
    report = pack(source, tmp_path / "out", **OPTIONS | {"side": 30})
    assert list(report["skipped"]) == ["field png: would be replaced by another picture that becomes PNG"]


def test_a_picture_of_one_colour_keeps_it(tmp_path: Path) -> None:
    """Would catch channels that are exchanged, and 16 bits that are clipped."""
    deep = io.BytesIO()
    Image.fromarray(np.full((50, 50), 40_000, np.uint16)).save(deep, "PNG")
    flat = io.BytesIO()
    Image.new("RGB", (50, 50), (200, 30, 90)).save(flat, "JPEG", quality=95)
    pack(in_memory([{"png": deep.getvalue()}, {"jpg": flat.getvalue()}]), tmp_path / "out", **OPTIONS | {"side": 20})
    grey, colour = (Image.open(io.BytesIO(s.get("png") or s["jpg"])) for s in samples(tmp_path / "out"))
    assert grey.getpixel((9, 9)) == round(40_000 / 257)
    assert np.abs(np.array(colour.getpixel((9, 9))) - (200, 30, 90)).max() <= 3


def test_the_command_says_what_to_train_on(
    tmp_path: Path, write_shards: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "in", 2, 5, replace={(1, 1): {"png": b"broken"}})
    out = tmp_path / "out"
    main(["data", "pack", str(tmp_path / "in" / "*.tar"), str(out), "--samples", "4", "--bytes", "1GB"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("9 samples in 3 shards, ")
    assert lines[1].startswith("  left out 1: field png: not a readable picture")
    assert lines[-1] == f'data.source: {{name: webdataset, urls: "{out}/train-{{000000..000002}}.tar"}}'
    assert json.loads((out / "pack.json").read_text())["samples"] == 9
    assert sum(len(TarShard(shard.name)) for shard in tar_shards(f"{out}/train-{{000000..000002}}.tar")["data"]) == 9


@pytest.mark.parametrize(
    ("source", "what"),
    [("nothing", "neither shards"), ("no/such-{00..01}.tar", "does not exist"), ("{name: nope}", "no source named")],
)
def test_a_source_that_is_none(source: str, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["data", "pack", source, str(tmp_path / "out")])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert what in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_sizes() -> None:
    assert [parse_size(text) for text in ("12", "500MB", "1.5GB")] == [12, 500 * 10**6, 15 * 10**8]
    for text in ("many", "5TBB", "0"):
        with pytest.raises(DataError, match="--bytes"):
            parse_size(text)
