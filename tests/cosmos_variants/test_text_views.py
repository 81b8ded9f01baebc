"""Masked text, word dropout and sentence crops: what is hidden, how often, and which sentences stand together."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from distill_core.batch import View
from distill_core.interfaces import Augmentation
from distill_core.registry import Registry
from distill_cosmos.text_crop import TextCrop
from distill_cosmos_variants.text_views import MaskedText, SentenceCrop, WordDropout

POOL = [f"{letter}0 {letter}1 {letter}2 {letter}3" for letter in "abcdefghijkl"]
ALL: list[type[Augmentation]] = [MaskedText, WordDropout, SentenceCrop]


def make(cls: type[Augmentation], **options: Any) -> Any:
    return cls(cls.Config.model_validate_json(json.dumps(options)))


def views_of(augmentation: Augmentation, seed: int, pool: list[str] = POOL) -> list[View]:
    document = json.dumps({"captions": pool}).encode()
    return augmentation.train_views({"__key__": "k", "__url__": "u", "json": document}, np.random.default_rng(seed))


def sentences_of(text: str) -> list[int]:
    """The places in POOL of a text's sentences."""
    return [POOL.index(part) for part in text.split(". ")]


def is_subsequence(part: list[str], whole: list[str]) -> bool:
    rest = iter(whole)
    return all(word in rest for word in part)


@pytest.mark.parametrize("cls", ALL)
def test_globals_and_locals_as_the_roles_say(cls: type[Augmentation], registry: Registry) -> None:
    assert registry.entries["augmentation", cls.name].cls is cls
    for options in ({}, {"global": 1, "local": 0}, {"global": 3, "local": 5}):
        augmentation = make(cls, **options)
        roles = cls.roles(augmentation.config)
        assert roles == ("global",) * options.get("global", 2) + ("local",) * options.get("local", 6)
        views = views_of(augmentation, 1)
        assert tuple(view.role for view in views) == roles
        assert views == views_of(augmentation, 1), "not a function of the generator alone"
        assert all(view.data.strip() for view in views)


@pytest.mark.parametrize("cls", [MaskedText, WordDropout])
def test_one_word_is_left_of_a_text_of_one_word(cls: type[Augmentation]) -> None:
    options = {"probability": 1.0} if cls is WordDropout else {"ratio": 0.99}
    assert {view.data for view in views_of(make(cls, **options), 3, ["word"])} >= {"word"}
    assert all(view.data for seed in range(20) for view in views_of(make(cls, **options), seed))


def test_masked_texts_are_the_globals_in_turn() -> None:
    """Catches locals of other sentences, words in another order, and a share that is not the one asked for."""
    augmentation = make(MaskedText, ratio=0.3, local=5)
    for seed in range(200):
        views = views_of(augmentation, seed)
        for i, local in enumerate(views[2:]):
            whole = views[i % 2]
            words, kept = whole.data.split(), local.data.split()
            assert len(kept) == len(words) - round(0.3 * len(words))
            assert is_subsequence(kept, words)
        assert views[:2] == views_of(make(TextCrop, local=0), seed), "globals are not text_crop's"


def test_random_masking_favours_no_word() -> None:
    """9 of 12 words stay; each must equally often (chi-square, 11 degrees, p = 1e-4 at 37.4)."""
    augmentation, counts = make(MaskedText, ratio=0.25, **{"global": 1}, local=1, sentences=1), Counter[str]()
    pool = [" ".join(f"w{i}" for i in range(12))]
    for seed in range(2000):
        counts.update(views_of(augmentation, seed, pool)[1].data.split())
    expected = 2000 * 9 / 12
    # with a fixed number kept, the counts vary less than independent ones by the factor hidden / all
    assert sum((counts[f"w{i}"] - expected) ** 2 / expected for i in range(12)) / 0.25 < 37.4


def test_block_masking_hides_neighbours() -> None:
    augmentation = make(MaskedText, ratio=0.5, masking="block", replace="_", **{"global": 1}, local=1, sentences=1)
    pool = [" ".join(f"w{i}" for i in range(8))]
    starts = Counter[int]()
    for seed in range(500):
        words = views_of(augmentation, seed, pool)[1].data.split()
        assert len(words) == 8
        hidden = [i for i, word in enumerate(words) if word == "_"]
        assert hidden == list(range(hidden[0], hidden[0] + 4))
        assert all(word == f"w{i}" for i, word in enumerate(words) if i not in hidden)
        starts[hidden[0]] += 1
    assert set(starts) == {0, 1, 2, 3, 4}
    assert min(starts.values()) > 60  # 100 each; p < 1e-5


@pytest.mark.parametrize(("ratio", "words", "kept"), [(0.0, 7, 7), (0.5, 1, 1), (0.9, 4, 1), (0.5, 4, 2)])
def test_how_many_words_stay(ratio: float, words: int, kept: int) -> None:
    augmentation = make(MaskedText, ratio=ratio)
    text = " ".join(f"w{i}" for i in range(words))
    assert len(augmentation.mask(text, np.random.default_rng(0)).split()) == kept


def test_word_dropout_is_text_crop_with_words_missing() -> None:
    augmentation, plain, counts = make(WordDropout, probability=0.2), make(TextCrop), Counter[bool]()
    for seed in range(300):
        views, whole = views_of(augmentation, seed), views_of(plain, seed)
        for view, full in zip(views, whole, strict=True):
            assert view.role == full.role
            kept, words = view.data.split(), full.data.split()
            assert is_subsequence(kept, words)
            if view.role == "global":
                counts[True] += len(kept)
                counts[False] += len(words) - len(kept)
    total = sum(counts.values())
    deviation = (total * 0.2 * 0.8) ** 0.5
    assert abs(counts[False] - 0.2 * total) < 4.5 * deviation


def test_word_dropout_of_one_role_leaves_the_other() -> None:
    whole = views_of(make(TextCrop), 5)
    views = views_of(make(WordDropout, probability=0.9, roles=["local"]), 5)
    assert views[:2] == whole[:2]
    assert views[2:] != whole[2:]
    assert views_of(make(WordDropout, probability=0.0), 5) == whole


def test_sentence_crops_are_runs_of_neighbours() -> None:
    """Global lengths are uniform in 1..5, and each run of a length as likely as another (p = 1e-4 each)."""
    augmentation, lengths, starts = make(SentenceCrop, local_sentences=2), Counter[int](), Counter[int]()
    for seed in range(1500):
        views = views_of(augmentation, seed)
        for view in views:
            run = sentences_of(view.data)
            assert run == list(range(run[0], run[0] + len(run)))
        for view in views[:2]:
            lengths[len(sentences_of(view.data))] += 1
            if len(sentences_of(view.data)) == 5:
                starts[sentences_of(view.data)[0]] += 1
        local = [view.data for view in views[2:]]
        assert len(set(local)) == 6, "local runs at the same place though there are enough"
        assert all(len(sentences_of(view.data)) == 2 for view in views[2:])
    assert set(lengths) == {1, 2, 3, 4, 5}
    assert sum((n - 600) ** 2 / 600 for n in lengths.values()) < 23.5
    assert set(starts) == set(range(8))
    expected = sum(starts.values()) / 8
    assert sum((n - expected) ** 2 / expected for n in starts.values()) < 29.9


def test_shuffled_runs_hold_the_same_sentences_in_any_order() -> None:
    augmentation = make(SentenceCrop, shuffle=True, sentences=3)
    orders = Counter[tuple[int, ...]]()
    for seed in range(900):
        for view in views_of(augmentation, seed)[:2]:
            run = sentences_of(view.data)
            assert sorted(run) == list(range(min(run), min(run) + len(run)))
            if len(run) == 3:
                orders[tuple(i - min(run) for i in run)] += 1
    assert len(orders) == 6
    expected = sum(orders.values()) / 6
    assert sum((n - expected) ** 2 / expected for n in orders.values()) < 25.8


@pytest.mark.parametrize("cls", ALL)
def test_samples_with_fewer_sentences_than_views(cls: type[Augmentation]) -> None:
    for pool in (POOL[:1], POOL[:2]):
        views = views_of(make(cls), 2, pool)
        assert len(views) == 8
        allowed = {word for sentence in pool for word in sentence.split()}
        assert {word.rstrip(".") for view in views for word in view.data.split()} <= allowed


def test_a_long_run_is_the_whole_pool() -> None:
    views = views_of(make(SentenceCrop, local=2, local_sentences=99), 0)
    assert [sentences_of(view.data) for view in views[2:]] == [list(range(12))] * 2
