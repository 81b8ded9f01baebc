"""What tasks give to see, as files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_core.contracts.media import Distribution, Media, Picture
from distill_core.errors import UserError

ONE = ("model", "set")
"""Distributions that agree in these are drawn together."""


def write_pictures(folder: Path, media: Sequence[Media]) -> list[Path]:
    """A PNG for each picture, and one for the distributions of a name, side and set. Raises `UserError`."""
    from PIL import Image

    written: list[Path] = []
    histograms: dict[tuple[str, ...], list[Distribution]] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for item in media:
            if isinstance(item, Picture):
                given = item.picture
                image = Image.open(given) if isinstance(given, str | Path) else given
                image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
                written.append(_path(folder, [item.name, *item.context.values()], written))
                image.save(written[-1])
            else:
                key = (item.name, *(str(item.context.get(part, "")) for part in ONE))
                histograms.setdefault(key, []).append(item)
        for key, items in histograms.items():
            written.append(_path(folder, key, written))
            _histogram(items, " ".join(key)).savefig(written[-1], dpi=110)
    except OSError as error:
        raise UserError(f"{folder}: pictures cannot be written: {error.strerror or error}") from error
    return written


def _histogram(items: Sequence[Distribution], title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    finite = [item.values[np.isfinite(item.values)] for item in items]
    edges = np.histogram_bin_edges(np.concatenate(finite), 60)
    for item, values in zip(items, finite, strict=True):
        label = " ".join(value for part, value in item.context.items() if part not in ONE)
        axes.hist(values, edges.tolist(), density=True, alpha=0.6, label=f"{label} ({len(values)})")
    axes.set(xlabel=items[0].name.rpartition("/")[2], ylabel="density", title=title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _path(folder: Path, parts: Sequence[str], taken: Sequence[Path]) -> Path:
    """A name that is no other's, of letters that every file system takes."""
    name = re.sub(r"[^A-Za-z0-9._+-]+", "_", "-".join(str(part) for part in parts if part)).strip("._")[:120]
    path, i = folder / f"{name}.png", 2
    while path in taken:
        path, i = folder / f"{name}-{i}.png", i + 1
    return path
