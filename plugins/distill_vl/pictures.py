"""Reading pictures: what every image augmentation shares. Pixels are 0..255 RGB until they are normalised."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from pydantic import Field
from simplejpeg import decode_jpeg, decode_jpeg_header
from torch import Tensor
from torch.nn.functional import interpolate

from distill_core import (
    GLOBAL,
    AbsentModality,
    Augmentation,
    BadSample,
    ComponentConfig,
    Group,
    Plan,
    Sample,
    View,
    Views,
    with_extra,
)
from distill_vl.recolouring import Jitter, Recolouring, constant, radius_of, recolour

Probability = Annotated[float, Field(ge=0, le=1)]
Area = Annotated[float, Field(gt=0, le=1)]
Byte = Annotated[int, Field(ge=0, le=255)]
Radius = Annotated[float, Field(ge=0)]
Format = Literal["avif", "bmp", "gif", "jpeg", "jpeg2000", "png", "ppm", "tiff", "webp"]
"""What Pillow decodes by itself; others may start a program, as EPS does Ghostscript."""
Box = tuple[int, int, int, int]
"""Left, top, width and height in pixels."""
LOG_ASPECT = math.log(4 / 3)
"""Aspects of crops are log-uniform in 3/4..4/3."""
SPARE = 1.5
"""How many pixels of a picture that is decoded at a reduced scale there are to a pixel of a crop, at least."""


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


class RecolourConfig(PictureConfig):
    """Options of image augmentations that change colours."""

    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    jitter: Jitter = (0.4, 0.4, 0.2, 0.1)
    """Strengths of brightness, contrast, saturation and hue, in random order."""
    jitter_p: Probability = 0.8
    """Probability of the colour jitter."""
    grey: Probability = 0.2
    """Probability of a grey picture."""
    blur_radius: tuple[Radius, Radius] = (0.1, 2.0)
    """Standard deviation of the Gaussian blur in pixels, uniform between the two."""
    device: Literal["cpu", "model"] = "cpu"
    """Where colours are jittered, and crops blurred and solarised: `cpu`, in the loader's workers, or `model`, on the
    device that trains, a batch at once. The draws are the same, and so are the pixels (but for rounding)."""


def draw_colours(config: RecolourConfig, rng: np.random.Generator, *, blur: float, solarise: float = 0) -> Recolouring:
    """What is done to one crop; `blur` and `solarise` are the probabilities of its role."""
    colours = Recolouring()
    if rng.random() < config.jitter_p:
        colours.jitter(config.jitter, rng)
    if rng.random() < config.grey:
        colours.grey()
    if rng.random() < blur:
        low, high = config.blur_radius
        colours.blur = low + (high - low) * rng.random()
    colours.solarise = rng.random() < solarise
    return colours


@dataclass(slots=True)
class Crop:
    """What is drawn for one view of a picture."""

    box: Box
    side: int
    """Pixels of the view's side."""
    flip: bool = False
    """Whether left and right are exchanged."""
    role: str = GLOBAL
    colours: Recolouring | None = None
    """None where the view's role keeps its colours."""

    def extra(self, width: int, height: int) -> dict[str, Any]:
        """Of the view: `box` [4], its left, top, right and bottom edge as shares of the picture, and `flip` []."""
        left, top, w, h = self.box
        box = [left / width, top / height, (left + w) / width, (top + h) / height]
        return {"box": np.array(box, np.float32), "flip": self.flip}


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

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # Pillow imports its formats when it first opens a file; a worker that is forked (at a stage's beginning)
        # while a tracker's thread does so would wait for that thread's import lock for ever
        Image.init()

    @classmethod
    def extras(cls, config: Any) -> tuple[str, ...]:
        """The crop's `box`, and whether it is mirrored (`flip`)."""
        return ("box", "flip")

    def decode(self, sample: Sample, field: str | None = None) -> list[Image.Image]:
        """The sample's picture, RGB."""
        return [self.open(self.item(sample, field))]

    def item(self, sample: Sample, field: str | None = None) -> Any:
        """The sample's picture as it is stored. Raises `BadSample` where there is none."""
        names = (field,) if field is not None else self.config.fields
        for name in names:
            if name in sample:
                return sample[name]
        raise AbsentModality(f"no picture: none of the fields {', '.join(names)}")

    def open(self, item: Any) -> Image.Image:
        """Bytes, a path, an array [H, W, 3] of uint8, or a PIL image -> an RGB image. Raises `BadSample`.

        Grey of 16 bits is scaled to 8; transparent pixels take the background's colour.
        """
        with self._bad_samples():
            return self._rgb(self._undecoded(item))

    def pixels(self, item: Any) -> NDArray[np.uint8]:
        """[H, W, 3] of an item as `open` takes it, decoded as for training. Raises `BadSample`."""
        with self._bad_samples():
            return self._read(item)[1](1)

    def train_crops(self, sample: Sample, draw: Callable[[int, int], list[Crop]]) -> list[View]:
        """Views uint8 [3, S, S] of the sample's picture, by what `draw` makes of its width and height.

        Extras are `Crop.extra`, and where the training device recolours, `Recolouring.arrays`. Raises `BadSample`.
        """
        item = self.item(sample)
        with self._bad_samples():
            (width, height), decode = self._read(item)
        crops = draw(width, height)
        with self._bad_samples():
            pixels = torch.from_numpy(decode(reduction(crops))).permute(2, 0, 1)
        views, on_model = [], self._on_model
        for crop in crops:
            x, extra = cut(pixels, crop, (width, height)), crop.extra(width, height)
            if crop.colours is not None and on_model:
                extra |= crop.colours.arrays()
            elif crop.colours is not None:
                x = crop.colours(x)
            views.append(View(x, crop.role, extra=extra))
        return views

    @property
    def _on_model(self) -> bool:
        return isinstance(self.config, RecolourConfig) and self.config.device == "model"

    def on_device(self, views: Views) -> Views:
        """uint8 crops -> float32, recoloured where their extras say how, normalised. Others are left as they are."""
        return Views([self._finished(group) for group in views.groups])

    def _finished(self, group: Group) -> Group:
        if group.x.dtype != torch.uint8:
            return group
        x, extra = group.x.to(torch.float32), dict(group.extra)
        if "stages" in extra:
            stages, blur, solarise = (extra.pop(name).flatten(0, 1) for name in ("stages", "blur", "solarise"))
            radius = radius_of(self.config.blur_radius[1])
            x = recolour(x.flatten(0, 1), stages, blur, solarise, radius=radius).view(x.shape)
        elif self._on_model and "box" not in extra:
            raise ValueError(f"{self.name}: the views came without their extras; see `with_extra`")
        mean, std = self._mean_std(x)
        return replace(group, x=x.sub_(mean).div_(std), extra=extra)

    def _mean_std(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """[3, 1, 1] each, for pixels of 0..255."""
        mean, std = (constant(values, like) * 255 for values in (self.config.mean, self.config.std))
        return mean.view(3, 1, 1), std.view(3, 1, 1)

    def _undecoded(self, item: Any) -> Image.Image:
        """As `open` takes it; of bytes or a path the head alone is read."""
        if isinstance(item, Image.Image):
            return item
        if isinstance(item, bytes):
            return Image.open(io.BytesIO(item), formats=self.config.formats)
        if isinstance(item, str | os.PathLike):
            return Image.open(item, formats=self.config.formats)
        return Image.fromarray(np.asarray(item))

    def _read(self, item: Any) -> tuple[tuple[int, int], Callable[[int], NDArray[np.uint8]]]:
        """Width and height of an item, and what decodes it to [H, W, 3], a JPEG at 1 / (its argument) of the size."""
        if (size := self._plain_jpeg(item)) is not None:
            return size, partial(self._decode_jpeg, item, size)
        picture = self._undecoded(item)
        width, height = picture.size
        if self.config.exif_orientation and picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
            width, height = height, width
        return (width, height), partial(self._decode_any, picture)

    def _plain_jpeg(self, item: Any) -> tuple[int, int] | None:
        """Width and height of a JPEG of three channels, as it is stored and no larger than Pillow takes; else None."""
        if not isinstance(item, bytes) or self.config.exif_orientation or "jpeg" not in self.config.formats:
            return None
        try:
            height, width, space, _ = decode_jpeg_header(item)
        except ValueError:  # no JPEG, or one that Pillow may yet read
            return None
        if space not in ("YCbCr", "RGB") or width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
            return None
        return width, height

    def _decode_jpeg(self, item: bytes, size: tuple[int, int], scale: int) -> NDArray[np.uint8]:
        """The same pixels as Pillow's, which copies them twice."""
        width, height = (-(-side // scale) for side in size)
        try:
            pixels: NDArray[np.uint8] = decode_jpeg(item, min_width=width, min_height=height)
        except ValueError:  # Pillow may yet read it, or say what is wrong
            return self._decode_any(self._undecoded(item), scale)
        return pixels

    def _decode_any(self, picture: Image.Image, scale: int) -> NDArray[np.uint8]:
        if picture.format == "JPEG" and scale > 1:
            picture.draft(None, (-(-picture.width // scale), -(-picture.height // scale)))
        return np.array(self._rgb(picture))

    def _rgb(self, picture: Image.Image) -> Image.Image:
        picture.load()
        if self.config.exif_orientation:
            picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith(("I", "F")):
            picture = to_eight_bits(picture)
        if picture.mode == "P" or "transparency" in picture.info:
            picture = picture.convert("RGBA")
        if picture.mode in ("RGBA", "LA", "PA"):
            picture = picture.convert("RGBA")
            ground = Image.new("RGBA", picture.size, (*self.config.background, 255))
            picture = Image.alpha_composite(ground, picture)
        return picture if picture.mode == "RGB" else picture.convert("RGB")

    @contextmanager
    def _bad_samples(self) -> Iterator[None]:
        """Whatever a decoder raises becomes `BadSample`."""
        try:
            yield
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
        """The picture that the towers see, before it is normalised."""
        if not isinstance(view.data, Tensor):
            return None
        (group,) = with_extra(Views([Group(view.data[None, None], view.role)]), [[view]]).groups
        mean, std = self._mean_std(view.data)
        pixels = (self._finished(group).x[0, 0] * std + mean).round().clamp(0, 255).to(torch.uint8)
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())

    def normalise(self, picture: Image.Image) -> Tensor:
        """An RGB image -> float32 [3, H, W], (pixel / 255 - mean) / std."""
        pixels = torch.from_numpy(np.array(picture, dtype=np.uint8)).permute(2, 0, 1)
        mean, std = self._mean_std(pixels)
        return pixels.to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).div_(std)


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


def crop_box(width: int, height: int, scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """The box of a random crop: area share uniform in `scale`, aspect log-uniform in 3/4..4/3.

    After ten draws that do not fit, the largest centred box of an allowed aspect (as torchvision does).
    """
    (low, high), draw = scale, rng.random  # several times as fast as `rng.uniform`
    for _ in range(10):
        area = width * height * (low + (high - low) * draw())
        aspect = math.exp(LOG_ASPECT * (2 * draw() - 1))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(draw() * (width - w + 1)), int(draw() * (height - h + 1)), w, h
    aspect = min(max(width / height, 3 / 4), 4 / 3)
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (width - w) // 2, (height - h) // 2, w, h


def reduction(crops: Sequence[Crop]) -> int:
    """The largest of 8, 4, 2 and 1 by which a picture may be reduced so that every crop still has `SPARE` times the
    pixels of its view along each side."""
    least = min((min(crop.box[2:]) / crop.side for crop in crops), default=1.0)
    return next((scale for scale in (8, 4, 2) if least >= scale * SPARE), 1)


def cut(pixels: Tensor, crop: Crop, size: tuple[int, int]) -> Tensor:
    """uint8 [3, H, W] of a picture that had `size` (width, height) before it was reduced -> the crop [3, S, S], resized
    (bicubic, antialiased) and flipped."""
    left, top, width, height = crop.box
    if (scaled := (pixels.shape[2], pixels.shape[1])) != size:
        x, y = (whole / full for whole, full in zip(scaled, size, strict=True))
        right, bottom = round((left + width) * x), round((top + height) * y)
        left, top = round(left * x), round(top * y)
        width, height = max(right - left, 1), max(bottom - top, 1)
    region = pixels[:, top : top + height, left : left + width]
    made = interpolate(region[None], (crop.side, crop.side), mode="bicubic", antialias=True)[0]
    return made.flip(2) if crop.flip else made.contiguous()
