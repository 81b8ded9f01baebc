"""A contact sheet: the pictures that a search found, with rank, similarity and key."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def contact_sheet(title: str, found: Sequence[tuple[Any, float, str]], path: Path, columns: int = 6) -> Path:
    """Draw (picture or None, similarity, key) in reading order. Returns the path."""
    from matplotlib.figure import Figure

    columns = min(columns, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(1.9 * columns, 2.2 * rows + 0.5), layout="constrained")
    figure.suptitle(title if len(title) <= 80 else title[:77] + "...")
    axes = figure.subplots(rows, columns, squeeze=False)
    for i, axis in enumerate(axes.flat):
        axis.axis("off")
        if i < len(found):
            picture, similarity, key = found[i]
            if picture is not None:
                axis.imshow(picture)
            name = key if len(key) <= 24 else "..." + key[-21:]
            axis.set_title(f"{i + 1}.  {similarity:.3f}\n{name}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
