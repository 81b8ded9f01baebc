"""Reads state dicts and configs from files that a user names: tensors and JSON only, never code."""

from __future__ import annotations

import json
import pickle
import re
import shlex
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_core.errors import UserError

StateDict = dict[str, Tensor]
USUAL_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "module")
"""Keys of a state dict in the checkpoints of common training scripts; the first one present is used, as in timm."""


def read_state_dict(path: Path, key: str | None = None) -> tuple[StateDict, list[str]]:
    """`choose` of `read_tensors`. Raises `UserError` for what is missing, not readable, or no state dict."""
    return choose(read_tensors(path), path, key)


def read_tensors(path: Path) -> Any:
    """The content of a `.safetensors` or torch file. Raises `UserError`."""
    if not path.is_file():
        raise UserError(f"weights: {path}: no such file")
    if _is_torchscript(path):
        new = path.with_name(f"{path.stem}-state.pt")
        old_name, new_name = (json.dumps(str(name), ensure_ascii=False) for name in (path, new))  # no single quotes
        code = f'torch.save(torch.jit.load({old_name}, map_location="cpu").state_dict(), {new_name})'
        raise UserError(
            f"weights: {path}: a TorchScript archive, which is code and is never run here. If you trust it, save its "
            f"tensors as follows and name {new.name} instead:\n  python -c {shlex.quote(f'import torch; {code}')}"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's message advises to load it unsafely
        match = re.search(r"WeightsUnpickler error:\s*([^\n]*?)(?:\. Please use|\n|$)", str(error))
        what = f" ({match[1]})" if match else ""
        raise UserError(
            f"weights: {path}: cannot be loaded: no torch file of tensors alone{what}; write one with "
            "torch.save(model.state_dict(), ...), or a .safetensors file"
        ) from error
    except Exception as error:
        raise UserError(f"weights: {path}: cannot be loaded: {error}") from error


def unwrapped(state: Mapping[str, Tensor]) -> StateDict:
    """The state dict without the prefixes of torch.compile, DistributedDataParallel and AveragedModel.

    Raises `UserError` where two names become one.
    """
    items = [(name.replace("_orig_mod.", ""), value) for name, value in state.items() if name != "n_averaged"]
    while items and all(name.startswith("module.") for name, _ in items):
        items = [(name.removeprefix("module."), value) for name, value in items]
    state_dict = dict(items)
    if len(state_dict) < len(items):
        twice = next(name for name in state_dict if sum(other == name for other, _ in items) > 1)
        raise UserError(f"weights: the state dict holds {twice!r} twice, once with `_orig_mod.` in its name")
    return state_dict


def choose(content: Any, path: Path, key: str | None) -> tuple[StateDict, list[str]]:
    """The state dict of a file, and a line on the choice where it holds more than that; `key` names one of several.

    Raises `UserError` where there is none, or there are several under unusual names.
    """
    if key is None and _is_state_dict(content):
        return {str(name): value for name, value in content.items()}, []
    entries = {str(name): value for name, value in content.items()} if isinstance(content, dict) else {}
    names = [name for name, value in entries.items() if _is_state_dict(value)]
    if key is not None:
        if not isinstance(entries.get(key), dict):
            listed = ", ".join(names) or "none"
            raise UserError(f"weights: {path}: holds no state dict {key!r} (there are: {listed})")
        return choose(entries[key], path, None)
    usual = [name for name in USUAL_KEYS if name in names]
    if not names:
        raise UserError(f"weights: {path}: holds no state dict (a mapping of names to tensors)")
    if not usual and len(names) > 1:
        raise UserError(
            f"weights: {path}: holds {len(names)} state dicts: {', '.join(names)}; say which: key: {names[0]}"
        )
    chosen = (usual or names)[0]
    others = ", ".join(name for name in names if name != chosen)
    state = {str(name): value for name, value in entries[chosen].items()}
    return state, [f"its {chosen!r} was used" + (f" (`key` may also be: {others})" if others else "")]


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(item, Tensor) for item in value.values())


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):  # damaged: loading it will report so
        return False


def read_folder(folder: Path, names: Sequence[str], key: str | None = None) -> tuple[StateDict, list[str]]:
    """The first of these files that a folder has; `NAME.index.json` beside it names the parts of a large one.

    Returns what `read_state_dict` does. Raises `UserError` where there is none.
    """
    for name in names:
        if (folder / name).is_file():
            return read_state_dict(folder / name, key)
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts = read_json(index).get("weight_map", {})
            if (
                not isinstance(parts, dict)
                or not parts
                or any(not isinstance(part, str) or Path(part).name != part or part == ".." for part in parts.values())
            ):
                raise UserError(f"weights: {index}: does not name files of its own folder")
            merged: StateDict = {}
            for part in sorted(set(parts.values())):
                merged |= read_state_dict(folder / part)[0]
            return merged, []
    raise UserError(f"weights: {folder}: holds no weights ({', '.join(names)})")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `UserError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"weights: {path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"weights: {path}: is no JSON object")
    return content
