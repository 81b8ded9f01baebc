"""MobileCLIP's loss: CLIP's, mixed with the distillation of affinities between images and texts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from distill_core import DEFAULT_TEACHER, GLOBAL, Needs, Outputs, Plan, Rows, Scheduled
from distill_vl.contrastive import ContrastiveConfig, ContrastiveLoss

Width = Annotated[int, Field(gt=0)]
Temperature = Annotated[float, Field(gt=0)]


class ReinforcedConfig(ContrastiveConfig):
    """Options of MobileCLIP's loss; both parts share the learned scale."""

    exchange: Literal["gather"] = "gather"
    """How ranks see each other's rows: all at once."""
    mix: Scheduled[Annotated[float, Field(ge=0, le=1)]] = Scheduled(1.0)
    """The part of the distillation, lambda; 1 - lambda is CLIP's. In the paper's code 1.0, and 0.75 for its largest
    models on its largest data."""
    teacher: str = DEFAULT_TEACHER
    """The teacher whose affinities are distilled, an `ensemble` or another."""
    members: Annotated[tuple[Width, ...], Field(min_length=1)] | None = None
    """Widths of the members whose embeddings stand one after the other in the teacher's: each has affinities of its
    own, whose distributions are averaged. Null takes the teacher as one."""
    teacher_temperatures: Annotated[tuple[Temperature, ...], Field(min_length=1)] = (0.01,)
    """By which similarities of the members are divided: one for all, or one each. CLIP's learn 0.01."""


class Reinforced(ContrastiveLoss):
    """(1 - lambda) CLIP + lambda KL(teachers' affinities || the student's), summed over the captions (Vasu et al. 2024,
    equations 2 and 3).

    Affinities are softmaxes over the global batch, of an image over the texts and of a text over the images; the
    distillation is the mean of both directions and of the teacher's members, and has each member's own temperature. A
    batch of real captions and one of synthetic ones are the second modality's global views: each is a batch of pairs by
    itself. Of the first modality the first global view counts.
    """

    name = "reinforced"
    Config = ReinforcedConfig
    examples = ({}, {"mix": 0.75, "members": (20, 12), "teacher_temperatures": (0.1, 0.2)})

    def __init__(self, config: ReinforcedConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        a, b = config.modalities
        views_of = {m: plan.teacher_views(config.teacher, m) for m in (a, b)}
        self.views = {a: [plan.modalities[a].views(GLOBAL)[0]], b: list(plan.modalities[b].views(GLOBAL))}
        self.teacher_views = {m: [views_of[m].index(view) for view in views] for m, views in self.views.items()}

    @classmethod
    def needs(cls, config: ReinforcedConfig, plan: Plan) -> Needs:
        """The student's and the teacher's embeddings of both modalities, a global view of each."""
        both = config.modalities
        return Needs(
            student=both, teacher={config.teacher: dict.fromkeys(both, ())}, views={m: {GLOBAL: 1} for m in both}
        )

    @classmethod
    def problems(cls, config: ReinforcedConfig, plan: Plan) -> Iterable[str]:
        """A width of the student's two towers; a teacher of the widths of its members, which sees what is compared."""
        yield from super().problems(config, plan)
        count = len(config.members or (0,))
        if len(config.teacher_temperatures) not in (1, count):
            yield f"{cls.name!r}: teacher_temperatures: give one, or one for each of {count} members"
        teacher = plan.teachers.get(config.teacher)
        if teacher is None:
            return
        dims = {m: plan.teacher_spec(config.teacher, m).dim for m in config.modalities if m in teacher.views}
        for modality, dim in dims.items():
            unseen = set(plan.modalities[modality].views(GLOBAL)) - set(teacher.views[modality])
            if unseen:
                yield f"{cls.name!r}: the teacher {config.teacher!r} does not see all global views of {modality!r}"
            if config.members is not None and sum(config.members) != dim:
                yield (
                    f"{cls.name!r}: members of widths {', '.join(map(str, config.members))} make "
                    f"{sum(config.members)}; the teacher {config.teacher!r} has {dim} for {modality!r}"
                )
        if config.members is None and len(set(dims.values())) > 1:
            listed = ", ".join(f"{modality} {dim}" for modality, dim in dims.items())
            yield f"{cls.name!r} compares the teacher's embeddings of one width; it gives {listed}"

    def gathers(self, outputs: Outputs) -> Iterable[Rows]:
        """Both sides, the student's and the teacher's."""
        return [*self._rows(outputs), *self._teachers_rows(outputs)]

    def _rows(self, outputs: Outputs) -> list[Rows]:
        return [outputs.student[m].rows[self.views[m]] for m in self.config.modalities]

    def _teachers_rows(self, outputs: Outputs) -> list[Rows]:
        teacher = outputs.teacher[self.config.teacher]
        return [teacher[m].rows[self.teacher_views[m]] for m in self.config.modalities]

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Both parts, each times its part of the mix; as metrics each by itself, and the teachers' mean entropy."""
        a, b = self._rows(outputs)
        contrastive = self.pairs(a, b).sum()
        cross_entropy, entropy = self.distillation(a, b, *self._teachers_rows(outputs))
        divergence = cross_entropy - entropy
        mix = self.config.mix.value(outputs.progress)
        metrics = {"contrastive_whole": contrastive, "distillation_whole": divergence, "teacher_entropy": entropy}
        return (
            {"contrastive": (1 - mix) * contrastive, "distillation": mix * divergence},
            {name: value.detach() for name, value in metrics.items()} | self.metrics(),
        )

    def distillation(self, a: Rows, b: Rows, teacher_a: Rows, teacher_b: Rows) -> tuple[Tensor, Tensor]:
        """(cross-entropy with the teachers' affinities, these affinities' entropy), 0-dim, summed over captions.

        Rows of a [1, B, D], of b [V, B, D].
        """
        with torch.autocast(a.embedding.device.type, enabled=False):
            scale = self.logit_scale.exp()
            cross_entropy, entropy = a.embedding.new_zeros(()), a.embedding.new_zeros(())
            for view in range(len(b)):
                for x, y, teacher_x, teacher_y, of_x, of_y in (
                    (a, b, teacher_a, teacher_b, 0, view),
                    (b, a, teacher_b, teacher_a, view, 0),
                ):
                    with torch.no_grad():
                        targets, own = self.affinities(teacher_x.embedding[of_x], teacher_y.gathered[of_y])
                    log_probabilities = (scale * x.embedding[of_x] @ y.gathered[of_y].mT).log_softmax(-1)
                    cross_entropy = cross_entropy - (targets * log_probabilities).sum(-1).mean() / 2
                    entropy = entropy + own / 2
            return cross_entropy, entropy

    def affinities(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Of the teacher's rows x [B, D] over y [M, D]: the mean of the members' distributions [B, M], and the mean of
        their entropies."""
        widths = list(self.config.members or (x.shape[-1],))
        temperatures = self.config.teacher_temperatures * (
            len(widths) if len(self.config.teacher_temperatures) == 1 else 1
        )
        members = [
            (normalize(own, dim=-1) @ normalize(other, dim=-1).mT / temperature).softmax(-1)
            for own, other, temperature in zip(*(torch.split(z, widths, -1) for z in (x, y)), temperatures, strict=True)
        ]
        entropies = [torch.special.entr(member).sum(-1).mean() for member in members]
        return torch.stack(members).mean(0), torch.stack(entropies).mean()
