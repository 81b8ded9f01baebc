"""Icons as coverage, how much of each pixel they fill, and colours laid through it."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image

from distill_drawn.svg import Refused, rasterize, squared
from distill_icons.colours import Colour

FAINT = 0.012
"""Least share of a picture that an icon covers; with less there is nothing to see."""
WHOLE = 0.97
"""Most: an icon that fills its picture has no shape."""


def coverage(svg: str, size: int, name: str) -> Image.Image:
    """Grey [size, size]: 255 where the icon is; it has 84 % of the side. Raises `Refused`."""
    inner = max(1, round(0.84 * size))
    with Image.open(BytesIO(rasterize(svg, inner, name))) as picture:
        alpha = squared(picture, inner).getchannel("A")
    share = float(np.asarray(alpha).mean()) / 255
    if share < FAINT:
        raise Refused("too faint to see")
    if share > WHOLE:
        raise Refused("a picture that is filled")
    whole = Image.new("L", (size, size))
    whole.paste(alpha, ((size - inner) // 2, (size - inner) // 2))
    return whole


def on_ground(shape: Image.Image, colour: Colour, ground: Colour) -> Image.Image:
    """RGB: the shape in its colour on its ground."""
    picture = Image.new("RGB", shape.size, ground.rgb)
    picture.paste(colour.rgb, (0, 0), shape)
    return picture


def transparent(shape: Image.Image, colour: Colour) -> Image.Image:
    """RGBA: the colour everywhere, its alpha the shape."""
    picture = Image.new("RGBA", shape.size, colour.rgb)
    picture.putalpha(shape)
    return picture
