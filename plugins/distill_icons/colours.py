"""Colours that have a name: one drawn within each name's bounds, on a ground from which it stands out."""

from __future__ import annotations

from colorsys import hsv_to_rgb
from dataclasses import dataclass

import numpy as np

# Berlin and Kay's eleven basic terms. Bounds of hue (degrees), saturation and value well inside what people call so.
_BOUNDS = {
    "red": ((-6, 5), (0.8, 1.0), (0.7, 0.95)),
    "orange": ((24, 33), (0.85, 1.0), (0.92, 1.0)),
    "yellow": ((50, 58), (0.75, 1.0), (0.92, 1.0)),
    "green": ((105, 145), (0.6, 1.0), (0.4, 0.75)),
    "blue": ((210, 232), (0.7, 1.0), (0.55, 0.95)),
    "purple": ((270, 290), (0.5, 0.85), (0.5, 0.8)),
    "pink": ((325, 342), (0.3, 0.55), (0.95, 1.0)),
    "brown": ((18, 28), (0.6, 0.8), (0.35, 0.5)),
    "black": ((0, 360), (0.0, 0.1), (0.0, 0.1)),
    "grey": ((0, 360), (0.0, 0.05), (0.42, 0.62)),
    "white": ((0, 360), (0.0, 0.03), (0.97, 1.0)),
}
NAMES = tuple(_BOUNDS)
CONTRAST = 3.0
"""Least ratio of luminances (WCAG 2's) between an icon and its ground: thin lines stay visible."""


@dataclass(frozen=True)
class Colour:
    """A colour and what it is called."""

    name: str
    rgb: tuple[int, int, int]

    @property
    def hex(self) -> str:
        """`#c81e1e`."""
        return "#{:02x}{:02x}{:02x}".format(*self.rgb)

    @property
    def luminance(self) -> float:
        """Relative luminance of sRGB, in [0, 1]."""
        linear = [(c / 12.92) if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in self.rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


PAPER = Colour("white", (255, 255, 255))
"""The ground that a transparent picture is made for: the default `background` of image augmentations."""


def drawn(rng: np.random.Generator) -> Colour:
    """A name, each as likely, and a colour of it."""
    name = NAMES[int(rng.integers(len(NAMES)))]
    hue, saturation, value = (float(rng.uniform(*bounds)) for bounds in _BOUNDS[name])
    red, green, blue = (round(255 * v) for v in hsv_to_rgb(hue / 360 % 1, saturation, value))
    return Colour(name, (red, green, blue))


def on(ground: Colour, rng: np.random.Generator) -> Colour:
    """A colour of another name that stands out from the ground."""
    while True:
        colour = drawn(rng)
        if colour.name != ground.name and contrast(colour, ground) >= CONTRAST:
            return colour


def contrast(one: Colour, other: Colour) -> float:
    """WCAG 2's ratio, from 1 to 21."""
    darker, lighter = sorted((one.luminance, other.luminance))
    return (lighter + 0.05) / (darker + 0.05)
