"""Composited scenes: masks are exact, sentences true, scenes the same each time and of their split's concepts alone."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from distill_authoring.conformance import assert_conforms
from distill_core.batch import Sample
from distill_core.errors import DataError
from distill_emoji import scenes as scenes_module
from distill_emoji.scenes import EmojiScenes, ScenesConfig, _cells


@pytest.mark.slow
def test_conforms() -> None:
    assert_conforms(EmojiScenes)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def scenes(cache: str, split: str = "validation", **options: object) -> dict[str, list[Sample]]:
    emoji = {"limit": 150, "shards": 1, "size": 24, "styles": ("openmoji", "twemoji"), "cache": cache}
    config = {"scenes": 6, "concepts": 6, "size": 48, "emoji": emoji, **options}
    source = EmojiScenes(ScenesConfig.model_validate(config))
    source.prepare()
    return {style: list(samples) for style, samples in source.samples(split).items()}


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def test_masks_are_exact(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same scenes on black and on white tell each pixel's alpha, 255 - (white - black): the mask is alpha > 127.

    Each object that the json names is in the mask, and no other.
    """

    def on(value: int) -> list[Sample]:
        def plain(size: int, rng: np.random.Generator) -> Image.Image:
            rng.uniform(0, 1, (2, 3))  # as many as the real one draws
            return Image.new("RGBA", (size, size), (value, value, value, 255))

        monkeypatch.setattr(scenes_module, "_background", plain)
        return [sample for samples in scenes(cache).values() for sample in samples]

    for black, white in zip(on(0), on(255), strict=True):
        mask, record = pixels(white["mask.png"]), json.loads(white["json"])
        alpha = 255 - (pixels(white["png"]) - pixels(black["png"])).mean(-1)
        assert (mask > 0)[alpha > 129].all()
        assert not (mask > 0)[alpha < 126].any()
        assert 0.05 < (alpha > 129).mean() < 0.9
        names = white["classes.txt"].decode().split("\n")
        assert names[0] == "background"
        assert {names[i] for i in np.unique(mask)} == {"background", *record["objects"]}
        assert 2 <= len(record["objects"]) == len(record["captions"]) <= 4
        assert white["image_0"] == white["png"]


def test_what_tells_scenes_apart(cache: str) -> None:
    """Kept embeddings: sources of other options stand side by side, and the same ones are known again."""

    def told(**options: object) -> tuple[str, str]:
        emoji = {"limit": 150, "shards": 1, "size": 24, "styles": ("openmoji",), "cache": cache}
        source = EmojiScenes(ScenesConfig.model_validate({"scenes": 2, "concepts": 6, "emoji": emoji, **options}))
        source.prepare()
        (made,) = source.samples("validation").values()
        return made.place, made.fingerprint()

    assert told() == told()
    for options in ({"size": 48}, {"seed": 1}, {"scenes": 3}):
        assert all(one != other for one, other in zip(told(), told(**options), strict=True))


def test_a_background_that_is_not_scored(cache: str) -> None:
    """The same scenes; where the background was, 255, and every other class one less."""
    scored, without = (scenes(cache, background=background) for background in (True, False))
    for one, other in zip(scored["openmoji"], without["openmoji"], strict=True):
        assert one["png"] == other["png"]
        was = pixels(one["mask.png"])
        assert (pixels(other["mask.png"]) == np.where(was == 0, 255, was - 1)).all()
        assert one["classes.txt"].split(b"\n")[1:] == other["classes.txt"].split(b"\n")


def test_the_sentence_is_true_and_the_other_is_not(cache: str) -> None:
    for sample in scenes(cache, scenes=12)["twemoji"]:
        mask, record = pixels(sample["mask.png"]), json.loads(sample["json"])
        left, right = record["caption_0"].split(" to the left of ")
        assert record["caption_1"] == f"{right} to the left of {left}"
        names = sample["classes.txt"].decode().split("\n")
        columns = {name: np.nonzero(mask == names.index(name))[1] for name in (left, right)}
        assert columns[left].max() < columns[right].min()


def test_the_same_each_time_and_styles_alike(cache: str) -> None:
    one, again, other = scenes(cache), scenes(cache), scenes(cache, seed=1)
    assert one == again
    assert one["openmoji"][0]["classes.txt"] == one["twemoji"][0]["classes.txt"] != other["twemoji"][0]["classes.txt"]
    for a, b in zip(one["openmoji"], one["twemoji"], strict=True):
        assert json.loads(a["json"]) == json.loads(b["json"])
        assert a["png"] != b["png"]
    of = {split: set(scenes(cache, split)["twemoji"][0]["classes.txt"].split(b"\n")[1:]) for split in ("train", "test")}
    mine = set(one["twemoji"][0]["classes.txt"].split(b"\n")[1:])
    assert not mine & of["train"]
    assert not mine & of["test"]


def test_both_columns_have_an_object() -> None:
    for seed in range(30):
        for count in (2, 3, 4):
            cells = _cells(count, np.random.default_rng(seed))
            assert len(set(cells)) == count
            assert {column for column, _ in cells} == {0, 1}


def test_what_is_refused(cache: str) -> None:
    with pytest.raises(DataError, match=r"the split 'validation' has .* concepts in all styles; concepts is 200"):
        scenes(cache, concepts=200)
    for objects in ((1, 2), (3, 2), (2, 5)):
        with pytest.raises(ValueError, match="a scene has 2 to 4"):
            ScenesConfig(objects=objects)
    with pytest.raises(ValueError, match="too few for 4 objects"):
        ScenesConfig(concepts=3)
