"""CLIP's tokenizer: long texts are cut before it, and nothing that fits is lost."""

import time

import numpy as np
import pytest

from distill_vl.tokenizer import LONGEST, VOCABULARY, ClipTokenizer, _tokenizer, clean


def test_no_token_is_longer_than_the_bound() -> None:
    longest = max(len(_tokenizer().decode([token]).rstrip()) for token in range(VOCABULARY - 2))
    assert 20 < longest < LONGEST


@pytest.mark.parametrize(
    "text",
    [
        "".join(np.random.default_rng(0).choice(list("abcdefgh"), 1_000_000)),
        "\N{CJK UNIFIED IDEOGRAPH-5B57}" * 1_000_000,
        "word " * 200_000,
        "&amp;" * 200_000,
    ],
    ids=["letters", "ideographs", "words", "entities"],
)
def test_a_megabyte_takes_no_time(text: str) -> None:
    """Without the cut: 2 minutes for the letters."""
    start = time.process_time()  # others' work does not count
    ids = ClipTokenizer()([text])
    assert time.process_time() - start < 15
    assert (ids != 0).all()
    assert ids[0, -1] == VOCABULARY - 1


@pytest.mark.parametrize("seed", range(20))
def test_what_fits_is_as_without_the_cut(seed: int) -> None:
    """Words, runs without spaces that are longer than the cut, entities, and characters of several bytes."""
    rng = np.random.default_rng(seed)
    kinds = [
        list("abcdefghij"),
        list("etaoin shrdlu"),
        ["photography", "sunday"],
        ["&amp;", "&lt;", "a"],
        list("\xe9\u5b57\u0130x"),
    ]
    text = "".join(rng.choice(kinds[seed % 5], int(rng.integers(1, 6000))))
    whole = _tokenizer().tokenize_batch([clean(text)], context_length=77)
    assert np.array_equal(ClipTokenizer()([text]).numpy(), whole)
    short = _tokenizer().tokenize_batch([clean(text)], context_length=9)
    assert np.array_equal(ClipTokenizer(9)([text]).numpy(), short)
