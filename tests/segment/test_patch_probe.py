"""The probe of patches: against scikit-learn, labels by hand, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from colours import painted, png, sample
from score_values import values
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score

from distill_authoring.conformance import assert_conforms
from distill_core.errors import DataError, UserError
from distill_core.evaluate.sets import EvaluationSet
from distill_core.plan import BackboneSpec, ModalityPlan, Plan
from distill_segment.cases import samples
from distill_segment.patch_probe import PatchProbe, PatchProbeConfig, patch_labels
from distill_vl.example import model


def run(task: dict[str, Any], *scored: Any, with_model: Any = None) -> dict[str, float]:
    config = PatchProbeConfig.model_validate_json(json.dumps(task))
    return values(PatchProbe(config).run(with_model or model(), [EvaluationSet("set", list(scored))]))


def test_conforms() -> None:
    assert_conforms(PatchProbe)


def test_labels_of_patches_by_hand() -> None:
    """Majorities, the lowest of equals, pixels that are not scored, and a patch without any that is."""
    mask = torch.tensor([[0, 1, 2, 255], [1, 1, 255, 255], [3, 0, 255, 255], [0, 3, 255, 255]])
    assert patch_labels(mask, 2).tolist() == [[1, 2], [0, 255]]


def test_it_is_a_logistic_regression_of_the_towers_tokens() -> None:
    """Two folds on noise, masks of whole patches. Catches a fold that has learned from itself, features that are not
    the tower's tokens or not standardised by the learned fold, and rows for columns."""
    rng = np.random.default_rng(3)
    pictures = [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(5)]
    labels = [rng.integers(0, 3, (4, 4)) for _ in pictures]
    scored = [
        sample(png(x), y.repeat(4, 0).repeat(4, 1), "a\nb\nc\n", f"k{i}")
        for i, (x, y) in enumerate(zip(pictures, labels, strict=True))
    ]
    tower = model()
    augment: Any = tower.augment["image"]
    from PIL import Image

    from distill_core.batch import View

    views = [[View(augment.normalise(Image.fromarray(x)))] for x in pictures]
    tokens = tower.features("image", views, tokens_of=(0,)).tokens[0].numpy()
    truth, found = [], []
    for fold in (0, 1):
        learned = [i for i in range(5) if i % 2 != fold]
        x = np.concatenate([tokens[i] for i in learned])
        mean, std = x.mean(0), x.std(0, ddof=1)
        probe = LogisticRegression(C=1.0, max_iter=3000, tol=1e-8)
        probe.fit((x - mean) / std, np.concatenate([labels[i].reshape(-1) for i in learned]))
        for i in range(fold, 5, 2):
            logits = torch.from_numpy(probe.decision_function((tokens[i] - mean) / std)).T.view(1, 3, 4, 4)
            large = torch.nn.functional.interpolate(logits, size=(16, 16), mode="bilinear")
            found.append(large[0].argmax(0).numpy().reshape(-1))
            truth.append(labels[i].repeat(4, 0).repeat(4, 1).reshape(-1))
    expected = 100 * jaccard_score(np.concatenate(truth), np.concatenate(found), average="macro")
    assert run({"folds": 2}, *scored)["set/mIoU"] == pytest.approx(expected, abs=0.5)


def test_patches_of_plain_colours_are_told_apart() -> None:
    """A picture at twice the tower's size, whose masks are not the picture's shape after resizing."""
    rng = np.random.default_rng(0)
    scored = []
    for i in range(6):
        numbers = rng.integers(0, 3, (2, 2))
        picture = painted([[("red", "green", "blue")[n] for n in row] for row in numbers], 16)
        scored.append(sample(picture, numbers.repeat(16, 0).repeat(16, 1), key=f"k{i}"))
    scores = run({"folds": 3, "side": 32}, *scored)
    assert scores["set/mIoU"] > 90
    assert scores["set/pictures"] == 6


def test_what_is_refused() -> None:
    few = samples(2)
    with pytest.raises(DataError, match=r"'set': 2 pictures with a mask, and 5 folds"):
        run({}, *few)
    with pytest.raises(UserError, match="not whole patches of 4 px; set `side`"):
        run({"side": 18, "folds": 2}, *few)
    blind = ModalityPlan(("global",), BackboneSpec(8, 8, has_tokens=False))
    assert list(PatchProbe.problems(PatchProbeConfig(), Plan({"image": blind}))) == [
        "'patch_probe' needs tokens of 'image'; its backbone gives none"
    ]


def test_a_picture_without_a_mask_is_skipped_and_named() -> None:
    scored = samples(3)
    del scored[1]["mask.png"]  # type: ignore[attr-defined]
    of_set = EvaluationSet("set", scored)
    PatchProbe(PatchProbeConfig(folds=2)).run(model(), [of_set])
    assert [(s.key, s.reason) for s in of_set.skipped.values()] == [("noise-1", "image: no mask: no field mask.png")]
