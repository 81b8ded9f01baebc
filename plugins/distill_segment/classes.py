"""Classes and masks: what a sample's fields `classes.txt` and `mask.png` hold."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from distill_core import BadSample, DataError

IGNORE = 255
"""The mask's value where nothing is scored."""

MASK_FORMATS = ("png", "tiff", "bmp", "gif")
"""Formats of masks, all without loss; no others are decoded."""

Classes = Sequence[tuple[str, ...]]
"""The words for each class; the first is its name."""


def parse_classes(text: str, where: str) -> list[tuple[str, ...]]:
    """A class a line, in the order of the masks' values; words for one class are separated by commas.

    Raises `DataError` for a line without a word, a name that comes twice, or more classes than a mask can tell apart.
    """
    classes: list[tuple[str, ...]] = []
    for number, line in enumerate(text.rstrip().splitlines(), 1):
        words = tuple(word.strip() for word in line.split(",") if word.strip())
        if not words:
            raise DataError(f"{where}:{number}: no class in this line; write one a line, its words separated by commas")
        classes.append(words)
    names = names_of(classes)
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{where}: two classes are called {name!r}; put another word first in one of their lines")
    if not 0 < len(names) <= IGNORE:
        raise DataError(f"{where}: {len(names)} classes; there must be 1 to {IGNORE}")
    return classes


def read_classes(file: str) -> bytes:
    """What a file of classes holds, checked. Raises `DataError`."""
    try:
        data = Path(file).expanduser().read_bytes()
        parse_classes(data.decode(), file)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: the classes cannot be read: {error}") from error
    return data


def names_of(classes: Classes) -> list[str]:
    """The classes' names, as scores have them."""
    return [words[0].replace("/", "-") for words in classes]


def read_mask(data: bytes, ignore: int = IGNORE) -> np.ndarray:
    """Decode a mask image (one channel or a palette) -> class numbers [H, W] int64.

    Raises `BadSample`, also for values below 0, and above 255 but for `ignore`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=MASK_FORMATS) as picture:
            if picture.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
                raise BadSample(f"the mask is {picture.mode}; its pixels must be class numbers (mode L, P or I)")
            mask = np.asarray(picture).astype(np.int64)
    except UnidentifiedImageError as error:
        raise BadSample("the mask is not a picture of a known format") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadSample(f"the mask is not a readable picture: {error}") from error
    wrong = mask[((mask < 0) | (mask > IGNORE)) & (mask != ignore)]
    if wrong.size:
        raise BadSample(f"the mask has the value {wrong[0]}; class numbers are 0 to 254, and 255 is not scored")
    return mask


def write_mask(mask: np.ndarray) -> bytes:
    """Class numbers [H, W] -> a PNG of 8 bits."""
    file = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
