"""Reading a tar strictly: as a stream, or its headers alone.

The standard library takes much damage for the end of an archive when it reads a stream: a header whose checksum is
wrong, one that is cut off, zeros where members should be. Here only a closing block of zeros is the end.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
ZEROS = bytes(BLOCK)
MOST_ZEROS = 2 * BLOCK + tarfile.RECORDSIZE
"""A tar ends in two blocks of zeros, and is filled up to a record."""
_CHUNK = 1 << 24


class Damaged(Exception):
    """The bytes are not those of a whole tar; the message says how."""


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file of a tar: its bytes and headers stand at `start`:`end` of the archive."""

    name: str
    content: bytes
    start: int
    end: int


def members(file: BinaryIO, *, part: bool = False) -> Iterator[Member]:
    """Every regular file, then the end is checked. Raises `Damaged`, and what reading raises.

    What is not UTF-8 in a name is written as `\\xff`, so that it may stand in any text. A `part` of an archive holds
    whole members and has no end of its own.
    """
    yield from _members(file, _read, part)


def scan(file: BinaryIO) -> Iterator[Member]:
    """`members` of a file that can seek, without their contents: headers and the end are read, and checked, alone."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)

    def skip(file: BinaryIO, length: int, name: str) -> bytes:
        if (missing := file.tell() + length - size) > 0:
            raise _cut_off(name, missing)
        file.seek(length, os.SEEK_CUR)
        return b""

    yield from _members(file, skip, part=False)


def _members(file: BinaryIO, body: Callable[[BinaryIO, int, str], bytes], part: bool) -> Iterator[Member]:
    attributes: dict[str, str] = {}  # what an extended header says of the next member
    position = start = 0
    while (block := file.read(BLOCK)) != ZEROS:
        if part and not block and not attributes:
            return
        if len(block) < BLOCK:
            where = "inside a header" if block else "without a tar's closing block of zeros"
            raise Damaged(f"ends {where}: it was cut off")
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.HeaderError as error:
            what = f"a damaged header at byte {position} ({error})" if position else "no tar header at its start"
            raise Damaged(what) from error
        name, size = attributes.get("path", info.name), int(attributes.get("size", info.size))
        if not info.isreg() and info.type in tarfile.SUPPORTED_TYPES and info.type not in _EXTENDED:
            size = 0  # links, folders and devices have no content, whatever they claim
        if size < 0 or info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in attributes):
            raise Damaged(f"{name!r} is stored as a sparse file, which is not supported")
        content = (_read if info.type in _EXTENDED else body)(file, size, name)
        _read(file, -size % BLOCK, name)
        position += BLOCK + size + -size % BLOCK
        if info.type == tarfile.GNUTYPE_LONGNAME:
            attributes["path"] = content.rstrip(b"\0").decode("utf-8", "backslashreplace")
        elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            attributes |= _records(content)
        elif info.type not in _EXTENDED:
            if info.isreg():
                yield Member(name, content, start, position)
            attributes = {}
            start = position
    _check_end(file)


_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


def _read(file: BinaryIO, size: int, name: str) -> bytes:
    """In pieces, so that a size that is nonsense does not ask for all memory at once."""
    pieces = []
    missing = size
    while missing:
        piece = file.read(min(missing, _CHUNK))
        if not piece:
            raise _cut_off(name, missing)
        pieces.append(piece)
        missing -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _cut_off(name: str, missing: int) -> Damaged:
    return Damaged(f"ends inside {name!r}, {missing} bytes before its end: it was cut off")


def _records(content: bytes) -> dict[str, str]:
    """The `LENGTH KEY=VALUE` lines of a POSIX extended header."""
    records = {}
    while content.rstrip(b"\0"):
        length, _, rest = content.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(content):
            raise Damaged("a damaged extended header")
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        records[key.decode("utf-8", "backslashreplace")] = value.decode("utf-8", "backslashreplace")
        content = content[int(length) :]
    if not records.get("size", "0").isdigit():
        raise Damaged("a damaged extended header")
    return records


def _check_end(file: BinaryIO) -> None:
    """Zeros, and no more than an archive is filled up with. Reading to the end also checks a gzip's checksum."""
    zeros = BLOCK
    while block := file.read(_CHUNK):
        if any(block):
            raise Damaged("more data follow a block of zeros, which ends a tar: what it stands in place of is lost")
        zeros += len(block)
    if zeros > MOST_ZEROS:
        raise Damaged(
            f"ends in {zeros} bytes of zeros, where a tar has at most {MOST_ZEROS} (unless it is written with another "
            "blocking factor): what stood there is lost"
        )
