"""Gram anchoring: patches stay as alike as an earlier model found them (DINOv3, arXiv 2508.10104, section 4)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from distill_core import DEFAULT_TEACHER, GLOBAL, Loss, LossConfig, Needs, Outputs, Plan, Scheduled, UserError, wide
from distill_dino.pairs import pair_needs, view_pairs


class GramConfig(LossConfig):
    """The weight is DINOv3's. A late `stage` of the recipe begins it, once patches begin to get worse."""

    weight: Scheduled[Annotated[float, Field(ge=0)]] = Scheduled(2.0)
    """Factor of the term in the total."""
    modality: str = "image"
    """The modality whose patches are compared."""
    teacher: str = DEFAULT_TEACHER
    """The teacher that it reads: a `snapshot` of the average (the paper's Gram teacher)."""
    role: str = GLOBAL
    """The student's views; those whose patches are hidden from it, too."""
    target_role: str | None = None
    """The teacher's views, the same crops in the same order; null: the same views."""


class Gram(Loss):
    """Mean of (S S' - T T')^2 over the pairs of a view's patches, S and T the L2-normalised patches of student and
    teacher (DINOv3, equation 2, as a mean).

    A teacher that sees the crops at a higher resolution (its option `augment`) has more patches: they are resized to
    the student's grid, bicubically, before they are normalised (section 4.3).
    """

    name = "gram"
    Config = GramConfig
    partial = True

    def __init__(self, config: GramConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        seen = plan.teacher_views(config.teacher, config.modality)
        self.pairs = [(s, seen.index(t)) for s, t in view_pairs(config, plan) if t in seen]

    @classmethod
    def needs(cls, config: GramConfig, plan: Plan) -> Needs:
        """Patches of student and teacher."""
        return pair_needs(config, plan)

    @classmethod
    def problems(cls, config: GramConfig, plan: Plan) -> Iterable[str]:
        """Square views: only their grid is known from the number of patches."""
        modality = plan.modalities[config.modality]
        shapes = {modality.shapes[view] for view in modality.views(config.role)} if modality.shapes is not None else ()
        for shape in shapes:
            if len(shape) > 1 and shape[-2] != shape[-1]:
                yield f"{cls.name!r} needs square views of {config.modality!r}; there are {shape[-2]} x {shape[-1]}"

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One term."""
        m = self.config.modality
        student, teacher = outputs.student[m], outputs.teacher[self.config.teacher][m]
        terms = []
        for s, t in self.pairs:
            own, target = wide(student.tokens[s]), wide(teacher.tokens[t])
            masks = [x for x in (student.masks.get(s), teacher.masks.get(t)) if x is not None]
            with torch.autocast(own.device.type, enabled=False):
                if own.shape[1] != target.shape[1]:
                    target = resized(target, own.shape[1])
                terms.append(gram_loss(own, target, masks))
        term = torch.stack(terms).mean()
        return {self.name: term}, {}


def gram_loss(student: Tensor, teacher: Tensor, masks: Iterable[Tensor] = ()) -> Tensor:
    """Tokens [B, L, W] of both -> the mean squared difference of their cosines, of pairs that are in all `masks`."""
    s, t = (normalize(x, dim=-1) for x in (student, teacher))
    differences = (s @ s.mT - t @ t.mT).square()  # [B, L, L]
    real = None
    for mask in masks:
        real = mask if real is None else real & mask
    if real is None:
        return differences.mean()
    pairs = real[:, :, None] & real[:, None, :]
    sums = differences.masked_fill(~pairs, 0).sum((1, 2))
    return (sums / pairs.sum((1, 2)).clamp(min=1)).mean()


def resized(x: Tensor, count: int) -> Tensor:
    """Patches [B, L, W] of a square view on the square grid of `count`. Raises `UserError` where one is no square."""
    sides = [math.isqrt(number) for number in (x.shape[1], count)]
    if [side * side for side in sides] != [x.shape[1], count]:
        raise UserError(
            f"'gram': the teacher's {x.shape[1]} patches and the student's {count} are not both a square grid"
        )
    grid = x.mT.reshape(x.shape[0], x.shape[2], sides[0], sides[0])
    small = interpolate(grid, size=(sides[1], sides[1]), mode="bicubic", align_corners=False)
    return small.flatten(-2).mT
