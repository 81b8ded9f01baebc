"""What `distill check-plugin` feeds augmentations of images and captions, and the towers."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from distill_core import GLOBAL, LOCAL, Augmentation, BadSample, ConformanceCase, Sample, View
from distill_vl.caption import WholeCaption
from distill_vl.caption_aware_flips import CaptionAwareFlips
from distill_vl.caption_readers import READERS, CaptionReader
from distill_vl.captioning import Captioning, CaptioningConfig
from distill_vl.captions import CaptionAugmentation, CaptionConfig, TakeConfig
from distill_vl.clip_text import ClipText
from distill_vl.decoders import CaptionDecoder, CaptionDecoderConfig
from distill_vl.masked_text import BertText
from distill_vl.multi_crop import MultiCrop, MultiCropConfig
from distill_vl.pictures import PictureAugmentation, PictureConfig
from distill_vl.region_crops import RegionCrops, RegionCropsConfig
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
    fields: tuple[str, ...] = getattr(config.layout.cls, "fields", ())
    return sample_of(config.fields or fields, rng)


def sample_of(fields: Iterable[str], rng: np.random.Generator) -> Sample:
    """Four sentences in each of the json's fields; a txt where there is none."""
    words = sentences(rng)
    if not fields:
        return {"txt": ". ".join(words).encode()}
    return {"json": json.dumps(dict.fromkeys(fields, words)).encode()}


def reads_captions(case: ConformanceCase, config: Any, rng: np.random.Generator) -> None:
    """`captions` returns {field: [texts]} with a text, by name too, and leaves the sample; a copy does the same."""
    assert case.sample is not None, f"give ConformanceCase({case.component.__name__}, sample=...): a raw sample"
    reader, sample = _reader(case, config), case.sample(config, rng)
    before = dict(sample)
    captions = reader.captions(sample)
    assert isinstance(captions, dict), f"`captions` must return {{field: [texts]}}, not {captions!r}"
    for field, texts in captions.items():
        listed = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
        assert listed, f"`captions` must return {{field: [texts]}}, and {field!r} is {texts!r}"
    assert any(text.strip() for texts in captions.values() for text in texts), "the case's sample has no caption"
    assert reader.named(sample, list(captions)) == captions, "`named`, of the fields of `captions`, differs"
    assert "no such field" not in reader.named(sample, ["no such field"]), "`named` must leave out what is not there"
    references = reader.references(sample)
    assert references is None or all(isinstance(text, str) for text in references), "`references` must be texts"
    assert dict(sample) == before, "it changes the sample, which other modalities read"
    copied: CaptionReader = pickle.loads(pickle.dumps(reader))
    assert copied.captions(sample) == captions, "a pickled copy, as workers have, reads other captions"


def bad_captions(case: ConformanceCase, config: Any, rng: np.random.Generator) -> None:
    """Of a sample that it cannot read (no field, empty or broken bytes) it returns nothing, or raises BadSample."""
    assert case.sample is not None, f"give ConformanceCase({case.component.__name__}, sample=...): a raw sample"
    reader, fields = _reader(case, config), [name for name in case.sample(config, rng) if not name.startswith("__")]
    for what, data in (("no field", None), ("empty fields", b""), ("broken bytes", b"\xff\x00\xfe not what it says")):
        try:
            reader.captions({} if data is None else dict.fromkeys(fields, data))
        except BadSample:
            continue
        except Exception as error:
            raise AssertionError(
                f"`captions` of a sample with {what} raises {type(error).__name__}: {error}; raise BadSample, which "
                "skips and counts the sample"
            ) from error


def _fields_in_json(fields: Iterable[str], config: object, rng: np.random.Generator) -> Sample:
    return sample_of(fields, rng)


def _reader(case: ConformanceCase, config: Any) -> CaptionReader:
    reader: type[Any] = case.component
    return cast(CaptionReader, reader(config))


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


def decoders(config: CaptioningConfig) -> dict[str, tuple[type[CaptionDecoder], CaptionDecoderConfig]]:
    """The one that the loss names."""
    options = CaptionDecoderConfig(width=32, layers=1, heads=2, parallel=config.parallel > 0)
    return {config.head: (CaptionDecoder, options)}


def said_sides(config: object, rng: np.random.Generator) -> Sample:
    """A picture, and a caption that says left or right every other time."""
    said = ("a bird left of the old boat", "Right of the sea", "a boat by the sea")
    picture = noise_png(PictureConfig(), rng)
    return {**picture, "txt": str(rng.choice(said)).encode()}


def picture_and_caption(config: object) -> dict[str, Augmentation]:
    """Small crops, and the caption."""
    crops = MultiCropConfig(size=16, local_size=8, local=1)
    return {"image": MultiCrop(crops), "text": WholeCaption(TakeConfig())}


def regions(config: RegionCropsConfig, rng: np.random.Generator) -> Sample:
    """A picture, 50 x 40 px, with a caption, of which three spans have a region."""
    sides = np.array((50, 40, 50, 40) if config.unit == "pixel" else 1)
    corners = np.tile(rng.uniform(0, 0.5, (3, 2)), 2)
    boxes = (corners + np.array((0, 0, 0.3, 0.4))) * sides
    spans = [[4 * i, 30, *box, 1] for i, box in enumerate(boxes.tolist())]
    document = {"caption": ". ".join(sentences(rng)), config.regions: spans}
    return {**noise_png(PictureConfig(), rng), "json": json.dumps(document).encode()}


CASES = [
    ConformanceCase(RegionCrops, sample=regions, parts=picture_and_caption),
    ConformanceCase(CaptionAwareFlips, sample=said_sides, parts=picture_and_caption),
    ConformanceCase(PictureAugmentation, sample=noise_png),
    ConformanceCase(CaptionAugmentation, sample=captions),
    ConformanceCase(CaptionReader, checks=(reads_captions, bad_captions)),
    *(ConformanceCase(reader, sample=partial(_fields_in_json, reader.fields)) for reader in READERS),
    ConformanceCase(VisionTransformer, views=crops),
    ConformanceCase(ClipText, views=texts),
    ConformanceCase(BertText, views=texts),
    ConformanceCase(Captioning, heads=decoders),
]
