"""A picture -> the class of each pixel: dense embeddings of sliding windows against prompts of the classes' names.

The protocol is SCLIP's (Wang et al. 2023, section 4.1 and its public code), without its refinements of the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from distill_core import BadSample, Model, UserError, View
from distill_segment.classes import Classes, names_of
from distill_tasks.prompts import prompts_of, templates_of
from distill_vl.pictures import PictureAugmentation

if TYPE_CHECKING:
    from distill_segment.task import SegmentationConfig

ASPECT = 8
"""Larger ratios of a picture's sides are refused: the resized picture would be too large."""
BAND = 1 << 24
"""Maximum number of probabilities in memory."""


class Segmenter:
    """Holds the classes' embeddings; `of`, the modality of the pictures, and `words`, that of the prompts."""

    def __init__(self, model: Model, config: SegmentationConfig, classes: Classes) -> None:
        """Raises `UserError` where windows do not fit the model or the pictures."""
        self.model, self.config = model, config
        self.classes, self.names, self.count = list(classes), names_of(classes), len(classes)
        self.of, words = config.modalities or model.modalities
        augmentation = model.augment[self.of]
        if not isinstance(augmentation, PictureAugmentation):
            raise UserError(f"segmentation: {self.of!r} is no modality of pictures")
        self.augmentation = augmentation
        self.window = config.window or augmentation.config.size
        self.stride = config.stride or max(1, self.window // 2)
        self.side = config.side or self.window + self.window // 2
        if not self.stride <= self.window <= self.side:
            raise UserError(
                f"segmentation: stride {self.stride}, window {self.window}, side {self.side}: each is at most the next"
            )
        prompt_words = [
            words_of_class if i or config.prompt_background else () for i, words_of_class in enumerate(classes)
        ]
        self.sizes = [len(words_of_class) for words_of_class in prompt_words]
        templates = templates_of(config.templates)
        prompts = prompts_of([word for words_of_class in prompt_words for word in words_of_class], templates)
        if not prompts:
            raise UserError("segmentation: no class has a prompt: there is the background alone")
        embedded = model.encode(words, prompts).view(sum(self.sizes), len(templates), -1)
        self.texts = normalize(embedded.mean(1), dim=-1).to(model.device)  # [Q, D]

    def __call__(self, picture: Image.Image, height: int, width: int) -> Tensor:
        """The class of each pixel [height, width] of an RGB picture resized to that size, on the CPU.

        `count`, which is no class, where the best class is NaN or tied. Raises `BadSample`
        for a picture longer than `ASPECT` times its shorter side.
        """
        parts = []
        for probabilities in self.probabilities(picture, height, width):
            best, classes = probabilities.max(0)
            classes[(probabilities == best).sum(0) != 1] = self.count
            parts.append(classes.masked_fill_(best < self.config.threshold, 0).cpu())
        return torch.cat(parts)

    def probabilities(self, picture: Image.Image, height: int, width: int) -> Iterator[Tensor]:
        """The probability of each class at each pixel, [C, rows, width], in bands of rows to save memory."""
        cosines = self._cosines(picture)
        rows = max(1, BAND // (len(cosines) * width))
        for start in range(0, height, rows):
            band = _enlarge(cosines, range(start, min(start + rows, height)), height, width)
            probabilities = (band * self.config.scale).softmax(0)
            if max(self.sizes) > 1 or not min(self.sizes):
                none = probabilities.new_zeros(1, *probabilities.shape[1:])
                parts = torch.split(probabilities, self.sizes)
                probabilities = torch.stack([(part if len(part) else none).amax(0) for part in parts])
            yield probabilities

    def _cosines(self, picture: Image.Image) -> Tensor:
        """The cosine of each word at each pixel of the resized picture, averaged over its windows: [Q, H, W]."""
        if max(picture.size) > ASPECT * min(picture.size):
            size = f"{picture.width} x {picture.height} pixels"
            raise BadSample(f"{size}: the longer side is more than {ASPECT} times the shorter")
        scale = self.side / min(picture.size)
        width, height = (max(self.side, round(length * scale)) for length in picture.size)
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        window = self.window
        places = list(product(starts(height, window, self.stride), starts(width, window, self.stride)))
        total = torch.zeros(len(self.texts), height, width, device=self.model.device)
        counts = torch.zeros(height, width, device=self.model.device)
        for (top, left), cosines in self._of_windows(resized, places):
            enlarged = interpolate(cosines[None], size=(window, window), mode="bilinear")[0]
            total[:, top : top + window, left : left + window] += enlarged
            counts[top : top + window, left : left + window] += 1
        return total.div_(counts)

    def _of_windows(
        self, picture: Image.Image, places: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Each window (top, left), and its words' cosines [Q, rows, columns] with the patches."""
        window = self.window
        for start in range(0, len(places), self.model.batch_size):
            chunk = places[start : start + self.model.batch_size]
            crops = [picture.crop((left, top, left + window, top + window)) for top, left in chunk]
            views = [View(self.augmentation.normalise(crop)) for crop in crops]
            dense = self.model.dense(self.of, views, attention=self.config.attention)  # [N, rows, columns, D]
            yield from zip(chunk, (dense @ self.texts.T).permute(0, 3, 1, 2), strict=True)


def _enlarge(x: Tensor, rows: range, height: int, width: int) -> Tensor:
    """Some rows of x [Q, H, W] resized to [Q, height, width], as `interpolate(mode="bilinear")` has them."""
    place = ((torch.arange(rows.start, rows.stop, device=x.device) + 0.5) * (x.shape[1] / height) - 0.5).clamp_(min=0)
    above = place.long().clamp_(max=x.shape[1] - 1)
    below = (above + 1).clamp_(max=x.shape[1] - 1)
    mixed = torch.lerp(x[:, above], x[:, below], (place - above)[:, None])  # [Q, rows, W]
    return interpolate(mixed[None], size=(len(rows), width), mode="bilinear")[0]


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows start, so that the last one ends with the length."""
    steps = max(length - window + stride - 1, 0) // stride + 1
    return [min(i * stride, length - window) for i in range(steps)]
