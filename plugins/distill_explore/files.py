"""Embeddings on disk: npy with a file of keys beside it, or parquet."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from distill_core import UserError, install


def check_out(path: Path, suffixes: Sequence[str]) -> None:
    """Raises `UserError` if `--out` cannot be written; call it before computing anything."""
    if path.suffix not in suffixes:
        raise UserError(f"--out {path}: ends in none of {', '.join(suffixes)}")
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise UserError(f"--out {path}: parquet needs pyarrow: {install('parquet')}, or write .npy")
    parent = path.absolute().parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"--out {path}: {parent} is no folder")
    if path.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--out {path}: {'is a folder' if path.is_dir() else f'{parent} cannot be written to'}")


def write(path: Path, embedded: Tensor, keys: list[str]) -> list[str]:
    """Embeddings [N, D] and N keys, atomically; parquet has columns `key`, `embedding`.

    Returns the line of `write_out` for each file, that of the embeddings first. Raises `UserError`.
    """
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        values = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(embedded.numpy().ravel()), embedded.shape[1])
        table = pyarrow.table({"key": pyarrow.array(keys), "embedding": values})
        return [write_out(path, lambda file: pyarrow.parquet.write_table(table, file))]
    keys_line = write_out(_keys(path), lambda file: file.write("".join(f"{key}\n" for key in keys).encode()))
    return [write_out(path, lambda file: np.save(file, embedded.numpy(), allow_pickle=False)), keys_line]


def read(path: Path) -> tuple[Tensor, list[str]] | None:
    """The npy file and keys that `write` wrote; None if there are none."""
    if not path.is_file() or not _keys(path).is_file():
        return None
    keys = _keys(path).read_text(encoding="utf-8").splitlines()
    embedded = torch.from_numpy(np.load(path, allow_pickle=False))
    return (embedded, keys) if len(keys) == len(embedded) else None


def _keys(path: Path) -> Path:
    return path.with_suffix(".keys.txt")


def remove(path: Path) -> None:
    """Delete the npy file and keys that `write` wrote."""
    path.unlink(missing_ok=True)
    _keys(path).unlink(missing_ok=True)


def write_out(path: Path, fill: Callable[[BinaryIO], object]) -> str:
    """Write a file atomically, and create its folder. Returns its name for messages, `FILE` or `FILE (replaced)`.

    Raises `UserError`.
    """
    line = f"{path} (replaced)" if path.exists() else str(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                fill(file)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    return line
