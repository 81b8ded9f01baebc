"""Small inputs made from what a component needs: plans, features, a step's outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from distill_authoring.conformance.modules import generic
from distill_authoring.conformance.suite import CheckFailed
from distill_core import (
    DEFAULT_TEACHER,
    GLOBAL,
    LOCAL,
    BackboneSpec,
    ComponentConfig,
    Features,
    Fused,
    Fusion,
    FusionHead,
    Group,
    MissingModality,
    ModalityPlan,
    Needs,
    Outputs,
    Plan,
    Progress,
    Views,
)
from distill_core.tools import unmet

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


Padding = Literal["some", "all"]


@dataclass(frozen=True)
class Fit:
    """A plan that a component accepts, what it needs of it, and what is special about it."""

    plan: Plan
    needs: Needs
    about: str = ""
    padding: Padding = "some"
    """Whether the tokens of every other modality are padded, or those of all."""


@contextmanager
def on(fit: Fit) -> Iterator[None]:
    """What goes wrong inside says what is special about the plan."""
    try:
        yield
    except Exception as error:
        if fit.about:
            error.add_note(f"on a plan with {fit.about}, which `needs` and `problems` accept")
        raise


def fits(cls: Any, config: Any) -> list[Fit]:
    """The richest plan that the component accepts, the barest, and what it accepts of `_CHANGES` to the richest.

    Raises `CheckFailed` where it accepts none.
    """
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
        raise CheckFailed(
            f"no plan suits it: {refused}. Plans have W = {WIDTH}, D = {DIM}, tokens, one or several views, and what "
            "`needs` asks for; give `examples` with options that fit them, or ask in `needs` for what is missing"
        )
    chosen = found[:1] if len(found) == 1 else [found[0], found[-1]]
    for about, changes in _CHANGES.items():
        changed = (_settled(cls, config, change(found[0]), about) for change in changes)
        chosen += [fit for fit in changed if fit is not None and fit.plan != found[0].plan][:1]
    return chosen


def _fit(
    cls: Any, config: Any, roles: tuple[tuple[str, ...], tuple[str, ...]], teacher: bool, fusion: bool
) -> tuple[Fit, list[str]]:
    """Grow a plan until it has what `needs` asks for; and what is still wrong then."""
    plan = Plan({}, teacher, fusion)
    names: list[str] = []
    for _ in range(20):
        here = names or ["first", "second"]
        if tuple(plan.modalities) != tuple(here):
            made = {name: plan.modalities.get(name) or modality(roles[i % 2], teacher) for i, name in enumerate(here)}
            plan = replace(plan, modalities=made)
        try:
            needs = cls.needs(config, plan)
            problems = list(cls.problems(config, plan))
        except MissingModality as error:
            names.append(error.name)
            continue
        more = [name for name in _named(needs) if name not in plan.modalities]
        names += more
        grown = _grow(plan, needs)
        if grown == plan and not more:
            return Fit(plan, needs), [*unmet(cls.name, needs, plan, set(plan.modalities)), *problems]
        plan = grown
    raise CheckFailed("`needs` asks for more each time the plan has what it asked for")


def _settled(cls: Any, config: Any, plan: Plan, about: str) -> Fit | None:
    """The plan, grown by what is needed of it; None where the component refuses it."""
    for _ in range(20):
        try:
            needs = cls.needs(config, plan)
            problems = [*cls.problems(config, plan), *unmet(cls.name, needs, plan, set(plan.modalities))]
        except MissingModality:
            return None
        grown = _grow(plan, needs, sees_more=False)
        if grown == plan:
            return None if problems else Fit(plan, needs, about, "all")
        plan = grown
    return None


def _named(needs: Needs) -> list[str]:
    """The modalities that it names."""
    wanted = [
        *needs.student,
        *needs.teacher,
        *needs.fused,
        *needs.tokens,
        *needs.teacher_tokens,
        *needs.views,
        *needs.masked,
    ]
    return list(dict.fromkeys(wanted))


Change = Callable[[Fit], Plan]


def _each(plan: Plan, change: Callable[[int, str, ModalityPlan], ModalityPlan]) -> Plan:
    """The plan with each modality (number, name, modality) changed."""
    return replace(plan, modalities={n: change(i, n, m) for i, (n, m) in enumerate(plan.modalities.items())})


def _third(fit: Fit) -> Plan:
    return replace(fit.plan, modalities={**fit.plan.modalities, "third": modality((GLOBAL, LOCAL), fit.plan.teacher)})


def _widths(width: int, dim: int) -> Change:
    """Each modality is wider than the one before, tokens by `width` and embeddings by `dim`."""

    def wider(i: int, _: str, m: ModalityPlan) -> ModalityPlan:
        return _respecified(m, width=m.spec.width + i * width, dim=m.spec.dim + i * dim)

    return lambda fit: _each(fit.plan, wider)


def _class_tokens(count: int) -> Change:
    return lambda fit: _each(fit.plan, lambda _, __, m: _respecified(m, class_tokens=count))


def _respecified(m: ModalityPlan, **changes: Any) -> ModalityPlan:
    return replace(m, spec=replace(m.spec, **changes))


def _one(fit: Fit) -> Plan:
    return replace(fit.plan, modalities=dict(list(fit.plan.modalities.items())[:1]))


def _unseen(fit: Fit) -> Plan:
    """The teacher sees what is named alone."""
    seen = {*fit.needs.teacher, *fit.needs.teacher_tokens}
    return _each(fit.plan, lambda _, name, m: m if name in seen else replace(m, teacher_views=()))


_CHANGES: dict[str, tuple[Change, ...]] = {
    "one modality more": (_third,),
    "widths W and D that differ between modalities": (_widths(24, 16), _widths(24, 0), _widths(0, 16)),
    "no class tokens": (_class_tokens(0),),
    "one class token": (_class_tokens(1),),
    "one modality": (_one,),
    "a teacher that sees only the modalities in Needs.teacher": (_unseen,),
}
"""What is special about a plan -> changes to the richest, of which the first that is accepted is tried."""


def modality(roles: Sequence[str], teacher: bool) -> ModalityPlan:
    """With tokens, and a teacher that sees the global views."""
    seen = tuple(i for i, role in enumerate(roles) if teacher and role == GLOBAL)
    return ModalityPlan(tuple(roles), seen, BackboneSpec(WIDTH, DIM, class_tokens=CLASSES))


def _grow(plan: Plan, needs: Needs, *, sees_more: bool = True) -> Plan:
    """With the views that are needed; `sees_more`: the teacher sees all global ones."""
    teacher = plan.teacher or bool(needs.teacher) or any(needs.teacher_tokens.values())
    modalities = {}
    for name, old in plan.modalities.items():
        roles = list(old.roles)
        for role, number in needs.views.get(name, {}).items():
            last = max((i for i, r in enumerate(roles) if r == role), default=len(roles) - 1)
            missing = number - roles.count(role)
            roles[last + 1 : last + 1] = [role] * missing
        while len(roles) <= max(needs.tokens.get(name, ()), default=-1):
            roles.insert(0, GLOBAL)
        seen = {i for i, role in enumerate(roles) if role == GLOBAL} if sees_more else set(old.teacher_views)
        seen |= set(needs.teacher_tokens.get(name, ()))
        modalities[name] = replace(
            old,
            roles=tuple(roles),
            teacher_views=tuple(sorted(seen)) if teacher else (),
            spec=replace(old.spec, can_mask=old.spec.can_mask or name in needs.masked),
        )
    return Plan(modalities, teacher, plan.fusion or bool(needs.fused))


def length(plan: Plan, name: str, role: str) -> int:
    """Tokens L of a view: they differ by modality and role."""
    return 5 + 2 * list(plan.modalities).index(name) - (1 if role == LOCAL else 0)


def features(
    plan: Plan,
    tokens: Mapping[str, Sequence[int]],
    *,
    batch: int = BATCH,
    seed: int = 0,
    teacher: bool = False,
    padding: Padding = "some",
    fill: float | None = None,
) -> dict[str, Features]:
    """Random features of every modality, with the tokens of the views in `tokens` alone; leaves of the graph.

    `fill` is what stands in padded tokens; None is noise, as elsewhere. A teacher's features count its own views, as in
    `Outputs`.
    """
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for number, (name, modality) in enumerate(plan.modalities.items()):
        views = modality.teacher_views if teacher else tuple(range(len(modality.roles)))
        if teacher and not views:
            continue

        def leaf(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw).requires_grad_(not teacher)

        found = Features(leaf(len(views), batch, modality.spec.dim))
        if modality.spec.class_tokens:
            found.class_tokens = leaf(len(views), batch, modality.spec.class_tokens, modality.spec.width)
        for view in sorted(set(tokens.get(name, ()))):
            place, count = views.index(view), length(plan, name, modality.roles[view])
            found.tokens[place] = leaf(batch, count, modality.spec.width)
            if number % 2 or padding == "all":
                ends = torch.randint(2, count, (batch, 1), generator=draw)
                found.masks[place] = torch.arange(count) < ends
                if fill is not None:
                    found.tokens[place].data.masked_fill_(~found.masks[place][..., None], fill)
        made[name] = found
    return made


def groups(
    fit: Fit,
    cls: Any,
    config: Any,
    student: Mapping[str, Features],
    *,
    seed: int,
    hidden: bool,
    ids: Collection[str],
) -> dict[str, Views]:
    """The views of a batch: token masks (and a loss's `example_targets`) where `needs` asks for masked views.

    Padding is never hidden.
    `x` is [V, B, L]: integers in the modalities `ids`, as token ids are, floats elsewhere.
    """
    draw = torch.Generator().manual_seed(seed)
    plan, needs, made = fit.plan, fit.needs, {}
    for name, modality in plan.modalities.items():
        parts, batch = [], student[name].pooled.shape[1]
        for role in dict.fromkeys(modality.roles):
            shape = (len(modality.views(role)), batch, length(plan, name, role))
            x = torch.randint(1, 5, shape, generator=draw) if name in ids else torch.randn(shape, generator=draw)
            group = Group(x, role)
            if name in needs.masked:
                mask = torch.rand(shape, generator=draw) < 0.4
                mask[..., 0] = True
                for i, view in enumerate(modality.views(role)):
                    mask[i] &= student[name].masks.get(view, mask[i])
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
        self.map = nn.ModuleDict({name: nn.Linear(m.spec.width, m.spec.dim) for name, m in plan.modalities.items()})

    def forward(self, features: dict[str, Features]) -> dict[str, Fused]:
        """Each modality over its own first tokens, where there are any."""
        pooled = {name: self.pool(name, f.pooled, f.tokens[0], f.masks.get(0)) if 0 in f.tokens else f.pooled
                  for name, f in features.items()}  # fmt: skip
        return {name: Fused(normalize(x.float(), dim=-1)) for name, x in pooled.items()}

    def pool(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries [V, B, D], tokens [B, L, W], mask [B, L] -> [V, B, D]."""
        real = tokens.new_ones(tokens.shape[:2]) if mask is None else mask.to(tokens.dtype)
        mean = (tokens * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        mapped: Tensor = self.map[modality](mean)
        return queries + mapped


def outputs(
    fit: Fit,
    cls: Any,
    config: Any,
    loss: Any = None,
    *,
    batch: int = BATCH,
    seed: int = 0,
    hidden: bool = True,
    ids: Collection[str] = (),
    fill: float | None = None,
) -> Outputs:
    """What a loss reads of one step: only what it needs, so that reading more is an error. The same, asked again.

    Fused features are leaves, or what the loss's own `example_fusion` makes of the student's.
    """
    plan, needs, padding = fit.plan, fit.needs, fit.padding
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        fusion: FusionHead | None = cls.example_fusion(config, plan)
        any_fusion = MeanFusion(ComponentConfig(), plan) if plan.fusion and fusion is None else fusion
    wanted = fusion.needs(fusion.config, plan).tokens if fusion is not None else {}
    tokens_of = {name: (*needs.tokens.get(name, ()), *wanted.get(name, ())) for name in {**needs.tokens, **wanted}}
    student = features(plan, tokens_of, batch=batch, seed=seed + 3, padding=padding, fill=fill)
    fused: dict[str, Fused] = {}
    if needs.fused and fusion is not None:
        with torch.enable_grad():
            fused = fusion(student)
    elif needs.fused:
        draw = torch.Generator().manual_seed(seed + 1)
        for name, m in plan.modalities.items():
            pooled = normalize(torch.randn(len(m.roles), batch, m.spec.dim, generator=draw), dim=-1).requires_grad_()
            tokens = torch.randn(batch, length(plan, name, GLOBAL), m.spec.dim, generator=draw).requires_grad_()
            fused[name] = Fused(pooled, tokens)
    heads = [getattr(loss, name) for name in getattr(loss, "teacher_modules", ())]
    copies = {id(head): generic(copy.deepcopy(head)).requires_grad_(False) for head in heads}
    return Outputs(
        groups(fit, cls, config, student, seed=seed + 2, hidden=hidden, ids=ids),
        student,
        {
            DEFAULT_TEACHER: features(
                plan, needs.teacher_tokens, batch=batch, seed=seed + 4, teacher=True, padding=padding, fill=fill
            )
        }
        if plan.teacher
        else {},
        fused,
        any_fusion,
        PROGRESS,
        lambda module: copies[id(module)],
    )


def part(given: Outputs, start: int, end: int, fusion: Fusion | None) -> Outputs:
    """The rows start..end of a batch, as the rank that holds them has them; leaves of a graph of its own.

    `fusion` makes the fused features; None cuts them, too.
    """

    def cut(x: Tensor, dim: int) -> Tensor:
        return x.detach().narrow(dim, start, end - start).clone().requires_grad_(x.requires_grad)

    def of(f: Features) -> Features:
        classes = None if f.class_tokens is None else cut(f.class_tokens, 1)
        tokens, masks = ({view: cut(x, 0) for view, x in each.items()} for each in (f.tokens, f.masks))
        return Features(cut(f.pooled, 1), tokens, masks, classes)

    student = {name: of(f) for name, f in given.student.items()}
    teacher = {who: {name: of(f) for name, f in seen.items()} for who, seen in given.teacher.items()}
    fused = given.fused
    if fused and fusion is not None:
        fused = fusion(student)
    else:
        fused = {
            name: Fused(cut(x.pooled, 1), None if x.tokens is None else cut(x.tokens, 0)) for name, x in fused.items()
        }
    views = {name: each.map(lambda x: cut(x, 1)) for name, each in given.views.items()}
    return Outputs(views, student, teacher, fused, given.fusion, given.progress, given.ema)


def leaves(given: Outputs, modality: str | None = None) -> list[Tensor]:
    """What the student made (of one modality): a loss's gradient must reach some of it."""
    names = list(given.student) if modality is None else [modality]
    found: list[Tensor | None] = []
    for name in names:
        f = given.student[name]
        fused = given.fused.get(name)
        found += [f.pooled, f.class_tokens, *f.tokens.values()]
        found += [fused.pooled, fused.tokens] if fused is not None else []
    return [x for x in found if x is not None and x.is_leaf]
