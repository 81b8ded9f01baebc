"""SVG to pixels, without the system's fonts: a picture must not depend on the machine."""

from __future__ import annotations

from io import BytesIO

from PIL import Image


class Refused(Exception):
    """There is no usable picture; the message says why."""


def rasterize(svg: str, size: int, name: str) -> bytes:
    """A PNG with alpha whose longer side is about `size`. Raises `Refused` where resvg refuses it or it is blank."""
    import resvg_py

    try:
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True))
    except ValueError as error:
        raise Refused(f"{name}: {error}") from None
    with Image.open(BytesIO(png)) as picture:
        if picture.getbbox() is None:
            raise Refused("blank")
    return png


def squared(picture: Image.Image, size: int) -> Image.Image:
    """The picture in the middle of a transparent square, [size, size] RGBA."""
    side = max(picture.size)
    square = Image.new("RGBA", (side, side))
    square.paste(picture.convert("RGBA"), ((side - picture.width) // 2, (side - picture.height) // 2))
    if side != size:
        # resized with colours multiplied by alpha: transparent pixels must not darken the edge
        square = square.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")
    return square


def png_of(picture: Image.Image) -> bytes:
    """The picture as PNG."""
    out = BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()
