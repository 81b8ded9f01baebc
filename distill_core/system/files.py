"""Files: the cache folder, atomic writes, sizes and free space."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path


def cache_folder() -> Path:
    """`$DISTILL_CACHE`, else `$XDG_CACHE_HOME/distill`, else `~/.cache/distill`."""
    if given := os.environ.get("DISTILL_CACHE"):
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "distill"


def temporary_for(path: Path) -> Path:
    """Where this process writes a file that takes its name when it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes have left of `temporary_for`, from a folder that no other process writes to."""
    for path in folder.glob(".*.*"):
        if path.suffix[1:].isdecimal():
            with suppress(OSError):  # it takes room, and does no other harm
                path.unlink()


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: it is there in full or not at all, whenever the process is killed."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """`write_whole` of bytes."""
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
    """Bytes of the files in a folder, a file of two names counted once; 0 where there is none."""
    seen: dict[tuple[int, int], int] = {}
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(root, name))
            except FileNotFoundError:  # a running run has just removed it
                continue
            seen[found.st_dev, found.st_ino] = found.st_size
    return sum(seen.values())


def free_at(folder: Path) -> int:
    """Bytes that are free where a folder is, or would be made."""
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
