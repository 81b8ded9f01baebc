"""What DINO's and iBOT's losses share: a head of prototypes with an EMA copy, and class tokens across views."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import log_softmax

from distill_core import DEFAULT_TEACHER, Loss, LossConfig, Outputs, Plan, Progress, Ramp, Scheduled
from distill_dino.targets import Targets, entropy
from distill_vl.heads import DINOHead

Positive = Annotated[int, Field(gt=0)]
Temperature = Scheduled[Annotated[float, Field(gt=0)]]
Share = Annotated[float, Field(ge=0, le=1)]


class PrototypeConfig(LossConfig):
    """Head and temperatures as DINO's for ViT-B/16. A short run wants a constant teacher temperature of .04."""

    modality: str = "image"
    """The modality that learns from its own teacher."""
    teacher: str = DEFAULT_TEACHER
    """The teacher that it reads."""
    prototypes: Positive = 65536
    """Outputs K of the head."""
    hidden: Positive = 2048
    """Hidden width of the head's MLP."""
    bottleneck: Positive = 256
    """Width of the L2-normalised bottleneck."""
    layers: Positive = 3
    """Linear layers of the MLP, the bottleneck's included."""
    norm_last_layer: bool = True
    """Prototypes of length 1; false learns their lengths."""
    student_temperature: Temperature = Scheduled(0.1)
    """Divides the student's logits; also a schedule."""
    teacher_temperature: Temperature = Scheduled.by(Ramp, start=0.04, end=0.07, until=0.3)
    """Divides the teacher's logits; a number or a schedule."""
    centring: Literal["ema", "sinkhorn_knopp"] = "ema"
    """Against collapse: subtract a moving mean from the teacher's logits, or share the batch among prototypes."""
    center_momentum: Share = 0.9
    """Of the moving mean."""
    freeze_last_layer: Share = 0.01
    """Part of the run, from its start, in which the prototypes stay as they are (DINO: one epoch of a hundred)."""


class PrototypeLoss(Loss):
    """Base: a head of K prototypes with an EMA copy, and the teacher's targets."""

    Config = PrototypeConfig
    partial = True
    teacher_modules = ("head",)
    examples = (
        {"prototypes": 32, "hidden": 32, "bottleneck": 16},
        {"prototypes": 32, "hidden": 32, "bottleneck": 16, "centring": "sinkhorn_knopp", "norm_last_layer": False},
    )

    def __init__(self, config: Any, plan: Plan) -> None:
        super().__init__(config, plan)
        self.head = DINOHead(
            plan.modalities[config.modality].spec.width,
            config.prototypes,
            hidden=config.hidden,
            bottleneck=config.bottleneck,
            layers=config.layers,
            norm_last_layer=config.norm_last_layer,
        )
        self.teacher_views = plan.teacher_views(config.teacher, config.modality)

    def temperature(self, progress: Progress) -> float:
        """The teacher's temperature at this step."""
        return float(self.config.teacher_temperature.value(progress))

    def student_logits(self, x: Tensor, progress: Progress) -> Tensor:
        """[..., W] -> log-probabilities [..., K]."""
        frozen = progress.fraction < self.config.freeze_last_layer
        logits: Tensor = self.head(x, freeze_last_layer=frozen)
        return log_softmax(logits / self.config.student_temperature.value(progress), dim=-1)

    @torch.no_grad()
    def teacher_logits(self, x: Tensor, outputs: Outputs) -> Tensor:
        """[..., W] -> [..., K] by the teacher's copy of the head."""
        logits: Tensor = outputs.ema(self.head, self.config.teacher)(x)
        return logits

    def class_term(
        self, outputs: Outputs, targets: Targets, students: Sequence[int], token: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """DINO's loss of one of the class tokens, and what shows a collapse."""
        m = self.config.modality
        student, teacher = outputs.student[m].class_tokens, outputs.teacher[self.config.teacher][m].class_tokens
        assert student is not None
        assert teacher is not None
        student_logits = self.student_logits(student[list(students), :, token], outputs.progress)
        logits = self.teacher_logits(teacher[:, :, token], outputs)
        with torch.autocast(logits.device.type, enabled=False):
            temperature = self.temperature(outputs.progress)
            p = targets(logits.flatten(0, 1), temperature, filler=outputs.filler).view_as(logits)
            return across_views(student_logits, p, students, self.teacher_views), spread(p)


def across_views(
    student: Tensor, teacher: Tensor, student_views: Sequence[int], teacher_views: Sequence[int]
) -> Tensor:
    """Mean cross-entropy over all pairs of a teacher's and another student's view (DINO, equation 3).

    student [S, B, K] log-probabilities, teacher [T, B, K] probabilities, and the views' numbers: a pair of the same
    view does not count.
    """
    pairs = -torch.einsum("tbk,sbk->ts", teacher, student) / student.shape[1]
    other = torch.ones_like(pairs)
    same = [(i, j) for i, t in enumerate(teacher_views) for j, s in enumerate(student_views) if s == t]
    for i, j in same:  # filled where they are: a mask from the host would make it wait for the device
        other[i, j] = 0.0
    return (pairs * other).sum() / (pairs.numel() - len(same))


def spread(targets: Tensor, name: str = "", real: Tensor | None = None) -> dict[str, Tensor]:
    """Metrics of targets [..., K], in nats, that show a collapse; of rows [N, K] those where `real` [N] is True.

    `teacher_entropy` is the mean entropy of a target: at ln K the teacher says nothing. `mean_target_entropy` is that
    of this rank's mean target: near 0 one prototype has taken everything.
    """
    flat = targets.flatten(0, -2)
    return {
        f"{name}teacher_entropy": mean_of(entropy(flat), real),
        f"{name}mean_target_entropy": entropy(mean_of(flat, real)),
    }


def mean_of(x: Tensor, real: Tensor | None = None) -> Tensor:
    """The mean over the rows of x [N, ...], or over those where `real` [N] is True; 0 where there is none."""
    if real is None:
        return x.mean(0)
    apart = ~real.reshape(-1, *(1,) * (x.dim() - 1))
    return x.masked_fill(apart, 0).sum(0) / real.sum().clamp(min=1)


def views_of(modality: str, roles: Sequence[str], plan: Plan) -> tuple[int, ...]:
    """The numbers of the views of several roles."""
    return tuple(i for i, role in enumerate(plan.modalities[modality].roles) if role in roles)


def class_problems(
    name: str, modality: str, token: int, roles: Sequence[str], plan: Plan, teacher: str = DEFAULT_TEACHER
) -> Iterable[str]:
    """What class tokens across views need that the recipe lacks."""
    m, seen = plan.modalities[modality], plan.teacher_views(teacher, modality)
    if token >= m.spec.class_tokens:
        have = f"gives {m.spec.class_tokens or 'none'}"
        yield f"{name!r} needs class token {token} of {modality!r}; its backbone {have}"
    if seen and not any(s != t for s in views_of(modality, roles, plan) for t in seen):
        yield f"{name!r} needs a view of {modality!r} beside the teacher's own; its augmentation makes none"
