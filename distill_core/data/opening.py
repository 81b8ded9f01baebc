"""Opening a shard, wherever it is: a file, a URL, or what a command writes. All fail loudly and in bounded time."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import lzma
import os
import select
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from typing import IO, Any, BinaryIO, cast
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

_BUFFER = 1 << 20
STORES = {"s3": "aws s3 cp --quiet {} -", "gs": "gsutil -q cat {}"}
"""Scheme of a URL -> the command of its store that writes an object."""


def is_local(shard: str) -> bool:
    """Whether a shard is a file of this machine (not a URL, not `pipe:COMMAND`)."""
    return "://" not in shard and not shard.startswith("pipe:")


@contextmanager
def open_shard(shard: str, timeout: float) -> Iterator[BinaryIO]:
    """The bytes of a shard, decompressed where they are gzip, bzip2 or xz, whatever its name says.

    A server that closes before it has sent all, a command that ends with an error, and either of them when it sends
    nothing for `timeout` seconds are an OSError (or an HTTPException) of the read that meets it.
    """
    try:
        raw = _open(shard, timeout)
    except ValueError as error:  # a URL that is none, or of a kind that nobody can open
        raise OSError(str(error)) from error
    with io.BufferedReader(raw, _BUFFER) as file, _decompressed(file) as plain:
        yield plain


def served_size(url: str, timeout: float) -> int | None:
    """Bytes of an http(s) URL; None where the server does not say. Raises `OSError`, and an HTTPException."""
    with _Download(url, timeout) as download:
        missing: int | None = download.missing
        return missing


def compressed(path: str) -> bool:
    """Whether a local file is gzip, bzip2 or xz; False where it cannot be opened."""
    try:
        with open(path, "rb") as file:
            return _decompressed(file) is not file
    except OSError:
        return False


def _open(shard: str, timeout: float) -> io.RawIOBase:
    from webdataset.gopen import gopen, rewrite_url

    if is_local(shard):
        return open(shard, "rb", buffering=0)
    shard = rewrite_url(shard)
    if shard.startswith(("http://", "https://")):
        return _Download(shard, timeout)
    scheme = shard.partition("://")[0]
    if scheme in STORES:
        shard = f"pipe:{STORES[scheme].format(shlex.quote(shard))}"
    if shard.startswith("pipe:"):
        errors = tempfile.TemporaryFile()  # noqa: SIM115
        # a session of its own: Ctrl-C is the trainer's to answer, and all that the shell starts can be ended
        process = subprocess.Popen(
            shard.removeprefix("pipe:"),
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            bufsize=0,
            start_new_session=True,
        )
        return _Output(process, timeout, errors)
    opened = gopen(shard)  # a file, or a command's output
    return _Output(opened.proc, timeout, owner=opened) if hasattr(opened, "proc") else opened


def _decompressed(file: io.BufferedReader[Any]) -> BinaryIO:
    start = file.peek(6)
    if start.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if start.startswith(b"BZh"):
        return cast(BinaryIO, bz2.BZ2File(file))
    if start.startswith(b"\xfd7zXZ\0"):
        return cast(BinaryIO, lzma.LZMAFile(file))
    return file


class _Download(io.RawIOBase):
    """What a web server sends. The standard library takes a connection that closes early for the end."""

    def __init__(self, url: str, timeout: float) -> None:
        parts = urlsplit(url)
        headers = {"User-Agent": "distill"}
        if parts.username is not None:  # as curl takes https://user:password@host
            user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
            url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        try:
            self._response: HTTPResponse = urlopen(Request(url, headers=headers), timeout=timeout)
        except HTTPError as error:
            error.close()
            raise OSError(f"the server answers {error.code} {error.reason}") from error
        except URLError as error:
            raise OSError(str(error.reason)) from error
        self.missing: int | None = self._response.length
        """Bytes; None where the server has not said how many there are."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.missing == 0:
            return 0
        # what has come, not all that fits: it would be lost where the server then stalls
        data = self._response.read1(len(buffer))
        buffer[: len(data)] = data
        if self.missing is not None:
            self.missing -= len(data)
            if not data:
                raise ConnectionError(f"the server closed the connection {self.missing} bytes before the end")
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._response.close()
        super().close()


class _Output(io.RawIOBase):
    """What a command writes: its status counts once all is read. Closing ends the command."""

    def __init__(
        self, process: subprocess.Popen[bytes], timeout: float, errors: IO[bytes] | None = None, owner: object = None
    ) -> None:
        self._process, self._timeout, self._errors = process, timeout, errors
        self._owner = owner  # webdataset's own wrapper closes the pipe when nobody holds it
        assert process.stdout is not None
        self._stdout = process.stdout
        self._poll = select.poll()
        self._poll.register(self._stdout, select.POLLIN)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._poll.poll(self._timeout * 1000):
            raise TimeoutError(f"the command wrote nothing for {self._timeout:g} s")
        count = os.readv(self._stdout.fileno(), [buffer])
        if count == 0:
            try:
                status = self._process.wait(self._timeout)
            except subprocess.TimeoutExpired:
                raise TimeoutError("the command closed its output and did not end") from None
            if status:
                raise OSError(f"the command ended with status {status}{self._last_error()}")
        return count

    def _last_error(self) -> str:
        if self._errors is None:
            return ""
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "backslashreplace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    def close(self) -> None:
        if not self.closed:
            self._stdout.close()
            if self._errors is None:
                self._process.kill()
            elif self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)  # the shell leads its session
            self._process.wait()
            if self._errors is not None:
                self._errors.close()
        super().close()
