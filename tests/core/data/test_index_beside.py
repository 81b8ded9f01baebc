"""An index that stands beside a shard: taken in place of reading all headers, and only where it is of that shard."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from faulty_server import Server
from reading import QUICK, Write, keys_in

from distill_core.data.tar_shards import BESIDE, TarShard
from distill_core.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("DISTILL_CACHE", str(folder))
    return folder


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards whose headers are read."""
    names: list[str] = []
    build = TarShard._build_index

    def noted(self: TarShard) -> object:
        names.append(self.name)
        return build(self)

    monkeypatch.setattr(TarShard, "_build_index", noted)
    return names


def indexed(path: Path, cache: Path) -> Path:
    """The index beside a shard, written; the cache is empty again."""
    shard = TarShard(path)
    shard.prepare(QUICK)
    index = shard.write_index()
    shutil.rmtree(cache)
    return index


def keys(name: Path | str) -> list[str]:
    shard = TarShard(name)
    shard.prepare(QUICK)
    return [str(shard[number]["__key__"]) for number in range(len(shard))]


def test_it_is_taken_wherever_the_shard_is_moved(
    tmp_path: Path, cache: Path, write_shards: Write, scans: list[str]
) -> None:
    """Would catch an index that depends on the file's time or place, which a copy changes."""
    (path,) = write_shards(tmp_path / "a", 1, 7)
    index = indexed(path, cache)
    assert index == Path(f"{path}{BESIDE}")
    scans.clear()
    moved = tmp_path / "b" / "other.tar"
    moved.parent.mkdir()
    shutil.copyfile(path, moved)
    shutil.copyfile(index, f"{moved}{BESIDE}")
    assert keys(path) == keys(moved) == keys_in([path])
    assert scans == []


@pytest.mark.parametrize("same_size", [True, False])
def test_that_of_another_shard_is_refused(
    tmp_path: Path, cache: Path, write_shards: Write, capsys: pytest.CaptureFixture[str], same_size: bool
) -> None:
    """A shard that was written again, to the same size too: would catch samples that are cut at the old places."""
    (path,) = write_shards(tmp_path, 1, 7)
    size = path.stat().st_size
    index = indexed(path, cache)
    if same_size:
        (again,) = write_shards(tmp_path, 1, 7, prefix="again")  # its pictures are others, of other lengths
        again.rename(path)
    else:
        write_shards(tmp_path, 1, 40)
    assert (path.stat().st_size == size) == same_size
    assert keys(path) == keys_in([path])
    assert capsys.readouterr().err.startswith(f"warning: {index}: is not of the shard as it is now")


@pytest.mark.parametrize("content", [b"", b"<html>not here</html>", b"\x93NUMPY"])
def test_what_is_no_index_is_refused(
    tmp_path: Path, write_shards: Write, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = write_shards(tmp_path, 1, 3)
    Path(f"{path}{BESIDE}").write_bytes(content)
    assert keys(path) == keys_in([path])
    assert "is not used" in capsys.readouterr().err


def test_a_url_has_a_length_before_it_is_fetched(
    tmp_path: Path, cache: Path, write_shards: Write, server: Server, scans: list[str]
) -> None:
    (path,) = write_shards(tmp_path, 1, 7)
    index = indexed(path, cache)
    url = server.url(path)
    server.url(index)
    scans.clear()
    shard = TarShard(url)
    shard.prepare(QUICK)
    assert len(shard) == 7
    assert not (cache / "shards").exists()  # not yet
    assert keys(url) == keys_in([path])
    assert scans == []


def test_a_url_with_an_index_of_another_shard(
    tmp_path: Path, cache: Path, write_shards: Write, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """Would catch a length that is believed though the server has another file."""
    (path,) = write_shards(tmp_path, 1, 7)
    server.url(indexed(path, cache))
    write_shards(tmp_path, 1, 40)
    assert len(keys(server.url(path))) == 40
    assert "is not used" in capsys.readouterr().err


def test_a_url_without_an_index_that_answers_with_a_page(tmp_path: Path, write_shards: Write, server: Server) -> None:
    """Some servers answer 200 for all paths."""
    (path,) = write_shards(tmp_path, 1, 3)
    url = server.url(path)
    server.files[f"/{path.name}{BESIDE}"] = b"<html>"
    assert keys(url) == keys_in([path])


def test_only_a_plain_tar_of_this_machine_gets_one(tmp_path: Path, write_shards: Write, server: Server) -> None:
    (path,) = write_shards(tmp_path, 1, 3)
    shard = TarShard(server.url(path))
    shard.prepare(QUICK)
    with pytest.raises(DataError, match="beside it"):
        shard.write_index()
