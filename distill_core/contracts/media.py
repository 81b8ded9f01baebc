"""What there is to look at beside numbers: images and distributions that components give and a tracker takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


Rendered = Any
"""What a view looks like to a person: a PIL image or a str; None where it cannot be shown."""


TokenLayout = tuple[int, int] | list[str]
"""What the tokens of a view are to a person: rows and columns of a grid over its picture, row by row, or a str for each
token that is no padding, followed by a space where a word ends."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture (a PIL image, a path, or an array [H, W, 3] of uint8) and the words that belong to it."""

    name: str
    picture: Any
    caption: str = ""
    context: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Values [N] whose histogram is to be seen."""

    name: str
    values: np.ndarray
    context: Mapping[str, str] = field(default_factory=dict)


Media = Picture | Distribution
