"""Self-distillation onto prototypes: of class tokens across views (DINO), of hidden patches within a view (iBOT)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from distill_core import GLOBAL, LOCAL, Needs, Outputs, Plan, Progress, UserError, did_you_mean
from distill_dino.prototypes import Positive, PrototypeConfig, PrototypeLoss, class_problems, spread, views_of
from distill_dino.targets import Targets
from distill_vl.masking import tokens_at


class DinoConfig(PrototypeConfig):
    """Options of DINO's loss."""

    class_token: Annotated[int, Field(ge=0)] = 0
    """Which of the backbone's class tokens, from 0."""
    student_roles: tuple[str, ...] = (GLOBAL, LOCAL)
    """Views of the student that are compared with the teacher's."""


class Dino(PrototypeLoss):
    """Every view's class token predicts the teacher's of every other view that the teacher sees: local to global."""

    name = "dino"
    Config = DinoConfig

    def __init__(self, config: DinoConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.targets = Targets(config.prototypes, config.centring, config.center_momentum)
        self.students = views_of(config.modality, config.student_roles, plan)

    @classmethod
    def needs(cls, config: DinoConfig, plan: Plan) -> Needs:
        """A teacher of the modality."""
        return Needs(teacher={config.teacher: {config.modality: ()}}, embeddings=())

    @classmethod
    def problems(cls, config: DinoConfig, plan: Plan) -> Iterable[str]:
        """Roles that there are (the default's `local` may be missing), a class token, and two views at least."""
        have = sorted(set(plan.modalities[config.modality].roles))
        for role in config.student_roles:
            if role not in (GLOBAL, LOCAL, *have):
                yield f"{cls.name!r}: student_roles: no view has the role {role!r}{did_you_mean(role, have)}"
        roles = config.student_roles
        yield from class_problems(cls.name, config.modality, config.class_token, roles, plan, config.teacher)

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One term; metrics show a collapse."""
        term, metrics = self.class_term(outputs, self.targets, self.students, self.config.class_token)
        return {"dino": term}, metrics | {"teacher_temperature": term.new_full((), self.temperature(outputs.progress))}

    def after_step(self, outputs: Outputs, progress: Progress) -> None:
        self.targets.move()


class IbotConfig(PrototypeConfig):
    """Options of iBOT's loss."""

    prototypes: Positive = 8192
    """Outputs K of the head."""
    role: str = GLOBAL
    """The student's masked views; the backbone's `masking` must hide patches of them."""
    target_role: str | None = None
    """The teacher's views, the same pictures in the same order; null: the same views."""
    shared_head: bool = True
    """Class tokens across views (DINO's loss) by the same head, a second term; false: patches alone, to stand beside
    `dino` (as in DINOv2)."""


class Ibot(PrototypeLoss):
    """A hidden patch predicts the teacher's distribution for it, which the teacher sees (iBOT, equation 2).

    The mean over a view's hidden patches, then over all samples, those left whole counting 0. With `shared_head` also
    DINO's loss of class tokens. The centre is that of hidden patches alone (as in DINOv2).
    """

    name = "ibot"
    Config = IbotConfig

    def __init__(self, config: IbotConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.targets = Targets(config.prototypes, config.centring, config.center_momentum)
        if config.shared_head:
            self.class_targets = Targets(config.prototypes, config.centring, config.center_momentum)
            self.students = views_of(config.modality, (GLOBAL, LOCAL), plan)
        self.pairs = _pairs(config, plan)

    @classmethod
    def needs(cls, config: IbotConfig, plan: Plan) -> Needs:
        """A backbone that hides patches, a teacher that sees the views whole, and the tokens of both."""
        m, pairs = config.modality, _pairs(config, plan)
        target = config.target_role or config.role
        count = max(1, len(plan.modalities[m].views(config.role)))
        return Needs(
            teacher={config.teacher: {m: tuple(t for _, t in pairs)}},
            tokens={m: tuple(s for s, _ in pairs)},
            masked=(m,),
            views={m: {config.role: 1, target: count}},
            embeddings=(),
        )

    @classmethod
    def problems(cls, config: IbotConfig, plan: Plan) -> Iterable[str]:
        """A class token and two views for the shared head."""
        if config.shared_head:
            yield from class_problems(cls.name, config.modality, 0, (GLOBAL, LOCAL), plan, config.teacher)

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Terms `patch`, and `class` with a shared head. Raises `UserError` where no view of the role is masked.

        The metric `patch_cross_entropy` is the mean over all hidden patches, to be compared with ln K.
        """
        m = self.config.modality
        student, teacher = outputs.student[m], outputs.teacher[self.config.teacher][m]
        masks, places = self._masks(outputs)
        hidden = torch.stack([masks[s] for s, _ in self.pairs])  # [P, B, L]
        seen = [teacher.tokens[self.teacher_views.index(t)] for _, t in self.pairs]
        at = [places[s] for s, _ in self.pairs]
        student_tokens = torch.cat([tokens_at(student.tokens[s], i) for (s, _), i in zip(self.pairs, at, strict=True)])
        teacher_tokens = torch.cat([tokens_at(tokens, i) for tokens, i in zip(seen, at, strict=True)])  # [N, W]
        temperature = self.temperature(outputs.progress)
        log_p = self.student_logits(student_tokens, outputs.progress)
        logits = self.teacher_logits(teacher_tokens, outputs)
        with torch.autocast(logits.device.type, enabled=False):
            targets = self.targets(logits, temperature, filler=outputs.filler)
            per_patch = -(targets * log_p).sum(-1)
            counts = hidden.sum(-1, keepdim=True).expand_as(hidden)  # hidden patches of the same picture
            beside = torch.cat([tokens_at(count, i) for count, i in zip(counts, at, strict=True)])  # [N]
            terms = {"patch": (per_patch / beside).sum() / (hidden.shape[0] * hidden.shape[1])}
        metrics = {"masked": hidden.float().mean()}
        if len(targets):
            metrics |= {"patch_cross_entropy": per_patch.detach().mean()} | spread(targets, "patch_")
        if self.config.shared_head:
            terms["class"], class_metrics = self.class_term(outputs, self.class_targets, self.students)
            metrics |= class_metrics
        return terms, metrics | {"teacher_temperature": logits.new_full((), temperature)}

    def _masks(self, outputs: Outputs) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """The student's masked views -> [B, L], True where a patch is hidden; and where that is in [B * L]."""
        m = self.config.modality
        masks: dict[int, Tensor] = {}
        places: dict[int, Tensor] = {}
        for start, group in outputs.views[m].numbered():
            if group.token_mask is not None:
                masks |= {start + i: mask for i, mask in enumerate(group.token_mask)}
                places |= {start + i: at for i, at in enumerate(group.places())}
        if not all(s in masks for s, _ in self.pairs):
            raise UserError(
                f"{self.name!r} needs the {self.config.role} views of {m!r} masked; "
                f"name the role in backbone.{m}.masking.roles"
            )
        return masks, places

    def after_step(self, outputs: Outputs, progress: Progress) -> None:
        self.targets.move()
        if self.config.shared_head:
            self.class_targets.move()


def _pairs(config: IbotConfig, plan: Plan) -> tuple[tuple[int, int], ...]:
    """(the student's masked view, the teacher's whole one), by the plan's numbers."""
    m = plan.modalities[config.modality]
    return tuple(zip(m.views(config.role), m.views(config.target_role or config.role), strict=False))
