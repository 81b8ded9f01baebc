"""COSMOS's two losses with SigLIP's sigmoid (arXiv 2303.15343, section 3.2) in InfoNCE's place."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from distill_core import DEFAULT_TEACHER, ComponentConfig
from distill_cosmos.losses import CrossModalDistillation
from distill_vl.contrastive import Contrastive, Sigmoid, SigmoidConfig


class SigmoidContrastive(Sigmoid, Contrastive):
    """`contrastive` with the sigmoid loss: the first modality's global views x all views of the second."""

    name = "sigmoid_contrastive"


class SigmoidDistillationConfig(SigmoidConfig):
    """Options of the distillation; its targets are always hard, since soft ones are a softmax's."""

    teacher: str = DEFAULT_TEACHER
    """The teacher that it reads."""
    pairs: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """The blocks STUDENT_to_TEACHER that enter, as [image_to_image, text_to_image]; null is all four."""
    targets: ClassVar[str] = "hard"


class SigmoidDistillation(Sigmoid, CrossModalDistillation):
    """`cross_modal_distillation` with the sigmoid loss: {fused views of each modality} x {teacher's views of each}."""

    name = "sigmoid_distillation"
    Config: ClassVar[type[ComponentConfig]] = SigmoidDistillationConfig
