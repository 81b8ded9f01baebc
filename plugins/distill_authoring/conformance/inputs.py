"""Small inputs that hold what a component needs: plans, features, a step's outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from distill_authoring.conformance.modules import generic
from distill_authoring.conformance.suite import Case, CheckFailed
from distill_core import (
    DEFAULT_TEACHER,
    GLOBAL,
    LOCAL,
    BackboneSpec,
    ComponentConfig,
    ConformanceCase,
    Features,
    FieldPlan,
    Fused,
    Fusion,
    FusionHead,
    Group,
    MissingModality,
    ModalityPlan,
    Needs,
    Outputs,
    Plan,
    Present,
    Progress,
    Views,
)
from distill_core.tools import unmet

WIDTH, DIM = 48, 32
"""W and D: different, and both divisible by common numbers of heads."""

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
"""Roles of views that are tried in this order, alternating between modalities."""


Padding = Literal["some", "all"]


@dataclass(frozen=True)
class Fit:
    """A plan that a component accepts, its needs on that plan, and what is special about the plan."""

    plan: Plan
    needs: Needs
    about: str = ""
    padding: Padding = "some"
    """Whether the tokens of every second modality are padded, or those of all modalities."""


@contextmanager
def on(fit: Fit) -> Iterator[None]:
    """Adds to errors inside the context what is special about the plan."""
    try:
        yield
    except Exception as error:
        if fit.about:
            error.add_note(f"on a plan with {fit.about}, which `needs` and `problems` accept")
        raise


def fits(cls: Any, config: Any) -> list[Fit]:
    """The richest and the barest plan that the component accepts, and the `_CHANGES` of the richest that it accepts.

    Raises `CheckFailed` where it accepts none.
    """
    accepted: list[Fit] = []
    first_problem = ""
    for roles in _ROLES:
        for teacher, fusion in ((False, False), (False, True), (True, True)):
            fit, problems = _fit(cls, config, roles, teacher, fusion)
            if not problems:
                accepted.append(fit)
                break
            first_problem = first_problem or problems[0]
    if not accepted:
        raise CheckFailed(
            f"it accepts no plan: {first_problem}. Plans have W = {WIDTH}, D = {DIM}, tokens, one or several views, "
            "and what `needs` names; give `examples` with options that fit, or name in `needs` what is missing"
        )
    result = accepted[:1] if len(accepted) == 1 else [accepted[0], accepted[-1]]
    for about, changes in _CHANGES.items():
        changed = (_fit_changed(cls, config, change(accepted[0]), about) for change in changes)
        result += [fit for fit in changed if fit is not None and fit.plan != accepted[0].plan][:1]
    return result


def richest(case: Case) -> Fit:
    """The richest plan that the component accepts."""
    return fits(case.cls, case.config)[0]


def _fit(
    cls: Any, config: Any, roles: tuple[tuple[str, ...], tuple[str, ...]], teacher: bool, fusion: bool
) -> tuple[Fit, list[str]]:
    """Extend a plan until it has what `needs` names; returns also the remaining problems."""
    plan = Plan({}, teacher, fusion)
    names: list[str] = []
    for _ in range(20):
        current = names or ["first", "second"]
        if tuple(plan.modalities) != tuple(current):
            modalities = {
                name: plan.modalities.get(name) or modality(roles[i % 2], teacher) for i, name in enumerate(current)
            }
            plan = replace(plan, modalities=modalities)
        try:
            needs = cls.needs(config, plan)
            problems = list(cls.problems(config, plan))
        except MissingModality as error:
            names.append(error.name)
            continue
        missing = [name for name in _modalities_of(needs) if name not in plan.modalities]
        names += missing
        grown = _grow(plan, needs)
        if grown == plan and not missing:
            return Fit(plan, needs), [*unmet(cls.name, needs, plan, set(plan.modalities)), *problems]
        plan = grown
    raise CheckFailed("`needs` names more each time the plan has what it named before")


def _fit_changed(cls: Any, config: Any, plan: Plan, about: str) -> Fit | None:
    """The plan, extended by what `needs` names on it; None if the component refuses it."""
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


def _modalities_of(needs: Needs) -> list[str]:
    """The modalities that `needs` names, without duplicates."""
    names = [
        *needs.student,
        *needs.teacher,
        *needs.fused,
        *needs.tokens,
        *needs.teacher_tokens,
        *needs.views,
        *needs.masked,
        *needs.extra,
    ]
    return list(dict.fromkeys(names))


Change = Callable[[Fit], Plan]


def _map_modalities(plan: Plan, change: Callable[[int, str, ModalityPlan], ModalityPlan]) -> Plan:
    """The plan with each modality (number, name, modality) changed."""
    return replace(plan, modalities={n: change(i, n, m) for i, (n, m) in enumerate(plan.modalities.items())})


def _with_third_modality(fit: Fit) -> Plan:
    return replace(fit.plan, modalities={**fit.plan.modalities, "third": modality((GLOBAL, LOCAL), fit.plan.teacher)})


def _widths(width: int, dim: int) -> Change:
    """Each modality is wider than the previous one, tokens by `width` and embeddings by `dim`."""

    def wider(i: int, _: str, m: ModalityPlan) -> ModalityPlan:
        return _respecified(m, width=m.spec.width + i * width, dim=m.spec.dim + i * dim)

    return lambda fit: _map_modalities(fit.plan, wider)


def _class_tokens(count: int) -> Change:
    return lambda fit: _map_modalities(fit.plan, lambda _, __, m: _respecified(m, class_tokens=count))


def _respecified(m: ModalityPlan, **changes: Any) -> ModalityPlan:
    return replace(m, spec=replace(m.spec, **changes))


def _first_modality(fit: Fit) -> Plan:
    return replace(fit.plan, modalities=dict(list(fit.plan.modalities.items())[:1]))


def _with_blind_teacher(fit: Fit) -> Plan:
    """The teacher sees only the modalities that `needs` names for it."""
    named = {*fit.needs.teacher, *fit.needs.teacher_tokens}
    return _map_modalities(fit.plan, lambda _, name, m: m if name in named else replace(m, teacher_views=()))


_CHANGES: dict[str, tuple[Change, ...]] = {
    "one modality more": (_with_third_modality,),
    "widths W and D that differ between modalities": (_widths(24, 16), _widths(24, 0), _widths(0, 16)),
    "no class tokens": (_class_tokens(0),),
    "one class token": (_class_tokens(1),),
    "one modality": (_first_modality,),
    "a teacher that sees only the modalities in Needs.teacher": (_with_blind_teacher,),
}
"""What is special about a plan -> changes to the richest plan; the first accepted one is used."""


def modality(roles: Sequence[str], teacher: bool) -> ModalityPlan:
    """A modality with tokens, whose global views the teacher sees."""
    seen = tuple(i for i, role in enumerate(roles) if teacher and role == GLOBAL)
    return ModalityPlan(tuple(roles), seen, BackboneSpec(WIDTH, DIM, class_tokens=CLASSES))


def _grow(plan: Plan, needs: Needs, *, sees_more: bool = True) -> Plan:
    """The plan with the views that are needed; with `sees_more` the teacher sees all global ones."""
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
            extras=tuple(dict.fromkeys((*old.extras, *needs.extra.get(name, ())))),
        )
    fields = {**dict.fromkeys(needs.fields, FieldPlan((), "float32")), **plan.fields}
    return Plan(modalities, teacher, plan.fusion or bool(needs.fused), fields=fields)


def length(plan: Plan, name: str, role: str) -> int:
    """The number of tokens L of a view, which differs by modality and role."""
    return 5 + 2 * list(plan.modalities).index(name) - (1 if role == LOCAL else 0)


def example_features(
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

    `fill` is the value of padded tokens; None fills them with noise, as elsewhere. A teacher's features number its own
    views, as in `Outputs`.
    """
    draw = torch.Generator().manual_seed(seed)
    by_modality = {}
    for number, (name, modality) in enumerate(plan.modalities.items()):
        views = modality.teacher_views if teacher else tuple(range(len(modality.roles)))
        if teacher and not views:
            continue

        def leaf(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw).requires_grad_(not teacher)

        tokens_by_view: dict[int, Tensor] = {}
        masks: dict[int, Tensor] = {}
        current = Features(leaf(len(views), batch, modality.spec.dim), tokens_by_view, masks)
        if modality.spec.class_tokens:
            current.class_tokens = leaf(len(views), batch, modality.spec.class_tokens, modality.spec.width)
        for view in sorted(set(tokens.get(name, ()))):
            place, count = views.index(view), length(plan, name, modality.roles[view])
            tokens_by_view[place] = leaf(batch, count, modality.spec.width)
            if number % 2 or padding == "all":
                ends = torch.randint(2, count, (batch, 1), generator=draw)
                masks[place] = torch.arange(count) < ends
                if fill is not None:
                    tokens_by_view[place].data.masked_fill_(~masks[place][..., None], fill)
        by_modality[name] = current
    return by_modality


def groups(
    fit: Fit,
    inputs: ConformanceCase,
    config: Any,
    student: Mapping[str, Features],
    *,
    seed: int,
    hidden: bool,
    ids: Collection[str],
) -> dict[str, Views]:
    """The views of a batch: token masks (and the targets of `inputs`) where `needs` asks for masked views.

    Padding is never hidden.
    `x` is [V, B, L]: integers in the modalities `ids`, as token ids are, floats elsewhere.
    """
    draw = torch.Generator().manual_seed(seed)
    plan, needs, by_modality = fit.plan, fit.needs, {}
    for name, modality in plan.modalities.items():
        parts, batch = [], student[name].pooled.shape[1]
        for role in dict.fromkeys(modality.roles):
            shape = (len(modality.views(role)), batch, length(plan, name, role))
            x = torch.randint(1, 5, shape, generator=draw) if name in ids else torch.randn(shape, generator=draw)
            extra = {
                of: inputs.extra(config, name, of, shape[:2])
                if inputs.extra is not None
                else torch.rand(shape[:2], generator=draw)
                for of in needs.extra.get(name, ())
            }
            group = Group(x, role, extra=extra)
            if name in needs.masked:
                mask = torch.rand(shape, generator=draw) < 0.4
                mask[..., 0] = True
                for i, view in enumerate(modality.views(role)):
                    mask[i] &= student[name].masks.get(view, mask[i])
                group.token_mask = mask if hidden else torch.zeros_like(mask)
                group.locate_hidden()  # as the loader's workers do
                group.targets = inputs.targets(config, name, group.token_mask) if inputs.targets is not None else None
            parts.append(group)
        by_modality[name] = Views(parts)
    return by_modality


class MeanFusion(FusionHead):
    """The fusion for losses: queries plus a linear map of the mean token."""

    name = "mean"

    def __init__(self, config: ComponentConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.map = nn.ModuleDict({name: nn.Linear(m.spec.width, m.spec.dim) for name, m in plan.modalities.items()})

    def forward(self, features: dict[str, Features]) -> dict[str, Fused]:
        """Pools each modality over the tokens of its first view, if it has any."""
        pooled = {name: self.pool(name, f.pooled, f.tokens[0], f.masks.get(0)) if 0 in f.tokens else f.pooled
                  for name, f in features.items()}  # fmt: skip
        return {name: Fused(normalize(x.float(), dim=-1)) for name, x in pooled.items()}

    def pool(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries [V, B, D], tokens [B, L, W], mask [B, L] -> [V, B, D]."""
        real = tokens.new_ones(tokens.shape[:2]) if mask is None else mask.to(tokens.dtype)
        mean = (tokens * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        mapped: Tensor = self.map[modality](mean)
        return queries + mapped


def example_outputs(
    fit: Fit,
    inputs: ConformanceCase,
    config: Any,
    loss: Any = None,
    *,
    batch: int = BATCH,
    seed: int = 0,
    hidden: bool = True,
    ids: Collection[str] = (),
    fill: float | None = None,
) -> Outputs:
    """The outputs of one step, deterministic: only what the loss needs, so that reading more is an error.

    Fused features are leaves, or computed from the student's by the fusion of `inputs`.
    """
    plan, needs, padding = fit.plan, fit.needs, fit.padding
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        fusion = inputs.fusion(config, plan) if inputs.fusion is not None else None
        any_fusion = MeanFusion(ComponentConfig(), plan) if plan.fusion and fusion is None else fusion
    fusion_tokens = fusion.needs(fusion.config, plan).tokens if fusion is not None else {}
    tokens_of = {
        name: (*needs.tokens.get(name, ()), *fusion_tokens.get(name, ())) for name in {**needs.tokens, **fusion_tokens}
    }
    student = example_features(plan, tokens_of, batch=batch, seed=seed + 3, padding=padding, fill=fill)
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
    draw = torch.Generator().manual_seed(seed + 5)
    fields = {
        name: inputs.field(config, name, batch) if inputs.field is not None else torch.rand(batch, generator=draw)
        for name in needs.fields
    }
    return Outputs(
        groups(fit, inputs, config, student, seed=seed + 2, hidden=hidden, ids=ids),
        student,
        {
            DEFAULT_TEACHER: example_features(
                plan, needs.teacher_tokens, batch=batch, seed=seed + 4, teacher=True, padding=padding, fill=fill
            )
        }
        if plan.teacher
        else {},
        fused,
        any_fusion,
        PROGRESS,
        lambda module: copies[id(module)],
        [str(i) for i in range(batch)],
        fields,
    )


def part(outputs: Outputs, start: int, end: int, fusion: Fusion | None) -> Outputs:
    """The rows start..end of a batch, as on the rank that holds them; they are leaves of a separate graph.

    `fusion` computes the fused features; with None they are sliced too.
    """

    def cut(x: Tensor, dim: int) -> Tensor:
        return x.detach().narrow(dim, start, end - start).clone().requires_grad_(x.requires_grad)

    def of(f: Features) -> Features:
        classes = None if f.class_tokens is None else cut(f.class_tokens, 1)
        tokens, masks = ({view: cut(x, 0) for view, x in values.items()} for values in (f.tokens, f.masks))
        return Features(cut(f.pooled, 1), tokens, masks, classes)

    student = {name: of(f) for name, f in outputs.student.items()}
    teacher = {
        teacher_name: {name: of(f) for name, f in side.items()} for teacher_name, side in outputs.teacher.items()
    }
    fused = outputs.fused
    if fused and fusion is not None:
        fused = fusion(student)
    else:
        fused = {
            name: Fused(cut(x.pooled, 1), None if x.tokens is None else cut(x.tokens, 0)) for name, x in fused.items()
        }
    views = {name: group.map(lambda x: cut(x, 1)) for name, group in outputs.views.items()}
    fields = {name: x[start:end] for name, x in outputs.fields.items()}
    keys = outputs.keys[start:end]
    return replace(outputs, views=views, student=student, teacher=teacher, fused=fused, keys=keys, fields=fields)


def of_some(outputs: Outputs, counts: Sequence[int], rank: int) -> Outputs:
    """The outputs of a rank that has so many samples, where some lack a modality; a filler where it has none."""
    masks = np.arange(max(counts)) < np.array(counts)[:, None]
    present = Present(masks, rank)
    for features in (*outputs.student.values(), *(f for side in outputs.teacher.values() for f in side.values())):
        features.present = present
    for fused in outputs.fused.values():
        fused.present = present
    return replace(outputs, present=present)


def leaves(outputs: Outputs, modality: str | None = None) -> list[Tensor]:
    """The student's tensors (of one modality): a loss's gradient must reach some of them."""
    names = list(outputs.student) if modality is None else [modality]
    tensors: list[Tensor | None] = []
    for name in names:
        f = outputs.student[name]
        fused = outputs.fused.get(name)
        tensors += [f.pooled, f.class_tokens, *f.tokens.values()]
        tensors += [fused.pooled, fused.tokens] if fused is not None else []
    return [x for x in tensors if x is not None and x.is_leaf]
