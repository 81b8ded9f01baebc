"""Embeddings on disk: npy with a file of keys beside it, or parquet."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill_core.errors import UserError


def write(path: Path, embedded: Tensor, keys: list[str]) -> None:
    """Embeddings [N, D] and N keys, whole or not at all; parquet has columns `key`, `embedding`. Raises `UserError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(f"{path}: parquet needs pyarrow: pip install pyarrow, or write .npy") from error
        values = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(embedded.numpy().ravel()), embedded.shape[1])
        table = pyarrow.table({"key": pyarrow.array(keys), "embedding": values})
        _whole(path, lambda file: pyarrow.parquet.write_table(table, file))
        return
    _whole(_keys(path), lambda file: file.write("".join(f"{key}\n" for key in keys).encode()))
    _whole(path, lambda file: np.save(file, embedded.numpy(), allow_pickle=False))


def read(path: Path) -> tuple[Tensor, list[str]] | None:
    """What `write` wrote as npy; None where there is none."""
    if not path.is_file() or not _keys(path).is_file():
        return None
    keys = _keys(path).read_text(encoding="utf-8").splitlines()
    embedded = torch.from_numpy(np.load(path, allow_pickle=False))
    return (embedded, keys) if len(keys) == len(embedded) else None


def _keys(path: Path) -> Path:
    return path.with_suffix(".keys.txt")


def _whole(path: Path, fill: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            fill(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
