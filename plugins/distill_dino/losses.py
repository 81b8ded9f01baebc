"""Self-distillation onto prototypes: of class tokens across views (DINO), of patches within a view (iBOT, iBOT++)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from distill_core import GLOBAL, LOCAL, Needs, Outputs, Plan, Progress, UserError, did_you_mean
from distill_dino.pairs import pair_needs, view_pairs
from distill_dino.prototypes import (
    Positive,
    PrototypeConfig,
    PrototypeLoss,
    class_problems,
    mean_of,
    spread,
    views_of,
)
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
    patches: Literal["hidden", "all"] = "hidden"
    """Which of a masked view's patches learn: those that are hidden, or the visible ones as well (iBOT++ of TIPSv2). A
    view that is left whole learns nothing with `hidden`, and from all of its patches with `all`."""
    shared_head: bool = True
    """Class tokens across views (DINO's loss) by the same head, a second term; false: patches alone, to stand beside
    `dino` (as in DINOv2)."""


class Ibot(PrototypeLoss):
    """A hidden patch predicts the teacher's distribution for it, which the teacher sees (iBOT, equation 2).

    The mean over a view's hidden patches, then over all samples, those left whole counting 0. With `patches: all` every
    patch of the masked view predicts the teacher's, and the mean is over all of them (iBOT++: TIPSv2, section 3.3).
    With `shared_head` also DINO's loss of class tokens. The centre is that of the patches that learn (as in DINOv2).
    """

    name = "ibot"
    Config = IbotConfig
    examples = (
        {"prototypes": 32, "hidden": 32, "bottleneck": 16, "patches": "all", "shared_head": False},
        PrototypeLoss.examples[1],
    )

    def __init__(self, config: IbotConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.targets = Targets(config.prototypes, config.centring, config.center_momentum)
        if config.shared_head:
            self.class_targets = Targets(config.prototypes, config.centring, config.center_momentum)
            self.students = views_of(config.modality, (GLOBAL, LOCAL), plan)
        self.pairs = view_pairs(config, plan)

    @classmethod
    def needs(cls, config: IbotConfig, plan: Plan) -> Needs:
        """A backbone that hides patches, a teacher that sees the views whole, and the tokens of both."""
        return replace(pair_needs(config, plan), masked=(config.modality,))

    @classmethod
    def problems(cls, config: IbotConfig, plan: Plan) -> Iterable[str]:
        """A class token and two views for the shared head."""
        if config.shared_head:
            yield from class_problems(cls.name, config.modality, 0, (GLOBAL, LOCAL), plan, config.teacher)

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Terms `patch`, and `class` with a shared head. Raises `UserError` where no view of the role is masked.

        The metric `patch_cross_entropy` is the mean over all patches that learn, to be compared with ln K;
        `visible_cross_entropy`, with `patches: all`, is that over the visible ones.
        """
        m = self.config.modality
        student, teacher = outputs.student[m], outputs.teacher[self.config.teacher][m]
        masks, places = self._masks(outputs)
        hidden = torch.stack([masks[s] for s, _ in self.pairs])  # [P, B, L]
        whole = self.config.patches == "all"
        views = [(s, self.teacher_views.index(t)) for s, t in self.pairs]
        padded = whole and any(s in student.masks or t in teacher.masks for s, t in views)
        learning = hidden  # [P, B, L]
        if whole:
            learning = torch.stack([_real(hidden[0], student.masks.get(s), teacher.masks.get(t)) for s, t in views])
        at = [places[s] for s, _ in self.pairs]

        def picked(tokens: Iterable[Tensor]) -> Tensor:
            """Of each view [B, L, ...] the patches that learn, and with `all` the padding: [N, ...]."""
            return torch.cat([x.flatten(0, 1) if whole else tokens_at(x, i) for x, i in zip(tokens, at, strict=True)])

        temperature = self.temperature(outputs.progress)
        log_p = self.student_logits(picked([student.tokens[s] for s, _ in views]), outputs.progress)
        logits = self.teacher_logits(picked([teacher.tokens[t] for _, t in views]), outputs)
        with torch.autocast(logits.device.type, enabled=False):
            real = picked(learning) if padded else None
            targets = self.targets(logits, temperature, filler=outputs.filler, real=real)
            per_patch = -(targets * log_p).sum(-1)
            beside = picked(learning.sum(-1, keepdim=True).clamp(min=1).expand_as(learning))  # [N], of the same picture
            shares = per_patch / beside if real is None else (per_patch / beside).masked_fill(~real, 0)
            terms = {"patch": shares.sum() / (hidden.shape[0] * hidden.shape[1])}
        metrics = {"masked": hidden.float().mean()}
        if len(targets):
            metrics |= {"patch_cross_entropy": mean_of(per_patch.detach(), real)} | spread(targets, "patch_", real)
        if whole:
            metrics["visible_cross_entropy"] = mean_of(per_patch.detach(), picked(learning & ~hidden))
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


def _real(like: Tensor, *masks: Tensor | None) -> Tensor:
    """[B, L] bool, as `like`: True where all of the masks are that there are."""
    real = torch.ones_like(like)
    for mask in masks:
        if mask is not None:
            real = real & mask
    return real
