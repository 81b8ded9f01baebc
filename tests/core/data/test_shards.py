"""Shards that cannot be read for a moment, or for good: files, URLs and commands."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faulty_server import Server
from reading import QUICK, Write, keys_in

from distill_core.data.opening import open_shard
from distill_core.data.shard import Patience
from distill_core.data.tar_samples import read_shard
from distill_core.data.tar_shards import TarShard
from distill_core.errors import DataError


@contextmanager
def within(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


def read(shard: str, patience: Patience = QUICK) -> tuple[list[str], str | None]:
    """The keys, and the error at the end."""
    keys: list[str] = []
    message = None
    try:
        for sample in read_shard(shard, patience):
            keys.append(str(sample["__key__"]))
    except DataError as error:
        message = str(error)
    assert message is None or "\n" not in message
    return keys, message


FAULTS = [404, 503, "refuse", "close", "cut", "stall"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_url_that_fails_for_a_moment_loses_and_repeats_nothing(
    tmp_path: Path, write_shards: Write, server: Server, fault: int | str
) -> None:
    """Catches a retry that begins again with samples that were handed out, and a fault that passes for the end."""
    (path,) = write_shards(tmp_path, 1, 30)
    url = server.url(path)
    server.faults = [fault, fault]
    with within(100):
        assert read(url) == (keys_in([path]), None)
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (404, "the server answers 404"),
        (503, "the server answers 503"),
        ("refuse", "closed connection"),
        ("close", "the server closed the connection"),
        ("cut", "cut off"),
        ("stall", "timed out"),
    ],
)
def test_a_url_that_fails_for_good_is_named_after_its_retries(
    tmp_path: Path, write_shards: Write, server: Server, fault: int | str, reason: str
) -> None:
    (path,) = write_shards(tmp_path, 1, 30)
    url = server.url(path)
    server.faults = [fault] * 20
    with within(100):
        keys, error = read(url)
    assert error is not None
    assert error.startswith(f"{url}: cannot be read: ")
    assert reason in error
    assert keys == keys_in([path])[: len(keys)]
    assert (len(keys) > 0) == (fault in ("close", "cut", "stall"))
    assert len(server.requests) == 3 if not keys else 3 <= len(server.requests) <= 5


def test_nobody_listens(server: Server, tmp_path: Path, write_shards: Write) -> None:
    (path,) = write_shards(tmp_path, 1, 3)
    url = server.url(path)
    server.close()
    with within(100):
        keys, error = read(url)
    assert keys == []
    assert error is not None
    assert "refused" in error


def test_a_url_with_a_user(server: Server, tmp_path: Path, write_shards: Write) -> None:
    (path,) = write_shards(tmp_path, 1, 3)
    url = server.url(path).replace("http://", "http://me:a%40b@")
    assert read(url) == (keys_in([path]), None)
    assert server.headers[0]["Authorization"] == "Basic bWU6YUBi"  # me:a@b


def command(path: Path, first: str) -> str:
    """`pipe:`: `first` runs before cat, once only."""
    mark = shlex.quote(str(path.with_suffix(".once")))
    return f"pipe:[ -e {mark} ] || {{ touch {mark}; {first}; }}; cat {shlex.quote(str(path))}"


@pytest.mark.parametrize("first", ["exit 3", "head -c 20000 FILE; exit 3", "head -c 20000 FILE; exit 0", "sleep 300"])
def test_a_command_that_fails_for_a_moment_loses_and_repeats_nothing(
    tmp_path: Path, write_shards: Write, first: str
) -> None:
    (path,) = write_shards(tmp_path, 1, 30)
    assert path.stat().st_size > 40_000
    with within(100):
        assert read(command(path, first.replace("FILE", shlex.quote(str(path))))) == (keys_in([path]), None)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("echo what is wrong >&2; exit 3", "the command ended with status 3: what is wrong"),
        ("head -c 20000 FILE; exit 3", "the command ended with status 3"),
        ("head -c 20000 FILE", "cut off"),
        ("head -c 20000 FILE; sleep 300", f"wrote nothing for {QUICK.timeout:g} s"),
        ("cat FILE; exit 3", "the command ended with status 3"),
        ("no-such-command-here", "the command ended with status 127"),
    ],
)
def test_a_command_that_fails_for_good_is_named_after_its_retries(
    tmp_path: Path, write_shards: Write, line: str, reason: str
) -> None:
    (path,) = write_shards(tmp_path, 1, 30)
    runs = tmp_path / "runs"
    shard = f"pipe:echo >> {shlex.quote(str(runs))}; {line.replace('FILE', shlex.quote(str(path)))}"
    with within(100):
        keys, error = read(shard)
    assert error is not None
    assert reason in error
    assert keys == keys_in([path])[: len(keys)]
    assert bool(keys) == ("FILE" in line)
    assert len(runs.read_text()) == 3 if not keys else 4


@pytest.mark.parametrize(("scheme", "command"), [("s3", "aws s3 cp --quiet"), ("gs", "gsutil -q cat")])
def test_urls_of_stores(
    tmp_path: Path, write_shards: Write, monkeypatch: pytest.MonkeyPatch, scheme: str, command: str
) -> None:
    """Their own tools read them, in whose place a script is. Catches a name that the shell takes for more than a name,
    and a reason that is lost."""
    (path,) = write_shards(tmp_path / "a bucket", 1, 4)
    tool, *words = command.split()
    url = f"{scheme}://a bucket/$(x);{path.name}"
    arguments = " ".join([*words, url])
    wrong = "NoSuchKey: there is no such object"
    script = tmp_path / "bin" / tool
    script.parent.mkdir()
    script.write_text(
        f"#!/bin/sh\ncase \"$*\" in '{arguments}'*) exec cat '{path}' ;; esac\necho '{wrong}' >&2\nexit 1\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")
    assert [sample["__key__"] for sample in read_shard(url)] == [f"train-0-{i}" for i in range(4)]
    with pytest.raises(DataError, match=f"the command ended with status 1: {wrong}"):
        list(read_shard(f"{scheme}://a bucket/other.tar", Patience(retries=0)))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(DataError, match=f"ended with status 127: .*{tool}: not found"):
        list(read_shard(url, Patience(retries=0)))


def test_a_command_ends_with_its_reader(tmp_path: Path, write_shards: Write) -> None:
    """Catches a shell that is closed and a child of it that lives on, and a reader that waits for either."""
    (path,) = write_shards(tmp_path, 1, 3)
    pid = tmp_path / "pid"
    shard = f"pipe:cat {shlex.quote(str(path))}; sleep 300 & echo $! > {shlex.quote(str(pid))}; wait"
    with within(100), open_shard(shard, 5) as file:
        assert file.read(512) == path.read_bytes()[:512]
        while not pid.exists() or not pid.read_text().strip():
            time.sleep(0.01)
    with within(100):
        while _lives(int(pid.read_text())):
            time.sleep(0.01)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_file_that_is_away_for_a_moment(tmp_path: Path, write_shards: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = write_shards(tmp_path, 1, 4)
    away = path.with_suffix(".away")
    path.rename(away)
    monkeypatch.setattr("time.sleep", lambda seconds: away.rename(path))
    assert read(str(path)) == (keys_in([path]), None)


def test_back_off_grows_and_a_damaged_file_is_not_read_again(
    tmp_path: Path, write_shards: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = write_shards(tmp_path, 1, 4)
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr("distill_core.data.shard.BACK_OFF", 1.0)
    path.write_bytes(path.read_bytes()[:3000])
    assert read(str(path), Patience(retries=5))[1] is not None
    assert waits == []
    path.unlink()
    assert "No such file" in str(read(str(path), Patience(retries=5))[1])
    assert waits == [1, 4, 16, 60, 60]
    waits.clear()
    assert read(str(path), Patience(retries=0))[1] is not None
    assert waits == []


@pytest.mark.parametrize("shard", ["nothing://at/all.tar", "http://[", "http://127.0.0.1:notaport/x.tar"])
def test_urls_that_are_none(shard: str) -> None:
    keys, error = read(shard)
    assert keys == []
    assert error is not None
    assert shard in error


def test_shards_without_samples_are_refused_when_read(tmp_path: Path) -> None:
    shard = tmp_path / "empty.tar"
    shard.write_bytes(bytes(10240))
    assert read(str(shard)) == ([], f"{shard}: the shard is empty. Write it again, or leave it out of data.source.")
    with pytest.raises(DataError, match="is empty"):
        len(TarShard(shard))


def test_no_file_stays_open(tmp_path: Path, write_shards: Write, server: Server) -> None:
    """Where samples are read to the end, only to the first, or fail."""
    (path,) = write_shards(tmp_path, 1, 30)
    url = server.url(path)
    server.faults = ["close", 404]
    shards = [str(path), url, f"pipe:cat {path}", f"pipe:cat {path}; exit 3"]
    read(url), next(iter(read_shard(url)))  # whatever is opened once for all
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        for shard in shards:
            read(shard)
            next(iter(read_shard(shard)))
    end = time.monotonic() + 100
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < end:
        time.sleep(0.05)  # the server's own side
    assert len(os.listdir("/proc/self/fd")) <= before
