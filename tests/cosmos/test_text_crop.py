"""Text cropping: how many sentences, which, and from which layouts."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

import distill_vl
from distill_core.contracts.slot import Context
from distill_core.errors import BadSample
from distill_core.registry import Registry
from distill_cosmos.text_crop import TextCrop
from distill_vl.caption import WholeCaption
from distill_vl.captions import TakeConfig, draw, sentences

POOL = [f"sentence {chr(97 + i)}" for i in range(12)]


def crop(**options: Any) -> TextCrop:
    context = Context(Registry.of(distill_vl))
    return TextCrop(TextCrop.Config.model_validate_json(json.dumps(options), context=context))


def sample(document: Any = None, txt: bytes | None = None) -> dict[str, Any]:
    fields: dict[str, Any] = {"__key__": "k", "__url__": "u"}
    if document is not None:
        fields["json"] = document if isinstance(document, bytes) else json.dumps(document).encode()
    if txt is not None:
        fields["txt"] = txt
    return fields


def test_global_texts_hold_one_to_five_sentences_uniformly() -> None:
    """Catches a number that is fixed, off by one, or not uniform (chi-square, 4 degrees, p = 1e-4 at 23.5)."""
    augmentation, counts = crop(), Counter[int]()
    for seed in range(1500):
        views = augmentation.train_views(sample({"captions": POOL}), np.random.default_rng(seed))
        assert [view.role for view in views] == ["global"] * 2 + ["local"] * 6
        for view in views[:2]:
            parts = view.data.split(". ")
            assert len(set(parts)) == len(parts), "drawn with replacement"
            assert set(parts) <= set(POOL)
            counts[len(parts)] += 1
    expected = 3000 / 5
    assert set(counts) == {1, 2, 3, 4, 5}
    assert sum((counts[k] - expected) ** 2 / expected for k in counts) < 23.5


def test_local_texts_are_single_sentences_without_replacement() -> None:
    """Catches locals drawn independently, and sentences that are favoured (p = 1e-4 at 37.4 for 11 degrees)."""
    augmentation, counts = crop(), Counter[str]()
    for seed in range(1000):
        views = augmentation.train_views(sample({"captions": POOL}), np.random.default_rng(seed))[2:]
        assert len({view.data for view in views}) == 6
        assert {view.data for view in views} <= set(POOL)
        counts.update(view.data for view in views)
    expected = 6000 / 12
    assert sum((counts[text] - expected) ** 2 / expected for text in POOL) < 37.4


@pytest.mark.parametrize(("population", "count"), [(3, 3), (3, 5), (1, 6), (4, 9), (5, 0)])
def test_short_lists_are_repeated_whole_then_topped_up(population: int, count: int) -> None:
    for seed in range(50):
        chosen = list(draw(population, count, np.random.default_rng(seed)))
        whole, rest = divmod(count, population)
        assert len(chosen) == count
        assert chosen[: whole * population] == list(range(population)) * whole or whole == 0
        assert len(set(chosen[whole * population :])) == rest
        assert set(Counter(chosen).values()) <= {whole, whole + 1}


def test_draws_differ_between_global_texts() -> None:
    """Catches both globals made from one draw."""
    different = 0
    for seed in range(200):
        first, second = crop().train_views(sample({"captions": POOL}), np.random.default_rng(seed))[:2]
        different += first.data != second.data
    assert different > 180


def test_one_full_stop_between_sentences() -> None:
    """The public code gives "A cat.. a dog"."""
    document = {"captions": ["A cat.", "a dog. ", "It rains."]}
    for seed in range(30):
        for view in crop().train_views(sample(document), np.random.default_rng(seed)):
            assert ".." not in view.data
            assert not view.data.endswith(".")


def test_marks_of_their_own_are_kept() -> None:
    """Not "Is it?. Wow!. A dog"."""
    document = {"captions": ["Is it a cat?", "Wow!", "A dog", "it sits."]}
    assert crop().decode(sample(document)) == ["Is it a cat? Wow! A dog. it sits"]


def test_layouts() -> None:
    dreamlip = {
        "raw_caption": "a raw one",
        "shortIB_captions": ["short ib"],
        "longIB_captions": ["Long one. And two."],
        "shortSV_captions": ["short sv."],
        "longSV_captions": [],
        "shortLLA_captions": ["short lla"],
        "longLLA_captions": ["The end? Yes. Mr. Smith sat down."],
        "other": 3,
    }
    assert crop().pool(sample(dreamlip)) == [
        "a raw one", "short ib", "Long one", "And two", "short sv", "short lla", "The end? Yes", "Mr",
        "Smith sat down",
    ]  # fmt: skip
    assert crop(split="sentences").pool(sample(dreamlip)) == [
        "a raw one", "short ib", "Long one", "And two", "short sv", "short lla", "The end?", "Yes",
        "Mr. Smith sat down",
    ]  # fmt: skip
    prose = {"original_caption": "Cat. On a mat", "caption": "This is a cat. It sits on a mat. "}
    assert crop().pool(sample(prose)) == ["Cat. On a mat", "This is a cat", "It sits on a mat"]
    assert crop().pool(sample(txt=b"One thing. Another!  A third")) == ["One thing", "Another!  A third"]
    assert crop(split="sentences").pool(sample(txt=b"One thing. Another!  A third")) == [
        "One thing", "Another!", "A third",
    ]  # fmt: skip
    assert crop(layout="txt").pool(sample({"captions": ["x"]}, txt=b"from txt")) == ["from txt"]
    assert crop(layout="dreamlip").pool(sample({"raw_caption": ["as", "a list"]})) == ["as", "a list"]


def test_fields_in_place_of_the_layouts() -> None:
    """The web's captions alone (CLIP and SLIP as published), in any layout and from any field."""
    told = sample({"raw_caption": ["web. more"], "longIB_captions": ["Long one."], "alt": "an alt. text"}, txt=b"no")
    assert crop(fields=["raw_caption"]).pool(told) == ["web", "more"]
    assert crop(fields=["alt", "longIB_captions"], layout="txt").pool(told) == ["an alt", "text", "Long one"]
    with pytest.raises(BadSample, match="no caption in the fields other"):
        crop(fields=["other"]).pool(told)


@pytest.mark.parametrize(
    "bad",
    [
        sample(),
        sample({"captions": []}),
        sample({"captions": ["", " . "]}),
        sample({"captions": [3]}),
        sample(b"{not json"),
        sample(b'{"a":' + b"[" * 100_000),
        sample([1, 2]),
        sample(txt=b"\xff\xfe"),
        sample(txt=b"  "),
        sample({"raw_caption": None, "longIB_captions": []}),
        sample(txt=b" </s>\n. . </s>"),
    ],
)
def test_a_sample_without_a_caption_is_bad(bad: dict[str, Any]) -> None:
    with pytest.raises(BadSample):
        crop().train_views(bad, np.random.default_rng(0))


def test_evaluation_reads_the_whole_caption_or_a_field() -> None:
    document = {"captions": ["A cat.", "it sits"], "name": "cat", "others": ["a", "b"]}
    assert crop().decode(sample(document)) == ["A cat. it sits"]
    assert crop().decode(sample(document), "name") == ["cat"]
    assert crop().decode(sample(document), "others") == ["a", "b"]
    with pytest.raises(BadSample, match="missing"):
        crop().decode(sample(document), "missing")


CAPTIONS = [
    "A dog. It runs 3.5 m.",
    "a dog\nit runs</s>fast",
    "one</s></s>. . two...three",
    " \n. no full stop",
    "J. S. Bach? Yes! He sat",
    "",
]


@pytest.mark.parametrize("caption", CAPTIONS)
def test_captions_are_cut_as_the_public_codes_cut_them(caption: str) -> None:
    """COSMOS, FLAIR and DreamLIP: at every full stop, line break and `</s>`; empty parts are dropped."""
    parts, current = [], ""
    for character in caption.replace("</s>", "\n"):
        if character in "\n.":
            parts.append(current)
            current = ""
        else:
            current += character
    parts = [part.strip() for part in [*parts, current] if part.strip()]
    assert sentences(caption) == parts


def test_chinese_and_japanese_full_stops_end_a_sentence() -> None:
    text = "\u4e00\u53ea\u732b\u3002\u5b83\u5750\u7740\uff01\u597d"
    assert sentences(text) == ["\u4e00\u53ea\u732b", "\u5b83\u5750\u7740\uff01\u597d"]
    assert sentences(text, "sentences") == ["\u4e00\u53ea\u732b", "\u5b83\u5750\u7740\uff01", "\u597d"]


def test_sentences_keep_abbreviations_and_numbers_together() -> None:
    assert sentences("J. S. Bach sat. St. Paul's is near! Dr. Who? no</s>3.5 m\nhigh.", "sentences") == [
        "J. S. Bach sat", "St. Paul's is near!", "Dr. Who?", "no", "3.5 m", "high",
    ]  # fmt: skip


@pytest.mark.parametrize("split", ["full_stops", "sentences"])
def test_evaluation_and_whole_captions_are_not_cut(split: str) -> None:
    """A text that is read as one must not become "3. 5 m"."""
    told = sample(txt=b"A tower of 3.5 m by J. S. Bach.</s>It stands\n")
    assert crop(split=split).decode(told) == ["A tower of 3.5 m by J. S. Bach. It stands"]
    whole = WholeCaption(TakeConfig.model_validate({"split": split}))
    assert whole.train_views(told, np.random.default_rng(0))[0].data == "A tower of 3.5 m by J. S. Bach. It stands"
