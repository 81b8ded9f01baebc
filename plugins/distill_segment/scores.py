"""Scores from a confusion matrix that all pictures of a set are added to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill_segment.classes import IGNORE


def confusion(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Pixels by (true class, predicted class): int64 [C, C + 1], from int64 maps of one shape, without `IGNORE`.

    A predicted class C means no class, and is never correct.
    """
    scored = truth != IGNORE
    columns = classes + 1
    return torch.bincount(truth[scored] * columns + predicted[scored], minlength=classes * columns).view(
        classes, columns
    )


def scores_of(matrix: Tensor, names: Sequence[str]) -> dict[str, float]:
    """From `confusion`, in percent: `mIoU`, the mean over classes that occur in truth or prediction of their
    `IoU/NAME`; `pixel_accuracy`; and `mean_accuracy`, over classes in the truth (Long et al. 2015, section 5).
    """
    pixels = matrix.double()
    right, true, predicted = pixels.diag(), pixels.sum(1), pixels[:, :-1].sum(0)
    union = true + predicted - right
    scores = {f"IoU/{name}": 100 * (right[i] / union[i]).item() for i, name in enumerate(names) if union[i] > 0}
    return {
        "mIoU": sum(scores.values()) / len(scores),
        "pixel_accuracy": 100 * (right.sum() / pixels.sum()).item(),
        "mean_accuracy": 100 * (right / true)[true > 0].mean().item(),
        **scores,
    }
