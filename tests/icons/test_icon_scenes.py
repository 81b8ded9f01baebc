"""The icon scenes: boxes, colours and places are those of the pixels, and sentences are true of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reading import size_of

from distill_core.errors import DataError
from distill_icons import scenes
from distill_icons.scenes import IconScenes
from distill_icons.source import IconsSource

pytest.importorskip("resvg_py")


@pytest.fixture(scope="module")
def made(made: Callable[..., IconsSource]) -> Callable[..., IconScenes]:
    def source(**options: Any) -> IconScenes:
        icons = made(sets=("game_icons",), shards=1).config
        defaults = {"scenes": 60, "held_out": 25, "cache": icons.cache, "icons": icons.model_dump()}
        return IconScenes(IconScenes.Config(**{**defaults, **options}))

    return source


def read(source: IconScenes, split: str) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """Pixels and json of each scene of a split."""
    source.prepare()
    found = []
    for samples in source.samples(split).values():
        for sample in samples:
            with Image.open(BytesIO(sample["png"])) as picture:
                found.append((np.asarray(picture).astype(int), json.loads(sample["json"])))
    return found


@pytest.fixture(scope="module")
def train(made: Callable[..., IconScenes]) -> list[tuple[np.ndarray, dict[str, Any]]]:
    return read(made(objects=(2, 5)), "train")


def rgb(code: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(code[1:]))


def test_boxes_are_exactly_what_is_drawn(train: list[tuple[np.ndarray, dict[str, Any]]]) -> None:
    """Outside all boxes is the ground alone; each box's four sides are drawn on; its colour is in it."""
    assert {len(record["objects"]) for _, record in train} == {2, 3, 4, 5}
    for pixels, record in train:
        drawn = (pixels != rgb(record["ground"]["rgb"])).any(-1)
        inside = np.zeros_like(drawn)
        for one in record["objects"]:
            left, top, right, bottom = one["box"]
            assert not inside[top:bottom, left:right].any(), "boxes overlap"
            inside[top:bottom, left:right] = True
            part = drawn[top:bottom, left:right]
            assert part[0].any()
            assert part[-1].any()
            assert part[:, 0].any()
            assert part[:, -1].any()
            assert (np.abs(pixels[top:bottom, left:right] - rgb(one["rgb"])).sum(-1) < 40).any()
        assert not drawn[~inside].any()


def phrase(one: dict[str, Any]) -> str:
    return f"{'an' if one['colour'] == 'orange' else 'a'} {one['colour']} {one['name']}"


def holds(sentence: str, record: dict[str, Any]) -> bool:
    """Whether a sentence of two things is true, read from the boxes alone: the centres lie as it says."""
    one, words, other = re.fullmatch(r"(.+) (left of|right of|above|below) (.+)", sentence).groups()  # type: ignore[union-attr]
    by_phrase = {phrase(found): found["box"] for found in record["objects"]}
    if not {one, other} <= set(by_phrase):
        return False
    a, b = by_phrase[one], by_phrase[other]
    return {
        "left of": a[2] <= b[0],
        "right of": b[2] <= a[0],
        "above": a[3] <= b[1],
        "below": b[3] <= a[1],
    }[words]


def test_sentences_are_true_of_the_boxes(train: list[tuple[np.ndarray, dict[str, Any]]]) -> None:
    counts = {"relations": 0, "places": 0, "opposed": 0}
    for pixels, record in train:
        *sentences, whole = record["captions"]
        phrases = [phrase(one) for one in record["objects"]]
        assert all(one in whole for one in phrases)
        assert whole.endswith(f" {record['ground']['colour']} ground")
        for sentence in sentences:
            if re.search(r" (left of|right of|above|below) ", sentence):
                assert holds(sentence, record), sentence
                counts["relations"] += 1
                continue
            one = next(one for one in record["objects"] if sentence.startswith(phrase(one)))
            x, y = (one["box"][0] + one["box"][2]) / 2, (one["box"][1] + one["box"][3]) / 2
            third = len(pixels) / 3
            where = sentence.removeprefix(phrase(one))
            assert ("left" in where, "right" in where) == (x < third, x >= 2 * third), sentence
            up, down = ("upper" in where or "top" in where), ("lower" in where or "bottom" in where)
            assert (up, down) == (y < third, y >= 2 * third), sentence
            counts["places"] += 1
        if "caption_0" in record:
            assert holds(record["caption_0"], record)
            assert not holds(record["caption_1"], record), "exchanged places are true, too"
            assert not holds(record["caption_2"], record), "exchanged colours are true, too"
            counts["opposed"] += 1
    assert counts["relations"] > 60
    assert counts["places"] > 120
    assert counts["opposed"] > 30


def test_no_name_is_in_the_scenes_of_two_splits(made: Callable[..., IconScenes]) -> None:
    source = made()
    names = {
        split: {one["name"] for _, record in read(source, split) for one in record["objects"]}
        for split in ("train", "validation", "test")
    }
    assert not names["train"] & names["test"]
    assert not names["train"] & names["validation"]
    assert not names["validation"] & names["test"]
    assert min(map(len, names.values())) >= 10
    assert size_of(source, "test") == 25


def test_a_scene_does_not_depend_on_its_shard(
    made: Callable[..., IconScenes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Would catch draws that follow one another, so that a shard that is written again holds other scenes."""
    whole = [record for _, record in read(made(), "train")]
    monkeypatch.setattr(scenes, "A_SHARD", 7)
    cut = made(cache=str(tmp_path))
    assert [record for _, record in read(cut, "train")] == whole
    assert len(cut.sets("train")["scenes"]) == 9


def test_seeds_give_other_scenes(made: Callable[..., IconScenes], tmp_path: Path) -> None:
    first, second = (read(made(seed=seed, scenes=5, cache=str(tmp_path)), "train") for seed in (0, 1))
    assert all(a[1] != b[1] for a, b in zip(first, second, strict=True))


def test_too_few_names_are_a_data_error(made: Callable[..., IconScenes], tmp_path: Path) -> None:
    options = made().config.icons.model_dump()  # type: ignore[union-attr]
    few = made(icons={**options, "sets": ("lucide",)}, cache=str(tmp_path))
    with pytest.raises(DataError, match=r"split 'train' has \d icons of things .*icons\.sets"):
        few.prepare()


@pytest.mark.parametrize("objects", [(1, 3), (3, 2), (2, 6)])
def test_how_many_objects_there_may_be(made: Callable[..., IconScenes], objects: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="a scene has 2 to 5"):
        made(objects=objects)


def test_icons_with_grounds_make_no_scene(made: Callable[..., IconScenes]) -> None:
    with pytest.raises(ValueError, match=r"icons\.grounds"):
        made(icons={"grounds": True})


def test_things_are_named_once_and_in_lower_case() -> None:
    names = scenes.THINGS.read_text().splitlines()
    assert names == sorted(set(names))
    assert all(re.fullmatch(r"[a-z]+( [a-z]+)*", name) for name in names)
