"""Reading pictures: what every image augmentation shares. Pixels are 0..255 RGB until they are normalised."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError
from pydantic import Field
from torch import Tensor

from distill_core import Augmentation, BadSample, ComponentConfig, Plan, Sample, View

Probability = Annotated[float, Field(ge=0, le=1)]
Area = Annotated[float, Field(gt=0, le=1)]
Byte = Annotated[int, Field(ge=0, le=255)]
Strength = Annotated[float, Field(ge=0)]
Jitter = tuple[Strength, Strength, Strength, Annotated[float, Field(ge=0, le=0.5)]]
"""Strengths of brightness, contrast, saturation and hue."""
Format = Literal["avif", "bmp", "gif", "jpeg", "jpeg2000", "png", "ppm", "tiff", "webp"]
"""What Pillow decodes by itself; others may start a program, as EPS does Ghostscript."""


class PictureConfig(ComponentConfig):
    """Options of every image augmentation."""

    size: Annotated[int, Field(gt=0)] = 224
    """Pixels of a global crop's side, and of the picture in evaluation."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Subtracted from each channel (of 0..1); CLIP's."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Each channel is divided by it; CLIP's."""
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """Colour behind transparent pixels."""
    fields: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    """Fields of a sample that may hold the picture; the first that is there is read."""
    formats: Annotated[tuple[Format, ...], Field(min_length=1)] = ("jpeg", "png", "webp", "gif", "bmp")
    """Formats that are decoded, whatever the field is called; a picture of another one is a bad sample."""
    exif_orientation: bool = False
    """Turn and mirror a picture as its EXIF orientation says, as a viewer does. The public codes of CLIP, COSMOS and
    the others leave it as it is stored, which for photographs of a phone may be on its side."""


def other_pixels(plan: Plan, name: str, mean: Sequence[float], std: Sequence[float], why: str) -> list[str]:
    """A line, where weights want pixels of another mean and std than the augmentation of modality `name` makes."""
    options = plan.modalities[name].augment
    if not isinstance(options, PictureConfig):
        return []
    if len(mean) != 3 or len(std) != 3:
        return []
    apart = zip((*options.mean, *options.std), (*mean, *std), strict=True)
    if all(abs(own - wanted) < 1e-3 for own, wanted in apart):
        return []
    return [f"{why} other pixels: set augment.{name}.mean: {list(mean)} and augment.{name}.std: {list(std)}"]


class PictureAugmentation(Augmentation):
    """Base of image augmentations: decodes pictures, and makes the evaluation view (resize, centre crop)."""

    config: Any

    @classmethod
    def example_sample(cls, config: PictureConfig, rng: np.random.Generator) -> Sample:
        """A PNG of noise, 40 x 50 px."""
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(file, "PNG")
        return {config.fields[0]: file.getvalue()}

    def decode(self, sample: Sample, field: str | None = None) -> list[Image.Image]:
        """The sample's picture, RGB."""
        names = (field,) if field is not None else self.config.fields
        for name in names:
            if name in sample:
                return [self.open(sample[name])]
        raise BadSample(f"no picture: none of the fields {', '.join(names)}")

    def open(self, item: Any) -> Image.Image:
        """Bytes, a path, an array [H, W, 3] of uint8, or a PIL image -> an RGB image. Raises `BadSample`.

        Grey of 16 bits is scaled to 8; transparent pixels take the background's colour.
        """
        try:
            if isinstance(item, Image.Image):
                picture = item
            elif isinstance(item, bytes):
                picture = Image.open(io.BytesIO(item), formats=self.config.formats)
            elif isinstance(item, str | os.PathLike):
                picture = Image.open(item, formats=self.config.formats)
            else:
                picture = Image.fromarray(np.asarray(item))
            picture.load()
            if self.config.exif_orientation:
                picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith(("I", "F")):
                picture = to_eight_bits(picture)
            if picture.mode == "P" or "transparency" in picture.info:
                picture = picture.convert("RGBA")
            if picture.mode in ("RGBA", "LA", "PA"):
                picture = picture.convert("RGBA")
                behind = Image.new("RGBA", picture.size, (*self.config.background, 255))
                picture = Image.alpha_composite(behind, picture)
            return picture.convert("RGB")
        except UnidentifiedImageError as error:
            # PIL's own words name the buffer's address in memory
            known = ", ".join(self.config.formats)
            raise BadSample(f"not a readable picture: of none of the formats {known} (option `formats`)") from error
        except Exception as error:  # damaged bytes raise whatever a decoder's author thought of, RuntimeError included
            raise BadSample(f"not a readable picture: {str(error) or type(error).__name__}") from error

    def eval_view(self, item: Any) -> View:
        """The shorter side resized to `size` (bicubic), the centre cropped; rounded as torchvision rounds."""
        picture, size = self.open(item), self.config.size
        width, height = (int(size * side / min(picture.size)) for side in picture.size)
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - size) / 2), round((height - size) / 2)
        return View(self.normalise(picture.crop((left, top, left + size, top + size))))

    def render(self, view: View) -> Image.Image | None:
        """The picture that `normalise` was given."""
        if not isinstance(view.data, Tensor):
            return None
        mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (self.config.mean, self.config.std))
        pixels = (view.data * std + mean).round().clamp(0, 255).to(torch.uint8)
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())

    def normalise(self, picture: Image.Image) -> Tensor:
        """An RGB image -> float32 [3, H, W], (pixel / 255 - mean) / std."""
        pixels = torch.from_numpy(np.array(picture, dtype=np.uint8)).permute(2, 0, 1).to(torch.float32)
        mean = torch.tensor(self.config.mean).view(3, 1, 1) * 255
        std = torch.tensor(self.config.std).view(3, 1, 1) * 255
        return (pixels - mean).div_(std)


def to_eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits -> of 8 (L, or LA where one value is transparent), which Pillow would clip to white.

    Raises `BadSample` for 32 bits a pixel: whether they end at 1, 255 or elsewhere, no file says.
    """
    if not picture.mode.startswith("I;16"):
        raise BadSample(f"not a readable picture: 32 bits a pixel (mode {picture.mode}); store it with 8 or 16")
    values = np.asarray(picture)
    grey = Image.fromarray((values.astype(np.float32) / 257).round().astype(np.uint8))
    transparent = picture.info.get("transparency")
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def crop_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a random crop: area share uniform in `scale`, aspect log-uniform in 3/4..4/3.

    After ten draws that do not fit, the largest centred box of an allowed aspect (as torchvision does).
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h
    aspect = min(max(width / height, 3 / 4), 4 / 3)
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (width - w) // 2, (height - h) // 2, w, h


def random_resized_crop(
    picture: Image.Image, size: int, scale: tuple[float, float], rng: np.random.Generator
) -> Image.Image:
    """A random crop, resized to size x size px (bicubic)."""
    left, top, width, height = crop_box(*picture.size, scale, rng)
    crop = picture.crop((left, top, left + width, top + height))
    return crop.resize((size, size), Image.Resampling.BICUBIC)


def flip(picture: Image.Image, probability: float, rng: np.random.Generator) -> Image.Image:
    """Left and right exchanged, with a probability."""
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < probability else picture


def colour_jitter(
    picture: Image.Image, strengths: tuple[float, float, float, float], rng: np.random.Generator
) -> Image.Image:
    """Brightness, contrast, saturation (factors uniform in 1 -+ strength) and hue (shift of the colour circle)."""
    for step in rng.permutation(4):
        strength = strengths[step]
        if strength == 0:
            continue
        if step == 3:
            picture = shift_hue(picture, rng.uniform(-strength, strength))
        else:
            enhancer = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[step]
            picture = enhancer(picture).enhance(rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return picture


def shift_hue(picture: Image.Image, turn: float) -> Image.Image:
    """Hues moved by `turn` of the colour circle, -0.5 to 0.5."""
    hue, saturation, value = picture.convert("HSV").split()
    moved = np.array(hue, dtype=np.uint8) + np.uint8(int(turn * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(moved), saturation, value)).convert("RGB")
