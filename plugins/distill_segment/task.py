"""Zero-shot semantic segmentation as an evaluation task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from distill_core import (
    BadSample,
    DataError,
    EvaluationSet,
    Model,
    Picture,
    Plan,
    Sample,
    Score,
    Skipped,
    Task,
    TaskConfig,
    gather_objects,
    mean_over_sets,
    raise_on_all_ranks,
)
from distill_segment.classes import Classes
from distill_segment.overlays import panel
from distill_segment.scores import confusion, scores_of
from distill_segment.segmenter import Segmenter
from distill_segment.truth import classes_of, truth_of
from distill_tasks.prompts import Templates
from distill_tasks.retrieval import two_modalities

SCORES = ("mIoU", "pixel_accuracy", "mean_accuracy")
Pixels = Annotated[int, Field(gt=0)]


class SegmentationConfig(TaskConfig):
    """How pixels are classified."""

    modalities: tuple[str, str] | None = None
    """That of the pictures, and that of the prompts; null takes the recipe's first and second."""
    attention: str = "plain"
    """What the last layer's tokens attend by, a matter of the model: `plain`; `value`, MaskCLIP's; `value_value`; or
    `correlative`, SCLIP's, which helps models trained with local views and can hurt others. A backbone says which ones
    it has."""
    templates: Templates = ("{}",)
    """Prompts with {} for a class's word; a word's embedding is the normalised mean of its prompts'. A list; `openai`
    or `openai_simple`; or a file, as `zero_shot` takes them."""
    classes: str | None = None
    """File of the classes, one a line in the order of the masks' values, words for one class separated by commas; null
    takes those that come with the samples."""
    window: Pixels | None = None
    """Side of the square windows; null takes the augmentation's `size`, which the model was trained on."""
    stride: Pixels | None = None
    """Pixels between windows; null takes half a window."""
    side: Pixels | None = None
    """What the picture's shorter side is resized to before windows are cut; null takes one and a half windows, as SCLIP
    does (336 for 224). Masks are scored at their own size."""
    scale: Annotated[float, Field(gt=0)] = 40.0
    """Factor of cosines before the softmax over words; affects only `threshold` and classes of several words."""
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Pixels whose best probability is lower are class 0, for sets whose class 0 is the background."""
    prompt_background: bool = True
    """Whether class 0 has prompts, like the others; if not, only `threshold` predicts it (GroupViT, TCL)."""

    @model_validator(mode="after")
    def _finds_the_background(self) -> SegmentationConfig:
        if not self.prompt_background and not self.threshold:
            raise ValueError("prompt_background: false needs a `threshold`, or class 0 is never predicted")
        return self


class Segmentation(Task):
    """Zero-shot semantic segmentation: mIoU in percent of sliding windows' dense embeddings against prompts.
    A pixel whose best class is tied or NaN belongs to no class.

    Samples hold a picture, `mask.png` (a class number a pixel, 255 where nothing is scored) and `classes.txt`.
    """

    name = "segmentation"
    Config = SegmentationConfig
    examples = ({}, {"attention": "correlative", "templates": ["a {}", "the {}"], "threshold": 0.1})

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.config: SegmentationConfig = config

    @classmethod
    def problems(cls, config: SegmentationConfig, plan: Plan) -> Iterator[str]:
        """The recipe lacks a modality, or its backbone the dense embeddings."""
        yield from two_modalities(cls.name, config.modalities, plan)
        for name in (config.modalities or tuple(plan.modalities))[:1]:
            dense = plan.modalities[name].spec.dense
            if not dense:
                yield f"{cls.name!r} needs dense embeddings of {name!r}; its backbone has no `dense`"
            elif config.attention not in dense:
                available = f"the backbone of {name!r} has {', '.join(dense)}"
                yield f"{cls.name!r}: no attention {config.attention!r}: {available}"

    @classmethod
    def means(cls, config: SegmentationConfig) -> tuple[str, ...]:
        """mIoU and the accuracies."""
        return SCORES

    def run(self, model: Model, sets: Sequence[EvaluationSet]) -> list[Score]:
        """`mIoU`, `pixel_accuracy` and `mean_accuracy`, with their means over sets; `IoU/CLASS`, `pictures`."""
        scores: list[Score] = []
        for samples in sets:
            segmenter = raise_on_all_ranks(partial(self._segmenter, model, samples))
            matrix, pictures = self._confusion(segmenter, samples)
            if not matrix.any():
                raise DataError(f"evaluation set {samples.name!r}: no sample with a picture and a mask of some class")
            for name, value in scores_of(matrix, segmenter.names).items():
                scores.append(Score(samples.name, name, value, headline=name == "mIoU"))
            scores.append(Score(samples.name, "pictures", float(pictures), "pictures", None))
        return [*scores, *mean_over_sets(scores, SCORES)]

    def note(self) -> str:
        """Unit, and what mIoU is."""
        return "percent; mIoU: mean over classes of intersection over union"

    def media(self, model: Model, sets: Sequence[EvaluationSet], samples: int) -> Iterator[Picture]:
        """Image, truth and prediction of the first samples, side by side."""
        for i, evaluation_set in enumerate(sets):
            segmenter = self._segmenter(model, evaluation_set)
            for sample in islice(evaluation_set, samples // len(sets) + (i < samples % len(sets))):
                try:
                    yield self.overlay(segmenter, sample, evaluation_set.name)
                except BadSample:  # `run` has reported it
                    continue

    def overlay(self, segmenter: Segmenter, sample: Sample, of: str) -> Picture:
        """The sheet of one sample of the set `of`; without a truth where it has no mask. Raises `BadSample`."""
        (picture,) = segmenter.augmentation.decode(sample)
        truth = self._truth(sample, picture, segmenter).numpy() if "mask.png" in sample else None
        predicted = segmenter(picture, picture.height, picture.width).numpy()
        key = str(sample["__key__"])
        return Picture("overlay", panel(picture, predicted, truth, segmenter.names), key, {"set": of, "sample": key})

    def classes(self, samples: EvaluationSet) -> Classes:
        """Those of the option, or of the set's samples. Raises `DataError`."""
        return classes_of(samples, self.config.classes)

    def _segmenter(self, model: Model, samples: EvaluationSet) -> Segmenter:
        return Segmenter(model, self.config, self.classes(samples))

    def _confusion(self, segmenter: Segmenter, samples: EvaluationSet) -> tuple[Tensor, int]:
        """The confusion matrix over all ranks, each of which segments its share; and the number of pictures."""
        parts = gather_objects(raise_on_all_ranks(lambda: self._share(segmenter, samples)))
        for part in parts:
            samples.skipped |= part[2]
        return torch.stack([part[0] for part in parts]).sum(0), sum(part[1] for part in parts)

    def _share(
        self, segmenter: Segmenter, samples: EvaluationSet
    ) -> tuple[Tensor, int, dict[tuple[str, str], Skipped]]:
        """This rank's confusion [C, C + 1], pictures and what was skipped."""
        matrix, pictures = torch.zeros(segmenter.count, segmenter.count + 1, dtype=torch.long), 0
        skipped: dict[tuple[str, str], Skipped] = {}
        for _, sample in samples.share(f"segments of {samples.name}"):
            try:
                (picture,) = segmenter.augmentation.decode(sample)
                truth = self._truth(sample, picture, segmenter)
                predicted = segmenter(picture, *truth.shape)
            except BadSample as error:
                key = str(sample["__key__"])
                skipped[key, segmenter.of] = Skipped(key, str(sample["__url__"]), f"{segmenter.of}: {error}")
                continue
            matrix += confusion(truth, predicted, segmenter.count)
            pictures += 1
        return matrix, pictures, skipped

    def _truth(self, sample: Sample, picture: Image.Image, segmenter: Segmenter) -> Tensor:
        return truth_of(sample, picture, segmenter.classes, self.config.classes)
