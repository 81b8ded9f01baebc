"""Whether embeddings still tell samples apart: indicators of a step's outputs, and a rule that calls a collapse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from distill_core.outputs import Features, Outputs, wide

PREFIX = "embeddings/"
"""Of the indicators' names among a step's metrics: `embeddings/student/image/spread`."""
SPREAD, RANK = 0.02, 1.2
ROWS = 10
"""A modality of the student has collapsed where its spread is below `SPREAD`, or its effective rank below `RANK`, in
this many logged rows in a row."""
ENOUGH = 16
"""Of fewer samples an effective rank says nothing: it is below their number."""


@torch.no_grad()
def collapse_indicators(outputs: Outputs, untrained: Collection[str] = ()) -> dict[str, Tensor]:
    """Indicators (`indicators`) of the first view of each modality, of student and teacher, of this rank's samples.

    Of a modality whose embedding no loss trains (`untrained`), those of its class tokens, where there are some. 0-dim
    tensors, by name; none where there are fewer than two samples, nor where some rank has fewer of a modality that
    samples may lack. The host does not wait for them.
    """
    sides = {"student": outputs.student}
    for name, of_teacher in outputs.teacher.items():
        sides["teacher" if len(outputs.teacher) == 1 else f"teacher.{name}"] = of_teacher
    values: dict[str, Tensor] = {}
    for side, by_modality in sides.items():
        for modality, features in by_modality.items():
            x = _embeddings(features, modality in untrained)
            fewest = len(x) if features.present is None else min(features.present.counts)
            if fewest > 1:
                values |= {f"{PREFIX}{side}/{modality}/{name}": value for name, value in indicators(x).items()}
    return values


def _embeddings(features: Features, is_untrained: bool) -> Tensor:
    """[B, D] of the first view."""
    if is_untrained and features.class_tokens is not None:
        return features.class_tokens[0].flatten(1)
    return features.pooled[0]


def indicators(x: Tensor) -> dict[str, Tensor]:
    """What shows a collapse of embeddings [B, D], B > 1, each 0-dim; they are L2-normalised first.

    spread      mean over the features of their standard deviation, times sqrt(D): 0 where all samples have one
                embedding, 1 where they are spread evenly over all directions
    rank        (sum l)^2 / (sum l^2) of the variances l along the principal axes: how many directions samples differ
                in; at most B - 1
    similarity  mean cosine of different samples: 1 where all have one embedding
    """
    count, width = x.shape
    with torch.autocast(x.device.type, enabled=False):
        x = normalize(wide(x), dim=-1)
        centred = x - x.mean(0)
        spread = centred.square().mean(0).sqrt().mean() * width**0.5
        products = centred @ centred.T if count < width else centred.T @ centred  # the same non-zero spectrum
        variances, squares = products.diagonal().sum(), products.square().sum()
        rank = variances.square() / squares.clamp(min=torch.finfo(x.dtype).tiny)
        similarity = (x.sum(0).square().sum() - count) / (count * (count - 1))
    return {"spread": spread, "rank": rank, "similarity": similarity}


class CollapseRule:
    """Applied to the logged rows of a run in order; it warns once."""

    def __init__(self, samples: int) -> None:
        """`samples`: of a rank's batch, from which the rows' indicators are."""
        self._rank = RANK if samples >= ENOUGH else 0.0
        self._rows: Counter[str] = Counter()  # in a row, by modality of the student
        self._warned = False

    def check(self, metrics: Mapping[str, float]) -> str | None:
        """What has collapsed, in one line, when that first becomes clear. `metrics`: of a row."""
        collapsed = dict(_collapsed(metrics, self._rank))
        self._rows = Counter({name: self._rows[name] + 1 for name in collapsed})
        lasting = [f"{name} ({why})" for name, why in collapsed.items() if self._rows[name] >= ROWS]
        if self._warned or not lasting:
            return None
        self._warned = True
        return (
            f"the embeddings have collapsed: {', '.join(lasting)} for {ROWS} rows of metrics.jsonl. The model hardly "
            "tells samples apart; a lower learning rate, more warm-up or another loss may keep it from that"
        )


def _collapsed(metrics: Mapping[str, float], least_rank: float) -> Iterator[tuple[str, str]]:
    """(side/modality, its indicators in words) of the student's modalities that are beyond a bound in this row."""
    for name, spread in metrics.items():
        if name.startswith(f"{PREFIX}student/") and name.endswith("/spread"):
            of = name.removesuffix("/spread")
            rank = metrics[f"{of}/rank"]
            if spread < SPREAD or rank < least_rank:
                yield of.removeprefix(PREFIX), f"spread {spread:.3g}, effective rank {rank:.3g}"
