"""Which captions of a sample are read: layouts, names of fields, kinds of lists, and probabilities."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
from pydantic import ValidationError

import distill_vl
from distill_core import ComponentConfig, Sample, Slot
from distill_core.contracts.slot import Context
from distill_core.errors import BadSample
from distill_core.registry import Registry
from distill_dreamlip.views import SubCaptions
from distill_tips.captions import TwoCaptions
from distill_vl.caption import WholeCaption
from distill_vl.caption_readers import CaptionReader, Txt
from distill_vl.captions import CaptionConfig

DREAMLIP = {"raw_caption": "r. r2", "shortIB_captions": ["s"], "longIB_captions": ["l1"], "longSV_captions": ["l2"]}


def reader(cls: Any = WholeCaption, **options: Any) -> Any:
    context = Context(Registry.of(distill_vl))
    return cls(cls.Config.model_validate_json(json.dumps(options), context=context))


def sample(document: Any, **fields: bytes) -> Sample:
    return {"__key__": "k", "__url__": "u", "json": json.dumps(document).encode(), **fields}


@pytest.mark.parametrize(
    ("document", "fields", "pool"),
    [
        ({"caption": "a b. c", "url": "u", "width": 3}, {}, ["a b", "c"]),
        ({"caption": "a b. c", "key": "k"}, {"txt": b"the txt. T"}, ["the txt", "T"]),
        ({"references": ["one. two", "three"], "title": "t"}, {}, ["one", "two", "three"]),
        ({"references": ["one"]}, {"txt": b"the txt"}, ["the txt"]),
        ({"original_caption": "An o. P", "caption": "c. d"}, {}, ["An o. P", "c", "d"]),
        (DREAMLIP, {"txt": b"no"}, ["r", "r2", "s", "l1", "l2"]),
    ],
)
def test_auto(document: Any, fields: dict[str, bytes], pool: list[str]) -> None:
    """Would catch a shard of img2dataset or a table's row whose captions are not found, and layouts mixed up."""
    assert reader().pool(sample(document, **fields)) == pool


@pytest.mark.parametrize(
    ("names", "pool"),
    [
        (["raw"], ["r", "r2"]),
        (["long", "raw_caption"], ["l1", "l2", "r", "r2"]),
        (["raw", "raw_caption", "short"], ["r", "r2", "s"]),
        (["a.b", "raw"], ["deep", "r", "r2"]),
        (["c.d"], ["a name with a dot"]),
    ],
)
def test_fields_by_kind_and_by_path(names: list[str], pool: list[str]) -> None:
    """Each field once, in the option's order; a name that the json has is itself."""
    document = DREAMLIP | {"a": {"b": "deep"}, "c.d": "a name with a dot"}
    assert reader(fields=names).pool(sample(document)) == pool
    assert reader(fields=["long"]).pool(sample({"long": "own"} | DREAMLIP)) == ["own"]
    with pytest.raises(BadSample, match=r"no caption in the fields a\.x, c\.d\.e"):
        reader(fields=["a.x", "c.d.e"]).pool(sample(document))


def test_probabilities() -> None:
    """`always` is always there, others each by themselves as often as they should, and evaluation reads all. A sample
    that lacks some has one at least."""
    made = reader(fields={"raw": "always", "short": 0.25, "long": 0.75})
    counts = Counter(
        field for seed in range(2000) for field in made.texts(sample(DREAMLIP), np.random.default_rng(seed))
    )
    assert counts["raw_caption"] == 2000
    assert counts["longIB_captions"] == counts["longSV_captions"], "a kind is drawn as one"
    assert abs(counts["shortIB_captions"] - 500) < 80
    assert abs(counts["longIB_captions"] - 1500) < 80
    assert list(made.texts(sample(DREAMLIP))) == list(DREAMLIP)
    assert made.decode(sample(DREAMLIP)) == ["r. r2. s. l1. l2"]
    rare = reader(fields={"short": 0.01, "long": 0.03})
    draws = [rare.pool(sample(DREAMLIP), np.random.default_rng(seed)) for seed in range(1000)]
    assert all(draws)
    assert abs(draws.count(["s"]) - 250) < 60
    assert rare.pool(sample({"shortIB_captions": "s"}), np.random.default_rng(0)) == ["s"]
    with pytest.raises(BadSample, match="no caption in the fields short, long"):
        rare.pool(sample({}), np.random.default_rng(0))
    draw = [reader(fields=["raw", "long"]).texts(sample(DREAMLIP), rng := np.random.default_rng(5)), rng.random()]
    assert draw[1] == np.random.default_rng(5).random(), "nothing is drawn where there is nothing to draw"


@pytest.mark.parametrize("chance", [0, -1, 1.5, "never", None])
def test_no_probability(chance: Any) -> None:
    with pytest.raises(ValidationError):
        reader(fields={"raw": chance})


def test_sub_captions_with_the_raw_caption_always() -> None:
    """Whole and first; a sample without it has the others."""
    made = reader(SubCaptions, count=3, fields=["long"], always=["raw"])
    for seed in range(20):
        views = [view.data for view in made.train_views(sample(DREAMLIP), np.random.default_rng(seed))]
        assert views[0] == "r. r2"
        assert sorted(views[1:]) == ["l1", "l2"]
    without = made.train_views(sample({"longIB_captions": ["x"]}), np.random.default_rng(0))
    assert [view.data for view in without] == ["x"] * 3


def test_two_captions_draw_the_synthetic_ones() -> None:
    """The web's caption is always there; where only it is drawn, all others are read."""
    made = reader(TwoCaptions, fields={"raw": "always", "long": 0.5, "short": 0.5})
    views = [made.train_views(sample(DREAMLIP), np.random.default_rng(seed)) for seed in range(100)]
    assert {first.data for first, _ in views} == {"r. r2"}
    assert {second.data for _, second in views} == {"s", "l1. l2", "l1. l2. s"}


class Verse(CaptionReader):
    """Poems: a line of `poem` is a sentence; the title is its own field; each stanza is a reference."""

    name = "verse"
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {"all": ("title", "poem")}
    sentences = ("poem",)

    def captions(self, sample: Sample) -> dict[str, list[str]]:
        return {"poem": sample["poem"].decode().splitlines(), "title": [sample["title"].decode()]}

    def references(self, sample: Sample) -> list[str]:
        return sample["poem"].decode().split("\n\n")


POEM: Sample = {"__key__": "k", "__url__": "u", "poem": b"O. One line\n\nTwo! It is.", "title": b"A. Title"}


@pytest.mark.parametrize(
    ("options", "pool"),
    [
        ({}, ["O. One line", "Two! It is", "A", "Title"]),
        ({"split": "sentences"}, ["O. One line", "Two! It is", "A. Title"]),
        ({"fields": ("title",)}, ["A", "Title"]),
        ({"fields": ("all",)}, ["A", "Title", "O. One line", "Two! It is"]),
    ],
)
def test_fields_and_split_apply_to_any_reader(options: dict[str, Any], pool: list[str]) -> None:
    """Would catch what knows only json: groups, chosen fields and sentences of another reader, and its references."""
    layout: Slot[CaptionReader] = Slot(Verse, ComponentConfig())
    made = WholeCaption(
        WholeCaption.Config(layout=layout, **{k: tuple(v) if k == "fields" else v for k, v in options.items()})
    )
    assert made.pool(POEM) == pool
    assert made.decode(POEM) == ["O. One line", "Two! It is."]
    assert made.decode(POEM, "title") == ["A. Title"]
    with pytest.raises(BadSample, match="no text in the field 'nothing'"):
        made.decode(POEM, "nothing")


def test_probabilities_of_another_readers_fields() -> None:
    layout: Slot[CaptionReader] = Slot(Verse, ComponentConfig())
    made = WholeCaption(WholeCaption.Config(layout=layout, fields={"title": "always", "poem": 0.5}))
    drawn = Counter(len(made.texts(POEM, np.random.default_rng(seed))) for seed in range(400))
    assert abs(drawn[1] - 200) < 60
    assert drawn[1] + drawn[2] == 400


def test_a_blank_caption_counts_for_none() -> None:
    with pytest.raises(BadSample, match="no caption in the layout verse"):
        WholeCaption(CaptionConfig(layout=Slot(Verse, ComponentConfig()))).texts(POEM | {"poem": b"\n", "title": b" "})


def test_the_txt_is_a_field_too() -> None:
    """Beside the json's; it is read where it is named alone: its bytes may be no text."""
    both = sample({"alt": "an alt"}, txt=b"the txt")
    assert reader(fields=["txt", "alt"]).pool(both) == ["the txt", "an alt"]
    assert reader(layout="txt", fields=["alt"]).pool(sample({"alt": "an alt"}, txt=b"\xff")) == ["an alt"]
    assert Txt(ComponentConfig()).named(both, ["alt"]) == {"alt": ["an alt"]}


def test_options_are_made_by_hand_and_written_as_before() -> None:
    """Without a registry, as in a plain PyTorch loop; a bare name in a recipe means what it did."""
    assert CaptionConfig().model_dump(mode="json")["layout"] == {"name": "auto"}
    assert WholeCaption.Config() == reader(layout="auto").config
