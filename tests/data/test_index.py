"""`distill data index`: what it counts, writes and refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from reading import QUICK, Write

from distill_core import TarShard
from distill_core.cli import main


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    main(["data", "index", *arguments, "--json"])
    result: dict[str, object] = json.loads(capsys.readouterr().out)
    return result


def test_it_counts_and_writes_beside(
    tmp_path: Path,
    cache: Path,
    write_shards: Write,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And a run then takes it: would catch a file that nobody finds."""
    paths = write_shards(tmp_path / "in", 3, 5)
    os.truncate(paths[2], 10_000)
    result = run(str(tmp_path / "in"), capsys=capsys)
    rows = result["shards"]
    assert isinstance(rows, list)
    assert [row["samples"] for row in rows[:2]] == [5, 5]
    assert result["samples"] == sum(row["samples"] for row in rows)
    assert [bool(row["damage"]) for row in rows] == [False, False, True]
    shutil.rmtree(cache)
    monkeypatch.setattr(TarShard, "_build_index", None)
    for path, row in zip(paths, rows, strict=True):
        shard = TarShard(path)
        shard.prepare(QUICK)
        assert len(shard) == row["samples"]


def test_nothing_is_written_beside_if_not_wanted(
    tmp_path: Path, write_shards: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = write_shards(tmp_path / "in", 1, 5)
    result = run(str(path), "--cache", capsys=capsys)
    assert result["samples"] == 5
    assert list((tmp_path / "in").iterdir()) == [path]


def test_a_shard_that_cannot_be_read_is_the_error_and_the_others_are_indexed(
    tmp_path: Path, write_shards: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_shards(tmp_path / "in", 2, 5)
    paths[0].write_bytes(b"no tar" * 200)
    with pytest.raises(SystemExit) as end:
        main(["data", "index", str(tmp_path / "in")])
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"1 shard of 2 cannot be read, the first: {paths[0]}: not a readable tar file")
    assert "5 samples in 2 shards; 1 index written beside" in printed.out
    assert Path(f"{paths[1]}.index.npy").is_file()


def test_a_name_without_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["data", "index", str(tmp_path / "*.tar")])
    assert end.value.code == 2
    assert "no file matches" in capsys.readouterr().err
