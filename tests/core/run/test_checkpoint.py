"""Checkpoints: whole or not there, never read where damaged, and what is said where one cannot be written."""

from __future__ import annotations

import errno
import os
import random
import resource
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from distill_core.errors import UserError
from distill_core.run.checkpoint import Checkpoints, read_checkpoint


def state(value: float, size: int = 3) -> dict[str, Any]:
    return {"objective": {"x": torch.full((size,), value)}, "ranks": [{"random": b"x" * 9}]}


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a half-written checkpoint in place of a good one, and left-over files."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 15):
        checkpoints.save(step, state(step), best=step == 5)
    assert checkpoints.steps() == [10, 15]
    assert checkpoints.read("best")["objective"]["x"][0] == 5
    real = torch.save

    def half(content: Any, file: Any) -> None:
        real(content, file)
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(UserError, match=r"step-00000015\.pt: cannot be written: disk full"):
        checkpoints.save(15, state(0), best=True)
    assert checkpoints.read("last")["objective"]["x"][0] == 15
    assert checkpoints.read("best")["objective"]["x"][0] == 5
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [
        "best.pt",
        "step-00000010.pt",
        "step-00000015.pt",
    ]


def test_none_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match="the run has saved none yet"):
        checkpoints.read()
    checkpoints.save(3, {})
    checkpoints.save(6, {})
    with pytest.raises(UserError, match="no checkpoint '4'; there are 3, 6"):
        checkpoints.read("4")
    monkeypatch.setattr("distill_core.run.checkpoint.VERSION", 99)
    checkpoints.save(3, {})
    monkeypatch.undo()
    with pytest.raises(UserError, match="written in format 99; this distill reads format 2"):
        checkpoints.read("3")


@pytest.mark.parametrize("keep", [1, 2])
def test_the_one_just_written_stays(tmp_path: Path, keep: int) -> None:
    """Catches pruning that keeps the largest numbers: where a run went back, its new checkpoint was deleted at once."""
    checkpoints = Checkpoints(tmp_path, keep=9)
    for step in (2, 4, 6, 8):
        checkpoints.save(step, state(step))
    Checkpoints(tmp_path, keep).save(5, state(5.5))
    assert checkpoints.steps() == [*[4, 5][2 - keep :], 6, 8]
    assert checkpoints.read("5")["objective"]["x"][0] == 5.5


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """Of every byte at the end, where the digest is, and of 200 others. (Of 200, torch itself reads 196.)"""
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, state(1.0, 5000), best=True)
    good, size = path.read_bytes(), path.stat().st_size
    rng = random.Random()
    for position in [*range(size - 120, size), *(rng.randrange(size) for _ in range(200))]:
        path.write_bytes(good)
        flip(path, position, rng.randrange(8))
        for which in ("last", "1", "best"):
            with pytest.raises(UserError, match=r"\.pt: cannot be read \(damaged: its digest differs"):
                checkpoints.read(which)
    for length in (0, 10, size // 2, size - 1):
        path.write_bytes(good[:length])
        with pytest.raises(UserError, match="cannot be read"):
            checkpoints.read()
    path.write_bytes(good)
    assert checkpoints.read()["objective"]["x"].tolist() == [1.0] * 5000


def test_a_damaged_last_one_is_passed_over(tmp_path: Path) -> None:
    """Catches a run that cannot go on for one bit, one that goes back without a word, and a step that was named."""
    checkpoints, warnings = Checkpoints(tmp_path, keep=3), []
    for step in (2, 4, 6):
        checkpoints.save(step, state(step), best=step == 6)
    flip(checkpoints.path(6), 300)
    found = checkpoints.load("last", warnings.append)
    assert (found.state["step"], found.path) == (4, checkpoints.path(4))
    (line,) = warnings
    assert line.startswith(f"{checkpoints.path(6)}: cannot be read (damaged: ")
    assert line.endswith("using step-00000004.pt instead")
    for which, hint in (("6", "4"), ("best", "4")):
        with pytest.raises(UserError, match=rf"damaged: .*\. Try --checkpoint {hint}\.$"):
            checkpoints.load(which, warnings.append)
    assert len(warnings) == 1
    flip(checkpoints.path(4), 300)
    assert checkpoints.load("last", warnings.append).state["step"] == 2
    flip(checkpoints.path(2), 300)
    with pytest.raises(UserError, match=r"step-00000006\.pt: cannot be read"):
        checkpoints.load("last")


def test_a_checkpoint_is_a_file_of_torch(tmp_path: Path) -> None:
    """Catches a digest that other programs stumble over."""
    path = Checkpoints(tmp_path).save(1, state(7.0))
    for options in ({}, {"mmap": True}):
        assert torch.load(path, weights_only=True, **options)["objective"]["x"].tolist() == [7.0] * 3
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256:")
    assert read_checkpoint(path)["step"] == 1


def test_one_that_is_dropped_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run trains, and keeps one: catches a reader of `last` that finds the file gone."""
    checkpoints, writer = Checkpoints(tmp_path), Checkpoints(tmp_path, keep=1)
    writer.save(1, state(1))
    opened = Path.open

    def late(path: Path, mode: str = "r", *options: Any, **more: Any) -> Any:
        if path.name == "step-00000001.pt" and mode == "rb":
            writer.save(2, state(2))
        return opened(path, mode, *options, **more)

    monkeypatch.setattr(Path, "open", late)
    assert checkpoints.load("last").state["step"] == 2


def test_the_digest_is_of_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`best.pt` is replaced between any two reads: catches state and digest of two checkpoints."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1.0), best=True)
    first = checkpoints.load("best")
    real = torch.load

    def late(*arguments: Any, **options: Any) -> Any:
        checkpoints.save(2, state(2.0), best=True)
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "load", late)
    found = checkpoints.load("best")
    assert found.state["step"] == 1
    assert found.digest == first.digest
    monkeypatch.undo()
    assert checkpoints.load("best").digest != first.digest
    assert checkpoints.load("best").digest == checkpoints.load("2").digest


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_within_torch(tmp_path: Path) -> None:
    """By a limit of the system's, in the middle of a tensor: catches torch's insides in place of the reason."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1.0), best=True)
    with no_file_larger_than(1 << 20), pytest.raises(UserError) as caught:
        checkpoints.save(2, state(2.0, 1 << 20), best=True)
    assert str(caught.value) == f"{checkpoints.path(2)}: cannot be written: File too large"
    assert checkpoints.load("last").state["step"] == checkpoints.load("best").state["step"] == 1
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["best.pt", "step-00000001.pt"]


def test_a_full_disk_is_said_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    monkeypatch.setattr("distill_core.system.files.free_at", lambda folder: 12_345_678)
    with pytest.raises(UserError) as caught:
        Checkpoints(tmp_path).save(1, state(1.0, 1 << 20))
    assert str(caught.value) == (
        f"{tmp_path}/checkpoints/step-00000001.pt: cannot be written: No space left on device (it takes 4.2 MB, and "
        "12 MB are free)"
    )


def test_file_systems_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*paths: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1.0), best=True)
    checkpoints.save(2, state(2.0), best=True)
    checkpoints.save(3, state(3.0))
    assert [checkpoints.load(which).state["step"] for which in ("best", "2", "last")] == [2, 2, 3]
    assert len(list(checkpoints.folder.iterdir())) == 3


def test_what_is_later_than_a_step(tmp_path: Path) -> None:
    """Catches a best checkpoint of an abandoned branch that stays, and one of the common part that is set aside."""
    checkpoints = Checkpoints(tmp_path, keep=9)
    for step in (2, 4, 6):
        checkpoints.save(step, state(step), best=step == 4)
    assert checkpoints.later(6) == []
    assert checkpoints.later(4) == [checkpoints.path(6)]
    assert checkpoints.later(2) == [checkpoints.path(4), checkpoints.path(6), checkpoints.best]
    flip(checkpoints.best, 300)  # and 4, which is the same file
    assert checkpoints.later(4) == [checkpoints.path(6), checkpoints.best]
    for step in (4, 6):
        checkpoints.path(step).unlink()
    assert checkpoints.later(2) == [], "killed between the two files of a best checkpoint: it is written again"


def test_going_back_to_the_best(tmp_path: Path) -> None:
    """Whose own file was dropped: catches a branch that has no last checkpoint until its first save."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(2, state(2.0), best=True)
    checkpoints.save(4, state(4.0))
    best = checkpoints.load("best")
    checkpoints.path(4).unlink()
    checkpoints.restart_from(best)
    assert checkpoints.load("last").state["step"] == 2
    assert checkpoints.load("last").digest == best.digest


def save_in_parts(checkpoints: Checkpoints, step: int, *, best: bool = False, count: int = 3) -> None:
    """As `count` ranks do: 7 rows x of value `step`, of which the last rank holds one."""
    rows = torch.arange(14.0).reshape(7, 2) + 100 * step
    parts = [checkpoints.save_part(step, i, count, [part]) for i, part in enumerate(rows.chunk(count))]
    spread = [(["objective", "x"], [7, 2], 0)]
    checkpoints.save(step, {"objective": {"x": None, "y": torch.ones(())}, "spread": spread, "parts": parts}, best=best)


def test_a_checkpoint_in_parts(tmp_path: Path) -> None:
    """Catches rows in another order, and parts that are read as a whole where a rank needs a few rows."""
    checkpoints = Checkpoints(tmp_path)
    save_in_parts(checkpoints, 2, best=True)
    whole = torch.arange(14.0).reshape(7, 2) + 200
    for state in (checkpoints.read(), checkpoints.read("best"), read_checkpoint(checkpoints.path(2))):
        assert torch.equal(state["objective"]["x"], whole)
        assert set(state) == {"objective", "step", "version"}
    x = checkpoints.load().state["objective"]["x"]
    assert x.shape == (7, 2)
    for first in range(8):
        for last in range(first, 8):
            assert torch.equal(x[first:last], whole[first:last])
    assert torch.equal(checkpoints.reopen(checkpoints.path(2)).state["objective"]["x"][2:5], whole[2:5])


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    """Any flipped bit, a missing part and one of another save: catches weights of two steps in one model."""
    checkpoints, warnings = Checkpoints(tmp_path, keep=9), []
    save_in_parts(checkpoints, 2)
    save_in_parts(checkpoints, 4)
    part = checkpoints.folder / "step-00000004.part-1-of-3.pt"
    good = part.read_bytes()
    rng = random.Random(0)
    for position in rng.sample(range(len(good)), 40):
        part.write_bytes(good)
        flip(part, position, rng.randrange(8))
        assert checkpoints.load("last", warnings.append).state["step"] == 2
        assert warnings.pop().startswith(f"{part}: cannot be read (damaged: its digest differs")
    part.write_bytes((checkpoints.folder / "step-00000002.part-1-of-3.pt").read_bytes())
    with pytest.raises(UserError, match=r"part-1-of-3\.pt: cannot be read \(damaged: it is of another checkpoint\)"):
        checkpoints.read("4")
    part.unlink()
    with pytest.raises(UserError, match=r"step-00000004\.pt: its part step-00000004\.part-1-of-3\.pt is missing\. Try"):
        checkpoints.read("4")
    with pytest.raises(UserError, match="run folders must be shared"):
        checkpoints.reopen(checkpoints.path(4))


def test_parts_go_with_their_checkpoint(tmp_path: Path) -> None:
    """Catches parts that fill the disk, and the best checkpoint's that are dropped with the step's file."""
    checkpoints = Checkpoints(tmp_path, keep=1)

    def steps() -> set[int]:
        return {step for step, _ in checkpoints._parts()}

    checkpoints.save_part(1, 0, 3, [torch.ones(1)])  # killed before the checkpoint that names it
    save_in_parts(checkpoints, 2, best=True)
    assert steps() == {2}
    save_in_parts(checkpoints, 4)
    assert (steps(), checkpoints.steps()) == ({2, 4}, [4])
    assert torch.equal(checkpoints.read("best")["objective"]["x"], torch.arange(14.0).reshape(7, 2) + 200)
    later = checkpoints.later(2)
    assert [path.name for path in later] == [
        "step-00000004.pt",
        *(f"step-00000004.part-{i}-of-3.pt" for i in range(3)),
    ]
    save_in_parts(checkpoints, 6, best=True)
    assert steps() == {6}
