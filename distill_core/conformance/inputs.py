"""Small inputs made from what a component needs: plans, features, a step's outputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from distill_core.compatibility import unmet
from distill_core.components import ComponentConfig, FusionHead, ModalityPlan, Needs, Plan
from distill_core.conformance.suite import Mend
from distill_core.types import GLOBAL, LOCAL, Features, Fused, Group, Outputs, Progress, Views

WIDTH, DIM = 48, 32
"""W and D: different, and both divided by the usual numbers of heads."""

BATCH = 3
CLASSES = 2
"""Class tokens C of every view."""
PROGRESS = Progress(step=3, steps=10, epoch=0.5)

_ROLES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    ((GLOBAL, GLOBAL, LOCAL), (GLOBAL, GLOBAL, LOCAL, LOCAL)),
    ((GLOBAL, GLOBAL, LOCAL), (GLOBAL, GLOBAL, LOCAL)),
    ((GLOBAL, GLOBAL), (GLOBAL, GLOBAL)),
    ((GLOBAL,), (GLOBAL,)),
)
"""The views that are tried, of every other modality, in this order."""


@dataclass(frozen=True)
class Fit:
    """A plan that a component accepts, and what it needs of it."""

    plan: Plan
    needs: Needs


def fits(cls: Any, config: Any) -> list[Fit]:
    """The richest and the barest plan that the component accepts. Raises `Mend` where it accepts none."""
    found: list[Fit] = []
    refused = ""
    for roles in _ROLES:
        for teacher, fusion in ((False, False), (False, True), (True, True)):
            fit, problems = _fit(cls, config, roles, teacher, fusion)
            if not problems:
                found.append(fit)
                break
            refused = refused or problems[0]
    if not found:
        raise Mend(
            f"no plan suits it: {refused}. Plans have W = {WIDTH}, D = {DIM}, tokens, one or several views, and what "
            "`needs` asks for; give `examples` with options that fit them, or ask in `needs` for what is missing"
        )
    return found[:1] if len(found) == 1 else [found[0], found[-1]]


def _fit(
    cls: Any, config: Any, roles: tuple[tuple[str, ...], tuple[str, ...]], teacher: bool, fusion: bool
) -> tuple[Fit, list[str]]:
    """Grow a plan until it has what `needs` asks for; and what is still wrong then."""
    plan = Plan({}, teacher, fusion)
    names: list[str] = []
    for _ in range(20):
        here = names or ["first", "second"]
        if tuple(plan.modalities) != tuple(here):
            given = {name: plan.modalities.get(name) or modality(roles[i % 2], teacher) for i, name in enumerate(here)}
            plan = replace(plan, modalities=given)
        try:
            needs = cls.needs(config, plan)
            problems = list(cls.problems(config, plan))
        except KeyError as error:
            if not error.args or error.args[0] in names or not isinstance(error.args[0], str):
                raise
            names.append(error.args[0])
            continue
        wanted = [*needs.modalities, *needs.tokens, *needs.teacher_tokens, *needs.views, *needs.masked]
        more = [name for name in dict.fromkeys(wanted) if name not in names]
        names += more
        grown = _grow(plan, needs)
        if grown == plan and not more:
            return Fit(plan, needs), [*unmet(cls.name, needs, plan, set(plan.modalities)), *problems]
        plan = grown
    raise Mend("`needs` asks for more each time the plan has what it asked for")


def modality(roles: Sequence[str], teacher: bool) -> ModalityPlan:
    """With tokens, and a teacher that sees the global views."""
    seen = tuple(i for i, role in enumerate(roles) if teacher and role == GLOBAL)
    return ModalityPlan(tuple(roles), seen, WIDTH, DIM, has_tokens=True, class_tokens=CLASSES)


def _grow(plan: Plan, needs: Needs) -> Plan:
    teacher = plan.teacher or needs.teacher or any(needs.teacher_tokens.values())
    modalities = {}
    for name, old in plan.modalities.items():
        roles = list(old.roles)
        for role, number in needs.views.get(name, {}).items():
            last = max((i for i, r in enumerate(roles) if r == role), default=len(roles) - 1)
            missing = number - roles.count(role)
            roles[last + 1 : last + 1] = [role] * missing
        while len(roles) <= max(needs.tokens.get(name, ()), default=-1):
            roles.insert(0, GLOBAL)
        seen = {i for i, role in enumerate(roles) if role == GLOBAL} | set(needs.teacher_tokens.get(name, ()))
        modalities[name] = replace(
            old,
            roles=tuple(roles),
            teacher_views=tuple(sorted(seen)) if teacher else (),
            can_mask=old.can_mask or name in needs.masked,
        )
    return Plan(modalities, teacher, plan.fusion or needs.fused)


def length(plan: Plan, name: str, role: str) -> int:
    """Tokens L of a view: they differ by modality and role."""
    return 5 + 2 * list(plan.modalities).index(name) - (1 if role == LOCAL else 0)


def features(
    plan: Plan, tokens: Mapping[str, Sequence[int]], *, batch: int = BATCH, seed: int = 0, teacher: bool = False
) -> dict[str, Features]:
    """Random features of every modality, with the tokens of the views in `tokens` alone; leaves of the graph.

    Every other modality has padding. A teacher's features count its own views, as in `Outputs`.
    """
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for number, (name, modality) in enumerate(plan.modalities.items()):
        views = modality.teacher_views if teacher else tuple(range(len(modality.roles)))
        if teacher and not views:
            continue

        def leaf(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw).requires_grad_(not teacher)

        found = Features(
            leaf(len(views), batch, modality.dim), class_tokens=leaf(len(views), batch, CLASSES, modality.width)
        )
        for view in sorted(set(tokens.get(name, ()))):
            place, count = views.index(view), length(plan, name, modality.roles[view])
            found.tokens[place] = leaf(batch, count, modality.width)
            if number % 2:
                ends = torch.randint(2, count, (batch, 1), generator=draw)
                found.masks[place] = torch.arange(count) < ends
        made[name] = found
    return made


def groups(plan: Plan, needs: Needs, cls: Any, config: Any, *, batch: int, seed: int, hidden: bool) -> dict[str, Views]:
    """The views of a batch: token masks (and a loss's `example_targets`) where `needs` asks for masked views."""
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for name, modality in plan.modalities.items():
        parts = []
        for role in dict.fromkeys(modality.roles):
            shape = (len(modality.views(role)), batch, length(plan, name, role))
            group = Group(torch.randn(shape, generator=draw), role)
            group.source = torch.arange(shape[0])[:, None].expand(shape[:2]).clone()
            if name in needs.masked:
                mask = torch.rand(shape, generator=draw) < 0.4
                mask[..., 0] = True
                group.token_mask = mask if hidden else torch.zeros_like(mask)
                group.targets = cls.example_targets(config, name, group.token_mask)
            parts.append(group)
        made[name] = Views(parts)
    return made


class MeanFusion(FusionHead):
    """The fusion that losses are given: queries plus a map of the mean token."""

    name = "mean"

    def __init__(self, config: ComponentConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.map = nn.ModuleDict({name: nn.Linear(m.width, m.dim) for name, m in plan.modalities.items()})

    def forward(self, features: dict[str, Features]) -> Fused:
        """Each modality over its own first tokens, where there are any."""
        pooled = {name: self.pool(name, f.pooled, f.tokens[0], f.masks.get(0)) if 0 in f.tokens else f.pooled
                  for name, f in features.items()}  # fmt: skip
        return Fused({name: normalize(x.float(), dim=-1) for name, x in pooled.items()})

    def pool(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries [V, B, D], tokens [B, L, W], mask [B, L] -> [V, B, D]."""
        real = tokens.new_ones(tokens.shape[:2]) if mask is None else mask.to(tokens.dtype)
        mean = (tokens * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        mapped: Tensor = self.map[modality](mean)
        return queries + mapped


def outputs(
    fit: Fit, cls: Any, config: Any, loss: Any = None, *, batch: int = BATCH, seed: int = 0, hidden: bool = True
) -> Outputs:
    """What a loss reads of one step: only what it needs, so that reading more is an error.

    Fused features are leaves, or what the loss's own `example_fusion` makes of the student's.
    """
    plan, needs = fit.plan, fit.needs
    fusion: FusionHead | None = cls.example_fusion(config, plan)
    wanted = fusion.needs(fusion.config, plan).tokens if fusion is not None else {}
    tokens_of = {name: (*needs.tokens.get(name, ()), *wanted.get(name, ())) for name in {**needs.tokens, **wanted}}
    student = features(plan, tokens_of, batch=batch, seed=seed + 3)
    fused = None
    if needs.fused and fusion is not None:
        fused = fusion(student)
    elif needs.fused:
        draw = torch.Generator().manual_seed(seed + 1)
        pooled, tokens = {}, {}
        for name, m in plan.modalities.items():
            pooled[name] = normalize(torch.randn(len(m.roles), batch, m.dim, generator=draw), dim=-1).requires_grad_()
            tokens[name] = torch.randn(batch, length(plan, name, GLOBAL), m.dim, generator=draw).requires_grad_()
        fused = Fused(pooled, tokens)
    heads = [getattr(loss, name) for name in getattr(loss, "teacher_modules", ())]
    copies = {id(head): copy.deepcopy(head).requires_grad_(False) for head in heads}
    return Outputs(
        groups(plan, needs, cls, config, batch=batch, seed=seed + 2, hidden=hidden),
        student,
        features(plan, needs.teacher_tokens, batch=batch, seed=seed + 4, teacher=True) if plan.teacher else {},
        fused,
        fusion or (MeanFusion(ComponentConfig(), plan) if plan.fusion else None),
        PROGRESS,
        lambda module: copies[id(module)],
    )


def leaves(given: Outputs) -> list[Tensor]:
    """What the student made: a loss's gradient must reach some of it."""
    found = [x for f in given.student.values() for x in (f.pooled, f.class_tokens, *f.tokens.values()) if x is not None]
    made = [*given.fused.pooled.values(), *given.fused.tokens.values()] if given.fused else []
    return found + [x for x in made if x.is_leaf]
