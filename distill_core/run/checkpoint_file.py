"""The file of a checkpoint: written completely or not at all; read without unpickling code, and only if undamaged.

It is the zip archive that `torch.save` writes, with the digest of that archive as its comment: both are in one file,
which is complete or absent.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, cast

import torch

from distill_core.errors import UserError
from distill_core.system.files import cannot_write, temporary_for

COMMENT = b"sha256:"
TAIL = 2 + len(COMMENT) + 64
"""Bytes of a comment with a digest, and of its length before it."""


class Damaged(Exception):
    """What is wrong with a file, in a line that begins with its name."""


def write(path: Path, content: Any, second: Path | None = None) -> str:
    """Write an archive; returns its digest. `second` is another name for it, which a file may have already.

    Raises `UserError`; a file that had the name then has it still.
    """
    temporary = temporary_for(path)
    size = 0
    try:
        with temporary.open("wb") as file:
            hashed = _Hashed(file)
            torch.save(content, cast(IO[bytes], hashed))
            size = hashed.size
            digest = hashed.finish()
            file.flush()
            os.fsync(file.fileno())
        if second is not None:
            link(temporary, second)
        temporary.replace(path)
    except OSError as error:
        raise UserError(cannot_write(path, error, size)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return digest


def read(path: Path, *, check: bool = True, mapped: bool = False) -> tuple[str, Any]:
    """(digest, content); without `check` the digest is that which the file claims. Of a `mapped` file tensors are read
    when they are used.

    Both are of one open file, since another may take its name at any time. Raises `Damaged`, FileNotFoundError, and
    `UserError` for a file that may not be read, or is whole and yet not readable here.
    """
    checked = False
    try:
        with path.open("rb") as file:
            digest = _digest(file, check=check)
            checked = True
            file.seek(0)
            return digest, torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except (FileNotFoundError, MemoryError, Damaged):
        raise
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:
        reason = str(error).partition("\n")[0]
        line = f"{path}: cannot be read ({type(error).__name__}: {reason})"
        raise (UserError(f"{line}.") if checked else Damaged(line)) from error


def link(source: Path, path: Path) -> None:
    """Give a file a second name, replacing any file of that name; a copy where the file system has no hard links."""
    temporary = temporary_for(path)
    with suppress(OSError):
        temporary.unlink()
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _digest(file: IO[bytes], *, check: bool) -> str:
    """The one in the archive's comment. Raises `Damaged` where there is none; if `check`, where it is not the
    archive's."""
    damaged = f"{file.name}: cannot be read (damaged: its digest differs from the saved one"
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - TAIL))
    tail = file.read()
    length = (TAIL - 2).to_bytes(2, "little")
    if not tail.startswith(length + COMMENT):
        raise Damaged(f"{damaged}, or it is no checkpoint)")
    saved = tail.removeprefix(length + COMMENT).decode(errors="replace")
    if check:
        digest = sha256()
        file.seek(0)
        remaining = size - TAIL
        while remaining > 0 and (part := file.read(min(remaining, 1 << 20))):
            digest.update(part)
            remaining -= len(part)
        digest.update(b"\0\0")  # the comment's length, as it was before there was one
        if digest.hexdigest() != saved:
            raise Damaged(f"{damaged})")
    return saved


class _Hashed:
    """A file for `torch.save`: hashes and counts what is written.

    The first error is raised by `finish`: raised in `write`, it would surface as an internal error of torch's writer.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, sha256()
        self._error: OSError | None = None
        self.size = TAIL - 2

    def write(self, data: memoryview) -> int:
        self.size += len(data)
        if self._error is None:
            self._hash.update(data)
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        return len(data)

    def flush(self) -> None:
        """Does nothing: whoever writes the file flushes it once the digest is written."""

    def finish(self) -> str:
        """Add the digest, which is returned. Raises OSError when anything could not be written."""
        if self._error is not None:
            raise self._error
        digest = self._hash.hexdigest()
        comment = COMMENT + digest.encode()
        self._file.seek(-2, os.SEEK_END)
        self._file.write(len(comment).to_bytes(2, "little") + comment)
        return digest
