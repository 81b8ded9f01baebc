"""Writes the pictures and distributions of tasks to PNG files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_core.contracts.media import Distribution, Media, Picture
from distill_core.errors import UserError

SHARED = ("model", "set")
"""Keys of the context; distributions with the same values of these are drawn together."""


def write_pictures(folder: Path, media: Sequence[Media]) -> list[Path]:
    """A PNG for each picture, and one for the distributions of a name, side and set. Raises `UserError`."""
    from PIL import Image

    paths: list[Path] = []
    histograms: dict[tuple[str, ...], list[Distribution]] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for item in media:
            if isinstance(item, Picture):
                content = item.picture
                image = Image.open(content) if isinstance(content, str | Path) else content
                image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
                paths.append(_path(folder, [item.name, *item.context.values()], paths))
                image.save(paths[-1])
            else:
                key = (item.name, *(str(item.context.get(part, "")) for part in SHARED))
                histograms.setdefault(key, []).append(item)
        for key, items in histograms.items():
            paths.append(_path(folder, key, paths))
            _histogram(items, " ".join(key)).savefig(paths[-1], dpi=110)
    except OSError as error:
        raise UserError(f"{folder}: pictures cannot be written: {error.strerror or error}") from error
    return paths


def _histogram(items: Sequence[Distribution], title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    finite = [item.values[np.isfinite(item.values)] for item in items]
    edges = np.histogram_bin_edges(np.concatenate(finite), 60)
    for item, values in zip(items, finite, strict=True):
        label = " ".join(value for part, value in item.context.items() if part not in SHARED)
        axes.hist(values, edges.tolist(), density=True, alpha=0.6, label=f"{label} ({len(values)})")
    axes.set(xlabel=items[0].name.rpartition("/")[2], ylabel="density", title=title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _path(folder: Path, parts: Sequence[str], used: Sequence[Path]) -> Path:
    """An unused file name, of characters that every file system accepts."""
    name = re.sub(r"[^A-Za-z0-9._+-]+", "_", "-".join(str(part) for part in parts if part)).strip("._")[:120]
    path, i = folder / f"{name}.png", 2
    while path in used:
        path, i = folder / f"{name}-{i}.png", i + 1
    return path
