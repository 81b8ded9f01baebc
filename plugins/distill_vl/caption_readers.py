"""Where a sample keeps its captions: the kind of component `caption_reader`, and the layouts that shards have."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from distill_core import BadSample, Component, Sample


class CaptionReader(Component, ABC):
    """A raw sample -> its captions by field. Picklable; runs in the loader's workers, and draws nothing.

    The options `fields` and `split` of the text augmentations apply to whatever a reader returns. A blank text counts
    for none.
    """

    kind = "caption_reader"
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Names that the option `fields` may use for several fields; a field of that name goes first."""
    sentences: ClassVar[tuple[str, ...]] = ()
    """Fields whose texts are sentences already: the option `split` leaves them."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def captions(self, sample: Sample) -> dict[str, list[str]]:
        """All captions, in order: each one text, or several that make it up. Raises `BadSample` where they cannot be
        read; {} where there are none."""

    def named(self, sample: Sample, names: Sequence[str]) -> dict[str, list[str]]:
        """What the fields of these names hold, without those that the sample lacks: captions that the option `fields`
        chooses, or other texts that an evaluation's `fields` asks for. Raises `BadSample`.

        The default chooses among `captions`.
        """
        captions = self.captions(sample)
        return {name: captions[name] for name in names if name in captions}

    def references(self, sample: Sample) -> list[str] | None:
        """Whole captions that are each an item of an evaluation. None, the default: all captions are one item.

        Raises `BadSample`.
        """
        return None


class JsonCaptions(CaptionReader):
    """Base of readers of a sample's json: texts, or lists of them. A dot in a name leads into an object."""

    fields: ClassVar[tuple[str, ...]]
    """Those that hold captions, in the pool's order."""
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "raw": ("raw_caption", "original_caption"),
        "short": ("shortIB_captions", "shortSV_captions", "shortLLA_captions"),
        "long": ("longIB_captions", "longSV_captions", "longLLA_captions"),
    }
    # COSMOS's public code does not split PixelProse's original caption
    sentences = ("original_caption", "captions")

    def captions(self, sample: Sample) -> dict[str, list[str]]:
        return self.named(sample, self.fields)

    def named(self, sample: Sample, names: Iterable[str]) -> dict[str, list[str]]:
        return _texts(json_of(sample), names)

    def references(self, sample: Sample) -> list[str] | None:
        return _texts(json_of(sample), ("references",)).get("references")


class DreamLip(JsonCaptions):
    """json with DreamLIP's lists: the web's caption, and short and long ones of three models."""

    name = "dreamlip"
    fields = (
        "raw_caption",
        "shortIB_captions",
        "longIB_captions",
        "shortSV_captions",
        "longSV_captions",
        "shortLLA_captions",
        "longLLA_captions",
    )


class PixelProse(JsonCaptions):
    """json with PixelProse's `original_caption` and `caption`."""

    name = "pixelprose"
    fields = ("original_caption", "caption")


class Sentences(JsonCaptions):
    """json with a list `captions` of sentences, which are taken as they are."""

    name = "captions"
    fields = ("captions",)


class References(JsonCaptions):
    """json with `references`, whole captions; in evaluation each is an item by itself."""

    name = "references"
    fields = ("references",)


class Img2Dataset(JsonCaptions):
    """json with a `caption`, as img2dataset writes it."""

    name = "img2dataset"
    fields = ("caption",)


class Txt(JsonCaptions):
    """A text of its own, in UTF-8; other fields are the json's."""

    name = "txt"
    fields = ()

    def captions(self, sample: Sample) -> dict[str, list[str]]:
        return {"txt": [_txt(sample)]}

    def named(self, sample: Sample, names: Iterable[str]) -> dict[str, list[str]]:
        names = list(names)
        texts = super().named(sample, names)
        return {"txt": [_txt(sample)], **texts} if "txt" in names and "txt" in sample else texts


class Auto(Txt):
    """The first that fits a sample: dreamlip, pixelprose, captions, txt, references, img2dataset."""

    name = "auto"

    def captions(self, sample: Sample) -> dict[str, list[str]]:
        document = json_of(sample)
        layouts: list[type[JsonCaptions]] = [DreamLip, PixelProse, Sentences]
        if "txt" not in sample:
            layouts += [References, Img2Dataset]
        for layout in layouts:
            # a `caption` alone is img2dataset's, not PixelProse's
            if any(field in document for field in layout.fields if field != "caption" or layout is Img2Dataset):
                return _texts(document, layout.fields)
        return {"txt": [_txt(sample)]}


READERS: tuple[type[JsonCaptions], ...] = (
    Auto, DreamLip, PixelProse, Sentences, References, Img2Dataset, Txt,
)  # fmt: skip


def json_of(sample: Sample) -> Mapping[str, Any]:
    """The sample's json, an object; {} where there is none. Raises `BadSample`."""
    if "json" not in sample:
        return {}
    try:
        document = json.loads(sample["json"])
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise BadSample(f"not readable json: {error}") from error
    if not isinstance(document, dict):
        raise BadSample("the json is not an object")
    return document


def _txt(sample: Sample) -> str:
    try:
        return bytes(sample.get("txt", b"")).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample(f"the txt is not UTF-8: {error}") from error


def _texts(document: Mapping[str, Any], names: Iterable[str]) -> dict[str, list[str]]:
    """Of each field that the json has, a list of its texts."""
    texts: dict[str, list[str]] = {}
    for name in names:
        value: Any = document.get(name)
        if value is None and "." in name:
            value = document
            for part in name.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            continue
        texts[name] = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts[name]):
            raise BadSample(f"the json's field {name!r} holds something other than text")
    return texts
