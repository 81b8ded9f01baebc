"""How much of a picture's classes its patches tell: a linear probe of frozen patches, for towers without words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate, one_hot

from distill_core import (
    BadSample,
    DataError,
    EvaluationSet,
    Model,
    Needs,
    Plan,
    Score,
    Skipped,
    Task,
    TaskConfig,
    UserError,
    View,
    counted,
    gather_objects,
    mean_over_sets,
    raise_on_all_ranks,
)
from distill_segment.classes import IGNORE, Classes, names_of
from distill_segment.scores import confusion, scores_of
from distill_segment.task import SCORES
from distill_segment.truth import classes_of, truth_of
from distill_tasks.logistic import fit, logits
from distill_vl.pictures import PictureAugmentation

Pixels = Annotated[int, Field(gt=0)]


class PatchProbeConfig(TaskConfig):
    """What is probed, and how."""

    modality: str | None = None
    """That of the pictures; null takes the recipe's first."""
    classes: str | None = None
    """As in `segmentation`: a file of the classes; null takes those that come with the samples."""
    side: Pixels | None = None
    """Pictures are resized to squares of this side, a multiple of the tower's patch; null takes the augmentation's
    `size`."""
    folds: Annotated[int, Field(gt=1)] = 5
    """Parts of a set's pictures: each is predicted by a probe that learned from the others."""
    c: Annotated[float, Field(gt=0)] = 1.0
    """Inverse strength of the probe's L2 penalty, as scikit-learn's `LogisticRegression`."""


@dataclass(frozen=True)
class Probed:
    """A picture: its patches [rows, columns, W], the class of each [rows, columns] (`IGNORE` where none is scored), and
    the class of each pixel [H, W]."""

    patches: Tensor
    labels: Tensor
    mask: Tensor


class PatchProbe(Task):
    """Multinomial logistic regression from the student's last tokens, standardised, to the commonest class within each
    patch; its logits are enlarged bilinearly to the mask, and scored as `segmentation` is (DINOv3, section 6.1.2, has
    such a linear probe).

    It needs no text and no second split. Samples are those of `segmentation`.
    """

    name = "patch_probe"
    Config = PatchProbeConfig
    examples = ({"folds": 2},)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.config: PatchProbeConfig = config

    @classmethod
    def needs(cls, config: PatchProbeConfig, plan: Plan) -> Needs:
        """The student of the pictures."""
        modality = config.modality or next(iter(plan.modalities), None)
        return Needs(student=(modality,) if modality is not None else ())

    @classmethod
    def problems(cls, config: PatchProbeConfig, plan: Plan) -> Iterator[str]:
        """A tower without tokens."""
        modality = config.modality or next(iter(plan.modalities), None)
        if modality is not None and not plan.modalities[modality].spec.has_tokens:
            yield f"{cls.name!r} needs tokens of {modality!r}; its backbone gives none"

    @classmethod
    def means(cls, config: PatchProbeConfig) -> tuple[str, ...]:
        """mIoU and the accuracies."""
        return SCORES

    def run(self, model: Model, sets: Sequence[EvaluationSet]) -> list[Score]:
        """`mIoU`, `pixel_accuracy` and `mean_accuracy`, with their means over sets; `IoU/CLASS`, `pictures`."""
        scores: list[Score] = []
        for samples in sets:
            classes = raise_on_all_ranks(partial(classes_of, samples, self.config.classes))
            pictures = self._pictures(model, samples, classes)
            if len(pictures) < self.config.folds:
                raise DataError(
                    f"evaluation set {samples.name!r}: {counted(len(pictures), 'picture')} with a mask, and "
                    f"{self.config.folds} folds"
                )
            names = names_of(classes)
            matrix = self._confusion(pictures, len(names), samples, model.device)
            for name, value in scores_of(matrix, names).items():
                scores.append(Score(samples.name, name, value, headline=name == "mIoU"))
            scores.append(Score(samples.name, "pictures", float(len(pictures)), "pictures", None))
        return [*scores, *mean_over_sets(scores, SCORES)]

    def note(self) -> str:
        """Unit, and what mIoU is."""
        folds = counted(self.config.folds, "fold")
        return f"percent; mIoU: mean over classes of intersection over union; a linear probe of patches by {folds}"

    def _confusion(self, pictures: Sequence[Probed], classes: int, samples: EvaluationSet, device: Any) -> Tensor:
        """[C, C + 1] over all pictures, each predicted by the probe that has not seen it."""
        matrix = torch.zeros(classes, classes + 1, dtype=torch.long)
        for fold in samples.watch(range(self.config.folds), f"fits for {samples.name}"):
            learned = [p for i, p in enumerate(pictures) if i % self.config.folds != fold]
            x = torch.cat([p.patches.flatten(0, 1) for p in learned]).to(device)
            y = torch.cat([p.labels.flatten() for p in learned]).to(device)
            x, y = x[y != IGNORE], y[y != IGNORE]
            mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
            weights = fit((x - mean) / std, y, self.config.c)
            for p in pictures[fold :: self.config.folds]:
                class_logits = logits((p.patches.to(device) - mean) / std, weights).permute(2, 0, 1)
                enlarged = interpolate(class_logits[None], size=tuple(p.mask.shape), mode="bilinear")[0]
                matrix += confusion(p.mask, enlarged.argmax(0).cpu(), classes)
        return matrix

    def _pictures(self, model: Model, samples: EvaluationSet, classes: Classes) -> list[Probed]:
        """Of all ranks, each of which encodes its share, in the set's order."""
        parts = gather_objects(raise_on_all_ranks(lambda: self._share(model, samples, classes)))
        for _, skipped in parts:
            samples.skipped |= skipped
        return [picture for _, picture in sorted((item for own, _ in parts for item in own), key=lambda item: item[0])]

    def _share(
        self, model: Model, samples: EvaluationSet, classes: Classes
    ) -> tuple[list[tuple[int, Probed]], dict[tuple[str, str], Skipped]]:
        """(number, picture) of this rank's samples, and what was skipped."""
        modality = self.config.modality or model.modalities[0]
        augmentation = model.augment[modality]
        if not isinstance(augmentation, PictureAugmentation):
            raise UserError(f"{self.name}: {modality!r} is no modality of pictures")
        side = self.config.side or augmentation.config.size
        waiting: list[tuple[int, Tensor, View]] = []
        probed: list[tuple[int, Probed]] = []
        skipped: dict[tuple[str, str], Skipped] = {}
        for number, sample in samples.share(f"patches of {samples.name}"):
            try:
                (picture,) = augmentation.decode(sample)
                mask = truth_of(sample, picture, classes, self.config.classes)
            except BadSample as error:
                key = str(sample["__key__"])
                skipped[key, modality] = Skipped(key, str(sample["__url__"]), f"{modality}: {error}")
                continue
            square = picture.resize((side, side), Image.Resampling.BICUBIC)
            waiting.append((number, mask, View(augmentation.normalise(square))))
            if len(waiting) == model.batch_size:
                probed += self._probed(model, modality, waiting)
                waiting = []
        return probed + self._probed(model, modality, waiting), skipped

    def _probed(
        self, model: Model, modality: str, waiting: Sequence[tuple[int, Tensor, View]]
    ) -> list[tuple[int, Probed]]:
        if not waiting:
            return []
        try:
            tokens = model.features(modality, [[view] for *_, view in waiting], tokens_of=(0,)).tokens[0]  # [B, L, W]
        except ValueError as error:
            raise UserError(f"{self.name}: {error}; set `side`") from error
        side = math.isqrt(tokens.shape[1])
        if side * side != tokens.shape[1]:
            raise UserError(f"{self.name}: the {tokens.shape[1]} tokens of {modality!r} are no square grid")
        grids = tokens.float().cpu().view(len(tokens), side, side, -1)
        return [
            (number, Probed(grid, patch_labels(mask, side), mask))
            for (number, mask, _), grid in zip(waiting, grids, strict=True)
        ]


def patch_labels(mask: Tensor, side: int) -> Tensor:
    """The commonest class, the lowest of equals, among the scored pixels of each cell of a grid [side, side] over a
    mask [H, W]; `IGNORE` where none is scored."""
    scored = mask != IGNORE
    counts = one_hot(mask.masked_fill(~scored, 0)) * scored[..., None]  # [H, W, C]
    shares = adaptive_avg_pool2d(counts.permute(2, 0, 1).float(), side)
    return shares.argmax(0).masked_fill(shares.sum(0) == 0, IGNORE)
