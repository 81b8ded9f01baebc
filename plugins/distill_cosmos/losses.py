"""COSMOS's two losses (section 3.4), each over stacked views: no loop over view pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from distill_core import (
    DEFAULT_TEACHER,
    ComponentConfig,
    Needs,
    Outputs,
    Plan,
    Rows,
    Scheduled,
    did_you_mean,
    same_dim,
)
from distill_cosmos.soft_targets import soft_minus_hard, soft_targets
from distill_vl.contrastive import ContrastiveConfig, ContrastiveLoss, ring_problems


class DistillationConfig(ContrastiveConfig):
    """Options of the distillation between modalities."""

    teacher: str = DEFAULT_TEACHER
    """The teacher that it reads."""
    pairs: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """The blocks STUDENT_to_TEACHER that enter, as [image_to_image, text_to_image]; null is all four."""
    targets: Literal["hard", "soft"] = "hard"
    """`hard`: InfoNCE, the one positive is the same sample. `soft`: cross-entropy with the teacher's own similarities
    (SEED; ALBEF, equation 6). For a mixture give the loss twice, with an `id` and a `weight` each."""
    teacher_temperature: Scheduled[Annotated[float, Field(gt=0)]] = Scheduled(0.04)
    """Of the teacher's similarities, where targets are soft (also a schedule); the student's temperature is learned."""


class CrossModalDistillation(ContrastiveLoss):
    """COSMOS's self-distillation: the student's fused views against the teacher's views of both modalities.

    Mean over {fused views of each modality} x {teacher's views of each} of the mean InfoNCE of all view pairs.
    `pairs` chooses among these four blocks; what no chosen block reads is neither gathered nor asked for. With soft
    targets (`distill_cosmos.soft_targets`) the metric `target_entropy` is what the loss cannot fall below.
    """

    name = "cross_modal_distillation"
    Config: ClassVar[type[ComponentConfig]] = DistillationConfig

    def __init__(self, config: DistillationConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.products = _products(_chosen(config))

    @classmethod
    def needs(cls, config: DistillationConfig, plan: Plan) -> Needs:
        """Fused views of each student, and a teacher of each teacher, among the chosen blocks.

        Soft targets ask for a teacher of the student's modality as well.
        """
        chosen = _chosen(config)
        soft = config.targets == "soft"
        teachers = tuple(dict.fromkeys(m for student, teacher in chosen for m in (teacher, *[student] * soft)))
        return Needs(
            teacher={config.teacher: dict.fromkeys(teachers, ())},
            fused=tuple(dict.fromkeys(student for student, _ in chosen)),
        )

    @classmethod
    def problems(cls, config: DistillationConfig, plan: Plan) -> Iterable[str]:
        """Blocks that exist, each named once; one width D in all of them."""
        known = list(_blocks(config))
        named = config.pairs or ()
        for name in dict.fromkeys(named):
            if name not in known:
                yield f"{cls.name!r} has no pair {name!r}{did_you_mean(name, known)}"
            elif named.count(name) > 1:
                yield f"{cls.name!r} has the pair {name!r} twice"
        if config.targets == "soft" and config.exchange == "ring":
            yield f"{cls.name!r} reads the teacher's rows of all ranks for soft targets: take exchange: gather"
        yield from ring_problems(cls.name, config, plan)
        modalities = list(dict.fromkeys(m for block in _chosen(config) for m in block))
        yield from same_dim(cls.name, modalities, plan, config.teacher)

    def sides(self, outputs: Outputs) -> Sequence[tuple[Rows, Rows]]:
        """The fused views of some modalities, and the teacher's of some, for each of `products`."""
        fused, seen = outputs.fused, outputs.teacher[self.config.teacher]
        return [
            (Rows.cat([fused[m].rows for m in students]), Rows.cat([seen[m].rows for m in teachers]))
            for students, teachers in self.products
        ]

    def gathers(self, outputs: Outputs) -> Iterable[Rows]:
        """Both sides; for soft targets also what the teacher sees of the students' modalities."""
        yield from super().gathers(outputs)
        if self.config.targets == "soft":
            for students, _ in self.products:
                yield from (outputs.teacher[self.config.teacher][m].rows for m in students)

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One term: the mean of the chosen blocks of pairs, each a mean itself; a metric for each block."""
        blocks: dict[str, Tensor] = {}
        entropies: list[Tensor] = []
        for (students, teachers), sides in zip(self.products, self.sides(outputs), strict=True):
            pairs = self.pairs(*sides)
            heights = [len(outputs.fused[m].rows) for m in students]
            widths = [len(outputs.teacher[self.config.teacher][m].rows) for m in teachers]
            for student, row in zip(students, torch.split(pairs, heights), strict=True):
                for teacher, block in zip(teachers, torch.split(row, widths, dim=1), strict=True):
                    if self.config.targets == "soft":
                        difference, entropy = self.soften(outputs, student, teacher)
                        block = block + difference
                        entropies.append(entropy)
                    blocks[f"{student}_to_{teacher}"] = block.mean()
        term = torch.stack(list(blocks.values())).mean()
        metrics = self.metrics() | {name: x.detach() for name, x in blocks.items()}
        if entropies:
            metrics["target_entropy"] = torch.stack(entropies).mean()
        return {"cross_modal_distillation": term}, metrics

    def soften(self, outputs: Outputs, student: str, teacher: str) -> tuple[Tensor, Tensor]:
        """What soft targets add to the block's InfoNCEs, [Vs, Vt], and the targets' mean entropy."""
        seen = outputs.teacher[self.config.teacher]
        temperature = self.config.teacher_temperature.value(outputs.progress)
        queries, keys = seen[student], seen[teacher]
        targets = soft_targets(queries.embedding, keys.embedding, queries.gathered, keys.gathered, temperature)
        fused, scale = outputs.fused[student], self.logit_scale.exp()
        return soft_minus_hard(fused.embedding, fused.gathered, keys.embedding, targets, scale), targets.entropy


def _blocks(config: DistillationConfig) -> dict[str, tuple[str, str]]:
    """Every block's name -> (student's modality, teacher's modality)."""
    return {f"{s}_to_{t}": (s, t) for s in config.modalities for t in config.modalities}


def _chosen(config: DistillationConfig) -> list[tuple[str, str]]:
    """The chosen blocks in the order of all; names that are not blocks are left to `problems`."""
    return [block for name, block in _blocks(config).items() if config.pairs is None or name in config.pairs]


def _products(chosen: Sequence[tuple[str, str]]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """The chosen blocks as few products students x teachers, each of which is one call of the loss."""
    teachers: dict[str, tuple[str, ...]] = {}
    for student, teacher in chosen:
        teachers[student] = (*teachers.get(student, ()), teacher)
    return [
        (tuple(student for student, own in teachers.items() if own == shared), shared)
        for shared in dict.fromkeys(teachers.values())
    ]
