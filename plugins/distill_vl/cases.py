"""What `distill check-plugin` feeds augmentations of images and captions, and the towers."""

from __future__ import annotations

import io
import json

import numpy as np
import torch
from PIL import Image

from distill_core import GLOBAL, LOCAL, ConformanceCase, Sample, View
from distill_vl.captions import LAYOUTS, CaptionAugmentation, CaptionConfig
from distill_vl.clip_text import ClipText
from distill_vl.masked_text import BertText
from distill_vl.pictures import PictureAugmentation, PictureConfig
from distill_vl.vit import VisionTransformer, VisionTransformerConfig

WORDS = ("a", "red", "old", "bird", "boat", "by", "the", "sea")


def noise_png(config: PictureConfig, rng: np.random.Generator) -> Sample:
    """A PNG of noise, 40 x 50 px."""
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(file, "PNG")
    return {config.fields[0]: file.getvalue()}


def sentences(rng: np.random.Generator) -> list[str]:
    """Four of six words each."""
    return [" ".join(rng.choice(WORDS, 6)) for _ in range(4)]


def captions(config: CaptionConfig, rng: np.random.Generator) -> Sample:
    """Four sentences, in the layout of the options."""
    words = sentences(rng)
    fields = config.fields or LAYOUTS.get(config.layout)
    if fields is None:
        return {"txt": ". ".join(words).encode()}
    return {"json": json.dumps(dict.fromkeys(fields, words)).encode()}


def crops(config: VisionTransformerConfig, rng: np.random.Generator) -> list[View]:
    """Two global crops of noise, and a local one of one patch less."""
    sides = ((GLOBAL, config.image_size), (GLOBAL, config.image_size), (LOCAL, config.image_size - config.patch))
    return [noise(side, role, rng) for role, side in sides]


def noise(side: int, role: str, rng: np.random.Generator) -> View:
    """Pixels [3, side, side]."""
    return View(torch.from_numpy(rng.standard_normal((3, side, side), dtype=np.float32)), role)


def texts(config: object, rng: np.random.Generator) -> list[View]:
    """Two global texts of three to eight words, and a local one of two."""
    counts = ((GLOBAL, int(rng.integers(3, 9))), (GLOBAL, int(rng.integers(3, 9))), (LOCAL, 2))
    return [View(" ".join(rng.choice(WORDS, n)), role) for role, n in counts]


CASES = [
    ConformanceCase(PictureAugmentation, sample=noise_png),
    ConformanceCase(CaptionAugmentation, sample=captions),
    ConformanceCase(VisionTransformer, views=crops),
    ConformanceCase(ClipText, views=texts),
    ConformanceCase(BertText, views=texts),
]
