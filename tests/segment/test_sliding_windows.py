"""Windows slid over a picture: SCLIP's probabilities, pictures that are too long."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from colours import painted, sample
from PIL import Image
from score_values import values
from torch import Tensor
from torch.nn.functional import interpolate, one_hot, pad

from distill_core.batch import View
from distill_core.evaluate.sets import EvaluationSet
from distill_segment.segmenter import Segmenter, starts
from distill_segment.task import Segmentation, SegmentationConfig
from distill_vl.example import model


def test_windows_reach_the_end() -> None:
    assert starts(8, 8, 4) == [0]
    assert starts(12, 8, 4) == [0, 4]
    assert starts(13, 8, 4) == [0, 4, 5]
    assert starts(96, 48, 32) == [0, 32, 48]


def sclip(segmenter: Segmenter, picture: Tensor, index: Tensor, size: tuple[int, int]) -> Tensor:
    """SCLIP's public `forward_slide`, `forward_feature` and `postprocess_result`, but for the class chosen: a picture
    [1, 3, h, w], the class of each word [Q] -> probabilities [C, *size]."""  # fmt: skip
    (h_img, w_img), crop, stride = picture.shape[2:], segmenter.window, segmenter.stride
    h_grids = max(h_img - crop + stride - 1, 0) // stride + 1
    w_grids = max(w_img - crop + stride - 1, 0) // stride + 1
    preds = picture.new_zeros(1, len(index), h_img, w_img)
    count_mat = picture.new_zeros(1, 1, h_img, w_img)
    for h_idx in range(h_grids):
        for w_idx in range(w_grids):
            y2, x2 = min(h_idx * stride + crop, h_img), min(w_idx * stride + crop, w_img)
            y1, x1 = max(y2 - crop, 0), max(x2 - crop, 0)
            view = View(picture[0, :, y1:y2, x1:x2])
            features = segmenter.model.dense("image", [view], attention="correlative")
            logits = interpolate((features @ segmenter.texts.T).permute(0, 3, 1, 2), size=(crop, crop), mode="bilinear")
            preds += pad(logits, (x1, w_img - x2, y1, h_img - y2))
            count_mat[:, :, y1:y2, x1:x2] += 1
    logits = interpolate(preds / count_mat, size=size, mode="bilinear")[0]
    probabilities = (logits * segmenter.config.scale).softmax(0)
    cls_index = one_hot(index).T[..., None, None]
    return (probabilities[None] * cls_index).max(1)[0]


@pytest.mark.parametrize("band", [300, 1 << 24])
@pytest.mark.parametrize("size", [(23, 37), (61, 41), (9, 9)])
def test_probabilities_are_sclips(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], band: int) -> None:
    """Noise of odd sizes, overlapping windows, several words a class: would catch windows that replace one another, a
    last one that does not end with the picture, a softmax over classes in place of words, bands that do not join."""
    monkeypatch.setattr("distill_segment.segmenter.BAND", band)
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    config = SegmentationConfig(attention="correlative", stride=7, side=25, scale=10)
    segmenter = Segmenter(model(), config, [("a cat", "kitten"), ("dog",), ("sky", "cloud", "the blue")])
    scale = 25 / min(size)
    resized = picture.resize(
        (max(25, round(size[1] * scale)), max(25, round(size[0] * scale))), Image.Resampling.BICUBIC
    )
    expected = sclip(segmenter, segmenter.augmentation.normalise(resized)[None], torch.tensor([0, 0, 1, 2, 2, 2]), size)
    bands = list(segmenter.probabilities(picture, *size))
    assert len(bands) > 1 or band > 300
    assert all(part.numel() <= band for part in bands)
    torch.testing.assert_close(torch.cat(bands, 1), expected, rtol=0, atol=1e-5)
    assert expected.std() > 1e-3
    found, best = segmenter(picture, *size), expected.topk(2, 0)
    sure = best.values[0] - best.values[1] > 1e-4
    assert found[sure].tolist() == best.indices[0][sure].tolist()


def test_long_pictures_are_skipped(sees_colours: Any) -> None:
    """One pixel wide, it would be resized to a size in proportion."""
    good, thin = sample(painted([["red"]], 8), np.zeros((8, 8))), sample(painted([["red"]] * 9, 1), np.zeros((9, 1)))
    here = EvaluationSet("set", [good, {**thin, "__key__": "thin"}])
    assert values(Segmentation(SegmentationConfig()).run(sees_colours, [here]))["set/pictures"] == 1
    (skipped,) = here.skipped.values()
    assert skipped.reason == "image: 1 x 9 pixels: the longer side is more than 8 times the shorter"
