"""The fields of a sample as bytes: whether they can be used, and pictures made smaller."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO

from PIL import Image

from distill_core import BadSample, Sample, Unusable
from distill_vl.pictures import PictureAugmentation, to_eight_bits

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_KEPT = ("JPEG", "PNG", "WEBP")
"""Formats that a smaller picture is written in if it was of them; others become PNG."""


def fields_of(sample: Sample) -> dict[str, bytes]:
    """Extension -> bytes. Raises `BadSample` for a field that no shard can hold."""
    if isinstance(sample, Unusable):
        sample["any field"]  # raises why
    fields: dict[str, bytes] = {}
    for name in sample:
        if name.startswith("__"):
            continue
        extension, value = name.lower(), sample[name]
        if isinstance(value, str):
            value = value.encode()
        if not isinstance(value, bytes):
            raise BadSample(f"field {name}: {type(value).__name__}, not bytes")
        if not extension or "/" in extension or extension in fields:
            raise BadSample(f"field {name!r}: {'stands twice' if extension in fields else 'no extension of a file'}")
        fields[extension] = value
    if not fields:
        raise BadSample("it has no field")
    return fields


def is_picture(field: str) -> bool:
    """Whether a field is a picture, by its extension."""
    return field.rpartition(".")[2] in PICTURES


def check(fields: Mapping[str, bytes], pictures: PictureAugmentation) -> None:
    """Raises `BadSample` for a picture that cannot be decoded, and text or json that are none."""
    for name, value in fields.items():
        kind = name.rpartition(".")[2]
        try:
            if is_picture(name):
                pictures.pixels(value)
            elif kind == "json":
                json.loads(value)
            elif kind == "txt":
                value.decode()
        except UnicodeDecodeError as error:
            raise BadSample(f"field {name}: not UTF-8 (byte {error.start})") from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise BadSample(f"field {name}: not json: {error}") from error
        except BadSample as error:
            raise BadSample(f"field {name}: {error}") from error


def smaller(fields: Mapping[str, bytes], side: int, quality: int) -> tuple[dict[str, bytes], set[str]]:
    """The fields with pictures whose shorter side is at most `side` pixels, and which of them have changed. Raises
    `BadSample`.

    What is small enough stays as it is. Others keep their format (but GIF, BMP and TIFF become PNG), EXIF and profile.
    """
    made: dict[str, bytes] = {}
    changed = set()
    for name, value in fields.items():
        if not is_picture(name):
            made[name] = value
            continue
        try:
            data, format_name = _smaller(value, side, quality)
        except BadSample:
            raise
        except Exception as error:  # a decoder raises whatever its author thought of
            raise BadSample(f"field {name}: not a readable picture: {str(error) or type(error).__name__}") from error
        if data is not value:
            if format_name not in _KEPT:
                name = f"{name.rpartition('.')[0]}.png".lstrip(".")
                if name in fields:
                    raise BadSample(f"field {name}: would be replaced by another picture that becomes PNG")
            changed.add(name)
        made[name] = data
    return made, changed


def _smaller(data: bytes, side: int, quality: int) -> tuple[bytes, str | None]:
    with Image.open(BytesIO(data)) as picture:
        format_name, info = picture.format, dict(picture.info)
        if min(picture.size) <= side:
            return data, format_name
        factor = side / min(picture.size)
        width, height = (max(side, round(length * factor)) for length in picture.size)
        if format_name == "JPEG":
            picture.draft(None, (2 * width, 2 * height))
        picture.load()
        mode = picture.mode
        if mode.startswith("I") or mode == "F":
            picture = to_eight_bits(picture)  # type: ignore[assignment]
        elif mode in ("P", "1", "PA"):
            picture = picture.convert("RGBA" if mode == "PA" or "transparency" in info else "RGB")  # type: ignore[assignment]
        elif mode not in ("L", "LA", "RGB", "RGBA"):
            picture = picture.convert("RGB")  # type: ignore[assignment]
            info.pop("icc_profile", None)
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    out = BytesIO()
    target = format_name if format_name in _KEPT else "PNG"
    extra = {name: info[name] for name in ("exif", "icc_profile") if info.get(name)}
    resized.save(out, target, **({} if target == "PNG" else {"quality": quality}), **extra)
    return out.getvalue(), format_name
