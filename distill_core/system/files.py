"""Files: the cache folder, atomic writes, sizes and free space."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path


def cache_folder() -> Path:
    """`$DISTILL_CACHE`, else `$XDG_CACHE_HOME/distill`, else `~/.cache/distill`."""
    if override := os.environ.get("DISTILL_CACHE"):
        return Path(override).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "distill"


def temporary_for(path: Path) -> Path:
    """The file that this process writes before renaming it to `path` once it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def remove_temporaries(folder: Path) -> None:
    """Remove the `temporary_for` files of killed processes from a folder that no other process writes to."""
    for path in folder.glob(".*.*"):
        if path.suffix[1:].isdecimal():
            with suppress(OSError):  # it only takes space
                path.unlink()


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically: if the process is killed, the file is complete or absent."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """As `write_whole`, for bytes."""
    temporary = temporary_for(path)
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def cannot_write(path: Path, error: OSError, size: int = 0) -> str:
    """`PATH: cannot be written: REASON`; where the disk is full, with the free space and the `size` needed."""
    line = f"{path}: cannot be written: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        needed = f"it takes {in_words(size)}, and " if size else ""
        line += f" ({needed}{in_words(free_at(path.parent))} are free)"
    return line


def size_of(folder: Path) -> int:
    """Total bytes of the files in a folder, hard links counted once; 0 if there is no such folder."""
    sizes: dict[tuple[int, int], int] = {}
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(root, name))
            except FileNotFoundError:  # a running run has just removed it
                continue
            sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())


def make_room(folder: Path, newest: Path, room: float, pattern: str) -> list[Path]:
    """Remove the files of a folder that were not used for the longest time, until the rest takes at most `room` bytes;
    what it has removed. A reader that has one open keeps it."""
    copies: list[tuple[float, int, Path]] = []
    for copy in folder.glob(pattern):
        with suppress(FileNotFoundError):
            status = copy.stat()
            copies.append((status.st_mtime, status.st_size, copy))
    total = sum(size for _, size, _ in copies)
    removed: list[Path] = []
    for _, size, copy in sorted(copies):
        if total <= room:
            break
        if copy != newest:
            copy.unlink(missing_ok=True)
            removed.append(copy)
            total -= size
    return removed


def free_at(folder: Path) -> int:
    """Free bytes on the file system of a folder, which need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def in_words(size: float) -> str:
    """Bytes as `12 MB` or `3.4 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.{0 if size >= 10 or unit == 'B' else 1}f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
