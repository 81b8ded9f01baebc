"""Shared by tasks that choose among classes: accuracies, and a picture of the confusion matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill_core import EvaluationSet, Media, Model, Picture, Score, Task, counted

WHOLE = 30
"""The largest number of classes whose whole confusion matrix is drawn; above, the most confused pairs are."""
PAIRS = 25


def ranks_of_class(scores: Tensor, truth: Tensor) -> Tensor:
    """The rank (0 is best) of each item's own class: scores [N, C], truth [N] -> [N].

    Ties count against the model, and so do scores that are NaN.
    """
    own = scores.gather(1, truth[:, None])
    return (~(scores < own)).sum(1) - 1 + own[:, 0].isnan()


ACCURACIES = ("top1", "top5", "mean_per_class")


def accuracies(ranks: Tensor, truth: Tensor, classes: int) -> dict[str, float]:
    """`top1`, `top5` and `mean_per_class` (of top-1, over the classes that occur) in percent, of ranks [N].

    There is no `top5` for five `classes` or fewer: it would be 100 for any model.
    """
    hit = (ranks == 0).double()
    per_class = torch.stack([hit[truth == c].mean() for c in torch.unique(truth)])
    top5 = {"top5": 100 * (ranks < 5).double().mean().item()} if classes > 5 else {}
    return {"top1": 100 * hit.mean().item(), **top5, "mean_per_class": 100 * per_class.mean().item()}


def accuracy_scores(name: str, values: Mapping[str, float]) -> list[Score]:
    """`accuracies` as scores of the set `name`; top-1 is the headline."""
    return [Score(name, score, value, headline=score == "top1") for score, value in values.items()]


def chance(classes: int) -> str:
    """The number of classes and their chance level, for a caption."""
    return f"{counted(classes, 'class', 'classes')}, chance top1 {100 / classes:.3g}"


def confusion(truth: Tensor, chosen: Tensor, classes: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """How often a class (row) was taken for one (column): [C, C]."""
    return np.asarray(torch.bincount(truth * classes + chosen, minlength=classes**2).view(classes, classes).numpy())


def confusion_picture(
    matrix: np.ndarray[Any, np.dtype[np.int64]], classes: Sequence[str], name: str, subject: str
) -> Iterator[Media]:
    """The matrix of the set `name`, each row in percent of its class; of many classes the most confused pairs.

    More than `WHOLE` are many. `subject` names the task and the model in the title.
    """
    title = f"{subject} on {name}"
    present = [i for i in range(len(classes)) if matrix[i].any() or matrix[:, i].any()]
    share = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    if len(present) <= WHOLE:
        picture = _matrix(share[np.ix_(present, present)], [classes[i] for i in present], title)
    else:
        errors = share - np.diag(np.diag(share))
        order = np.argsort(-(matrix - np.diag(np.diag(matrix))) - errors / 1e3, axis=None, kind="stable")
        pairs = [divmod(int(i), len(classes)) for i in order[:PAIRS]]
        pairs = [(i, j) for i, j in pairs if i != j and matrix[i, j]]
        if not pairs:
            return
        picture = _pairs([(classes[i], classes[j], int(matrix[i, j]), float(share[i, j])) for i, j in pairs], title)
    yield Picture("confusion", picture, title, {"set": name})


class ClassificationTask(Task):
    """Base of tasks that choose a class for each item."""

    _classes: Sequence[str]
    """All classes; `run` sets it."""
    _predictions: dict[str, tuple[Tensor, Tensor]]
    """A set's name -> of each item its class [N] and the chosen one [N], numbered as in `_classes`; `run` sets it."""

    @classmethod
    def means(cls, config: Any) -> tuple[str, ...]:
        """Accuracies; `top5` of more than 5 classes."""
        return ACCURACIES

    def media(self, model: Model, sets: Sequence[EvaluationSet], samples: int) -> Iterator[Media]:
        """The confusion matrix of each set."""
        subject = f"{self.name} of the {model.side}"
        for name, (truth, predictions) in self._predictions.items():
            matrix = confusion(truth, predictions, len(self._classes))
            yield from confusion_picture(matrix, self._classes, name, subject)


def _matrix(share: np.ndarray[Any, Any], names: Sequence[str], title: str) -> Any:
    from matplotlib.figure import Figure

    side = max(3.6, 0.34 * len(names) + 2.0)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, vmin=0, vmax=100, cmap="Blues")
    short = [_short(name) for name in names]
    axes.set_xticks(range(len(names)), short, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), short, fontsize=8)
    for i, j in np.argwhere(share >= 0.5):
        axes.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", fontsize=7, color=_text_colour(share[i, j]))
    axes.set(xlabel="taken for", ylabel="class", title=f"{title}\npercent of each class")
    figure.colorbar(image, ax=axes, shrink=0.7, label="percent")
    return _to_image(figure)


def _pairs(rows: Sequence[tuple[str, str, int, float]], title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.27 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    bars = axes.barh(places, [count for _, _, count, _ in rows])
    axes.bar_label(bars, [f"{count} ({share:.0f} %)" for _, _, count, share in rows], padding=3, fontsize=8)
    axes.set_yticks(places, [f"{_short(own)} taken for {_short(other)}" for own, other, _, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel="items (percent of the class)", title=f"{title}\nthe most confused of the classes")
    axes.spines[["top", "right"]].set_visible(False)
    return _to_image(figure)


def _text_colour(value: float) -> str:
    return "white" if value > 60 else "black"


def _short(name: str) -> str:
    return name if len(name) <= 28 else name[:27] + "\u2026"


def _to_image(figure: Any) -> Any:
    """A figure as a PIL image."""
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return Image.open(file).convert("RGB")
