"""What is drawn of given weights: colours, shades, components."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill_explore.attention import ViewedItem, entropy, principal
from distill_explore.drawing import Map, overlay, scale, shade, strip, with_scale


def test_entropy_by_hand() -> None:
    found = entropy(torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.25, 0.25, 0], [0.1, 0.1, 0, 0]]))
    expected = [math.log(4), 0, 1.5 * math.log(2), math.log(2)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def item(shown: Any, layout: Any, tokens: Any = None) -> ViewedItem:
    length = len(layout) if isinstance(layout, list) else layout[0] * layout[1]
    return ViewedItem("m", shown, layout, torch.zeros(2), tokens, torch.ones(length, dtype=torch.bool), None)


def test_colour_lies_where_the_weight_is() -> None:
    """Would catch a grid that is turned or mirrored: all weight on the patch at the right of the upper row."""
    seen = item(Image.new("RGB", (60, 30), "white"), (2, 4))
    weights = torch.zeros(8)
    weights[3] = 1
    drawn = np.asarray(overlay(Map("", seen, weights), 120)).astype(int)
    assert drawn.shape == (60, 120, 3)
    assert drawn[15, 105].tolist() != drawn[45, 15].tolist()
    darkness = 255 - drawn.mean(-1)
    y, x = np.unravel_index(darkness.argmax(), darkness.shape)
    assert y < 30
    assert x >= 90
    even = np.asarray(overlay(Map("", seen, torch.full((8,), 1 / 8)), 120))
    assert np.ptp(even.reshape(-1, 3), axis=0).max() == 0, "read alike, drawn alike"


def test_the_scale_says_what_colours_mean() -> None:
    """From the colour of nothing to that of the largest weight, as on the map, with a mark at an even share."""
    weights = torch.tensor([0.5, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.0])
    one = Map("mine", item(Image.new("RGB", (60, 30), "white"), (2, 4)), weights)
    bar = np.asarray(scale(one, 120)).astype(int)
    drawn = np.asarray(overlay(one, 120)).astype(int)
    assert np.abs(bar[4, -1] - drawn[0, 0]).max() <= 2, "the most read patch"
    assert bar[4, 0].tolist() == [255, 255, 255]
    assert np.ptp(bar[0, 30]) == 0, "the mark is grey"
    assert bar[0, 30].max() < 200
    assert with_scale(one, 120).height > overlay(one, 120).height + 10
    assert one.line == "entropy 1.57 of 2.08 nats, top token 4.0x an even share  mine"


def test_words_are_shaded_by_weight() -> None:
    """One chip a token, its colour that of its weight; a long text goes on in another line."""
    seen = item("a b", ["<start> ", "a ", "b", "c ", "<end> "])
    one = Map("", seen, torch.tensor([0.0, 0.1, 0.6, 0.3, 0.0]))
    drawn = np.asarray(strip(one))
    for colour in shade(one.levels):
        assert (drawn == colour).all(-1).sum() > 50
    assert len(np.unique(shade(one.levels), axis=0)) == 4
    long = item("x", ["word "] * 60)
    assert strip(Map("", long, torch.full((60,), 1 / 60))).height > 3 * 24


def test_principal_components() -> None:
    """Against numpy's eigenvectors of the covariance, up to the choice of sign; two tokens have one component."""
    tokens = torch.randn(20, 6)
    found = principal(tokens)
    values, vectors = np.linalg.eigh(np.cov(tokens.numpy().T))
    for i, column in enumerate(found.T.numpy()):
        other = (tokens - tokens.mean(0)).numpy() @ vectors[:, np.argsort(-values)[i]]
        assert abs(np.corrcoef(column, other)[0, 1]) == pytest.approx(1, abs=1e-4)
    assert found.aminmax(dim=0).min.tolist() == [0, 0, 0]
    assert found.aminmax(dim=0).max.tolist() == [1, 1, 1]
    two = principal(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    assert two.shape == (2, 3)
    assert not two[:, 2].any()
