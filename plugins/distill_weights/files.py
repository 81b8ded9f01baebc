"""Reading weights and configs that a user names: tensors and JSON alone, nobody's code."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_core.errors import UserError

StateDict = dict[str, Tensor]
NESTED = ("state_dict", "model", "model_state_dict", "module")
"""Where training scripts put a state dict in their checkpoints."""


def read_state_dict(path: Path, key: str | None = None) -> StateDict:
    """The tensors of a `.safetensors` or torch file, without a leading `module.`.

    `key` names one of several state dicts. Raises `UserError` for what is missing, not readable, or no state dict.
    """
    if not path.is_file():
        raise UserError(f"init: {path}: no such file")
    if _is_torchscript(path):
        raise UserError(
            f"init: {path}: a TorchScript archive, which is code. Save what it holds first, where you trust it: "
            "torch.save(torch.jit.load(FILE, map_location='cpu').state_dict(), NEW)"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"init: {path}: cannot be loaded: {error}") from error
    if isinstance(found, dict) and key is not None:
        if not isinstance(found.get(key), dict):
            raise UserError(f"init: {path}: holds no state dict {key!r} (there are: {', '.join(map(str, found))})")
        found = found[key]
    if isinstance(found, dict):
        for name in NESTED:
            if isinstance(found.get(name), dict):
                found = found[name]
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"init: {path}: holds no state dict (a mapping of names to tensors)")
    return {str(name).removeprefix("module."): value for name, value in found.items()}


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def read_folder(folder: Path, names: Sequence[str]) -> StateDict:
    """The first of these files that a folder has; `NAME.index.json` beside it names the parts of a large one.

    Raises `UserError` where there is none.
    """
    for name in names:
        if (folder / name).is_file():
            return read_state_dict(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts = read_json(index).get("weight_map", {})
            if not isinstance(parts, dict) or any(
                not isinstance(part, str) or Path(part).name != part for part in parts.values()
            ):
                raise UserError(f"init: {index}: does not name files of its own folder")
            merged: StateDict = {}
            for part in sorted(set(parts.values())):
                merged |= read_state_dict(folder / part)
            return merged
    raise UserError(f"init: {folder}: holds no weights ({', '.join(names)})")


def read_json(path: Path) -> dict[str, Any]:
    """An object. Raises `UserError`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"init: {path}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"init: {path}: is no JSON object")
    return found
