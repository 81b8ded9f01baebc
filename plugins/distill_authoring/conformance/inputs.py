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
from distill_authoring.conformance.suite import Case, CheckFailed, require
from distill_core import (
    DEFAULT_TEACHER,
    GLOBAL,
    LOCAL,
    PREDICTED,
    REPEATED,
    BackboneSpec,
    Component,
    ComponentConfig,
    ConformanceCase,
    Features,
    FieldPlan,
    Fused,
    Fusion,
    FusionHead,
    Group,
    HeadPlan,
    MaskPlan,
    MissingModality,
    ModalityPlan,
    Needs,
    Outputs,
    Plan,
    Present,
    Progress,
    TeacherPlan,
    Views,
    Vocabulary,
)
from distill_core.tools import needs_of, problems_of, slots_in, unmet

WIDTH, DIM = 48, 32
"""W and D: different, and both divisible by common numbers of heads."""

BATCH = 3
CLASSES = 2
"""Class tokens C of every view."""
VOCABULARY = Vocabulary(size=7, start=1, end=4, padding=0, longest=16)
"""Of each modality: its ids are 1 to 4."""
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


def fits(case: Case) -> list[Fit]:
    """The richest and the barest plan that the component accepts, and the `_CHANGES` of the richest that it accepts.

    Raises `CheckFailed` where it accepts none.
    """
    accepted: list[Fit] = []
    first_problem = ""
    for roles in _ROLES:
        for teacher, fusion in ((False, False), (False, True), (True, True)):
            fit, problems = _fit(case, roles, teacher, fusion)
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
        changed = (_fit_changed(case, change(accepted[0]), about) for change in changes)
        result += [fit for fit in changed if fit is not None and fit.plan != accepted[0].plan][:1]
    return result


def richest(case: Case) -> Fit:
    """The richest plan that the component accepts."""
    return fits(case)[0]


def _fit(
    case: Case, roles: tuple[tuple[str, ...], tuple[str, ...]], teacher: bool, fusion: bool
) -> tuple[Fit, list[str]]:
    """Extend a plan until it has what `needs` names; returns also the remaining problems."""
    cls, config = case.cls, case.config
    plan = Plan({}, {DEFAULT_TEACHER: TeacherPlan({})} if teacher else {}, fusion)
    names: list[str] = []
    for _ in range(20):
        current = names or ["first", "second"]
        if tuple(plan.modalities) != tuple(current):
            modalities = {name: plan.modalities.get(name) or modality(roles[i % 2]) for i, name in enumerate(current)}
            plan = _seen(replace(plan, modalities=modalities))
        try:
            plan, of_heads = _with_heads(case, plan)
            needs = needs_of(cls, config, plan)
            problems = [*of_heads, *problems_of(cls, config, plan)]
        except MissingModality as error:
            names.append(error.name)
            continue
        missing = [name for name in _modalities_of(needs) if name not in plan.modalities]
        names += missing
        grown = _grow(plan, needs)
        if grown == plan and not missing:
            _require_heads(cls, needs, plan)
            return Fit(plan, needs), [*unmet(cls.name, needs, plan, set(plan.modalities)), *problems]
        plan = grown
    raise CheckFailed("`needs` names more each time the plan has what it named before")


def _fit_changed(case: Case, plan: Plan, about: str) -> Fit | None:
    """The plan, extended by what `needs` names on it; None if the component refuses it."""
    cls, config = case.cls, case.config
    for _ in range(20):
        try:
            plan, of_heads = _with_heads(case, plan)
            needs = needs_of(cls, config, plan)
            problems = [*of_heads, *problems_of(cls, config, plan), *unmet(cls.name, needs, plan, set(plan.modalities))]
        except MissingModality:
            return None
        grown = _grow(plan, needs, sees_more=False)
        if grown == plan:
            copies = all(t.parts is None for t in plan.teachers.values())  # what a recipe is refused without
            of_copies = [cls, *(slot.cls for slot in slots_in(config))]
            if not copies and (needs.teacher_heads or any(getattr(part, "teacher_modules", ()) for part in of_copies)):
                return None
            return None if problems else Fit(plan, needs, about, "all")
        plan = grown
    return None


def _with_heads(case: Case, plan: Plan) -> tuple[Plan, list[str]]:
    """The plan with the heads that the case gives, and why they refuse it. Raises `MissingModality`."""
    if case.inputs.heads is None:
        return plan, []
    heads, problems = {}, []
    for name, (cls, config) in case.inputs.heads(case.config).items():
        problems += [f"the case's head {name!r} is refused: {line}" for line in cls.problems(config, plan)]
        heads[name] = HeadPlan(cls, config, cls.needs(config, plan))
    return replace(plan, heads=heads), problems


def _require_heads(cls: type[Component], needs: Needs, plan: Plan) -> None:
    """Raises `CheckFailed` where a head is needed that the case does not give."""
    for name in (*needs.heads, *(name for of_teacher in needs.teacher_heads.values() for name in of_teacher)):
        require(
            name in plan.heads,
            f"`needs` names the head {name!r}, which only a case can give: return ConformanceCase({cls.__name__}, "
            f"heads=lambda config: {{{name!r}: (ITS CLASS, ITS OPTIONS)}}) from the hook distill_conformance_cases",
        )


def _modalities_of(needs: Needs) -> list[str]:
    """The modalities that `needs` names, without duplicates."""
    names = [
        *needs.student,
        *(modality for of_teacher in needs.teacher.values() for modality in of_teacher),
        *needs.fused,
        *needs.tokens,
        *needs.views,
        *needs.masked,
        *needs.dropped,
        *needs.extra,
    ]
    return list(dict.fromkeys(names))


Change = Callable[[Fit], Plan]


def _map_modalities(plan: Plan, change: Callable[[int, str, ModalityPlan], ModalityPlan]) -> Plan:
    """The plan with each modality (number, name, modality) changed."""
    return replace(plan, modalities={n: change(i, n, m) for i, (n, m) in enumerate(plan.modalities.items())})


def _with_third_modality(fit: Fit) -> Plan:
    return _seen(replace(fit.plan, modalities={**fit.plan.modalities, "third": modality((GLOBAL, LOCAL))}))


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
    """Each teacher sees only the modalities that `needs` names for it."""
    teachers = {
        name: replace(t, views={m: views for m, views in t.views.items() if m in fit.needs.teacher.get(name, ())})
        for name, t in fit.plan.teachers.items()
    }
    return replace(fit.plan, teachers=teachers)


def _with_wide_teacher(fit: Fit) -> Plan:
    """Teachers with widths of their own, as frozen ones have."""
    teachers = {
        name: replace(
            t,
            specs={
                m: replace(fit.plan.modalities[m].spec, width=WIDTH + 24, dim=DIM + 16, class_tokens=CLASSES)
                for m in t.views
            },
            parts=(),
        )
        for name, t in fit.plan.teachers.items()
    }
    return replace(fit.plan, teachers=teachers)


def _with_two_masks(fit: Fit) -> Plan:
    """Each masked view is seen twice."""

    def twice(_: int, __: str, m: ModalityPlan) -> ModalityPlan:
        if m.mask is None:
            return m
        return replace(m, roles=(*m.roles, *(REPEATED for _ in m.views(m.mask.role))), mask=replace(m.mask, times=2))

    return _map_modalities(fit.plan, twice)


_CHANGES: dict[str, tuple[Change, ...]] = {
    "one modality more": (_with_third_modality,),
    "widths W and D that differ between modalities": (_widths(24, 16), _widths(24, 0), _widths(0, 16)),
    "no class tokens": (_class_tokens(0),),
    "one class token": (_class_tokens(1),),
    "one modality": (_first_modality,),
    "a teacher that sees only the modalities in Needs.teacher": (_with_blind_teacher,),
    "two masks of each view": (_with_two_masks,),
    "a teacher of other widths W and D than the student's": (_with_wide_teacher,),
}
"""What is special about a plan -> changes to the richest plan; the first accepted one is used."""


def modality(roles: Sequence[str]) -> ModalityPlan:
    """A modality with tokens, and ids that a decoder might write."""
    spec = BackboneSpec(WIDTH, DIM, class_tokens=CLASSES, vocabulary=VOCABULARY, causal=True)
    return ModalityPlan(tuple(roles), spec)


def _seen(plan: Plan) -> Plan:
    """The plan, each of whose teachers sees all global views."""
    views = {name: m.views(GLOBAL) for name, m in plan.modalities.items() if m.views(GLOBAL)}
    return replace(plan, teachers={name: replace(t, views=views) for name, t in plan.teachers.items()})


def _grow(plan: Plan, needs: Needs, *, sees_more: bool = True) -> Plan:
    """The plan with the views and teachers that are needed; with `sees_more` each teacher sees all global ones."""
    modalities = {}
    for name, old in plan.modalities.items():
        roles = list(old.roles)
        for role, number in needs.views.get(name, {}).items():
            last = max((i for i, r in enumerate(roles) if r == role), default=len(roles) - 1)
            missing = number - roles.count(role)
            roles[last + 1 : last + 1] = [role] * missing
        while len(roles) <= max(needs.tokens.get(name, ()), default=-1):
            roles.insert(0, GLOBAL)
        modalities[name] = replace(
            old,
            roles=tuple(roles),
            spec=replace(
                old.spec,
                can_mask=old.spec.can_mask or name in needs.masked,
                can_drop=old.spec.can_drop or name in needs.dropped,
                stride=(1, 1) if name in needs.dropped else old.spec.stride,
                layers=max(old.spec.layers, *(layer + 1 for layer in _layers_read(needs, name)), 0),
            ),
            extras=tuple(dict.fromkeys((*old.extras, *needs.extra.get(name, ())))),
            mask=old.mask or (MaskPlan(GLOBAL, 1, True, False) if name in needs.dropped else None),
        )
    fields = {**dict.fromkeys(needs.fields, FieldPlan((), "float32")), **plan.fields}
    teachers = {**dict.fromkeys(needs.teacher, TeacherPlan({})), **plan.teachers}
    grown = Plan(modalities, teachers, plan.fusion or bool(needs.fused), fields=fields, heads=plan.heads)
    if sees_more or not teachers.keys() <= plan.teachers.keys():
        grown = _seen(grown)
    read = {
        id: {m: tuple(sorted({*t.views.get(m, ()), *needs.teacher.get(id, {}).get(m, ())})) for m in modalities}
        for id, t in grown.teachers.items()
    }
    views_of = {id: {m: views for m, views in of_teacher.items() if views} for id, of_teacher in read.items()}
    return replace(grown, teachers={id: replace(t, views=views_of[id]) for id, t in grown.teachers.items()})


def _layers_read(needs: Needs, name: str) -> tuple[int, ...]:
    """Of a modality, by the student's side or a teacher's."""
    return (*needs.layers.get(name, ()), *(x for read in needs.teacher_layers.values() for x in read.get(name, ())))


def length(plan: Plan, name: str, role: str) -> int:
    """The number of tokens L of a view, which differs by modality and role."""
    return 5 + 2 * list(plan.modalities).index(name) - (1 if role == LOCAL else 0)


def kept_tokens(plan: Plan, name: str, role: str) -> int:
    """Of so many tokens of a view, how many the student sees, L'."""
    mask, count = plan.modalities[name].mask, length(plan, name, role)
    return count - 2 if mask is not None and mask.drops and role in (mask.role, REPEATED) else count


def example_features(
    plan: Plan,
    tokens: Mapping[str, Sequence[int]],
    *,
    batch: int = BATCH,
    seed: int = 0,
    teacher: TeacherPlan | None = None,
    padding: Padding = "some",
    fill: float | None = None,
    layers: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Features]:
    """Random features of every modality, with the tokens of the views in `tokens` alone, and of these what `layers`
    give; leaves of the graph.

    `fill` is the value of padded tokens; None fills them with noise, as elsewhere. A teacher's features number its own
    views, as in `Outputs`.
    """
    draw = torch.Generator().manual_seed(seed)
    by_modality = {}
    for number, (name, modality) in enumerate(plan.modalities.items()):
        views = teacher.views.get(name, ()) if teacher is not None else tuple(range(len(modality.roles)))
        if teacher is not None and not views:
            continue
        spec = teacher.specs.get(name, modality.spec) if teacher is not None else modality.spec

        def leaf(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw).requires_grad_(teacher is None)

        tokens_by_view: dict[int, Tensor] = {}
        masks: dict[int, Tensor] = {}
        by_layer: dict[int, dict[int, Tensor]] = {layer: {} for layer in (layers or {}).get(name, ())}
        current = Features(leaf(len(views), batch, spec.dim), tokens_by_view, masks, layers=by_layer)
        if spec.class_tokens:
            current.class_tokens = leaf(len(views), batch, spec.class_tokens, spec.width)
        for view in sorted(set(tokens.get(name, ()))):
            counted = length if teacher is not None else kept_tokens
            place, count = views.index(view), counted(plan, name, modality.roles[view])
            tokens_by_view[place] = leaf(batch, count, spec.width)
            for of_layer in by_layer.values():
                of_layer[place] = leaf(batch, count, spec.width)
            if (number % 2 or padding == "all") and not modality.mask:
                ends = torch.randint(2, count, (batch, 1), generator=draw)
                masks[place] = torch.arange(count) < ends
                if fill is not None:
                    for of_view in (tokens_by_view, *by_layer.values()):
                        of_view[place].data.masked_fill_(~masks[place][..., None], fill)
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
            if modality.mask is not None and role in (modality.mask.role, REPEATED):
                order = torch.rand(shape, generator=draw).argsort(-1)
                group.x = x[:, :, None]  # a grid of one row
                group.keep, dropped = (
                    part.sort(-1).values for part in order.tensor_split([kept_tokens(plan, name, role)], -1)
                )
                if PREDICTED in extra:  # a block of two tokens, and one of the first of them alone
                    group.extra[PREDICTED] = torch.stack([dropped, dropped.where(torch.arange(2) < 1, -1)], 2)
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
        heads_called = {name: generic(head.component(head.config, plan)) for name, head in plan.heads.items()}
    of_fusion = needs_of(type(fusion), fusion.config, plan) if fusion is not None else Needs()
    fusion_tokens = of_fusion.tokens
    layers = {
        name: sorted({*needs.layers.get(name, ()), *of_fusion.layers.get(name, ())})
        for name in {**needs.layers, **of_fusion.layers}
    }
    tokens_of = {
        name: (*needs.tokens.get(name, ()), *fusion_tokens.get(name, ())) for name in {**needs.tokens, **fusion_tokens}
    }
    student = example_features(plan, tokens_of, batch=batch, seed=seed + 3, padding=padding, fill=fill, layers=layers)
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
    heads = [getattr(part, name) for _, part in losses_in(loss) for name in part.teacher_modules]
    heads += [heads_called[name] for of_teacher in needs.teacher_heads.values() for name in of_teacher]
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
            name: example_features(
                plan,
                needs.teacher.get(name, {}),
                batch=batch,
                seed=seed + 4 + number,
                teacher=teacher,
                padding=padding,
                fill=fill,
                layers=needs.teacher_layers.get(name, {}),
            )
            for number, (name, teacher) in enumerate(plan.teachers.items())
        },
        fused,
        any_fusion,
        PROGRESS,
        lambda module, teacher=DEFAULT_TEACHER: copies[id(module)],
        [str(i) for i in range(batch)],
        fields,
        heads=heads_called,
    )


def losses_in(loss: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path with a dot after it, loss) of a loss and of those inside it."""
    if loss is not None:
        yield prefix, loss
        for name, inner in loss.nested().items():
            yield from losses_in(inner, f"{prefix}{name}.")


def part(outputs: Outputs, start: int, end: int, fusion: Fusion | None) -> Outputs:
    """The rows start..end of a batch, as on the rank that holds them; they are leaves of a separate graph.

    `fusion` computes the fused features; with None they are sliced too.
    """

    def cut(x: Tensor, dim: int) -> Tensor:
        return x.detach().narrow(dim, start, end - start).clone().requires_grad_(x.requires_grad)

    def of(f: Features) -> Features:
        classes = None if f.class_tokens is None else cut(f.class_tokens, 1)
        tokens, masks = ({view: cut(x, 0) for view, x in values.items()} for values in (f.tokens, f.masks))
        layers = {layer: {view: cut(x, 0) for view, x in values.items()} for layer, values in f.layers.items()}
        return Features(cut(f.pooled, 1), tokens, masks, classes, layers)

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
    views = {name: of.part(start, end) for name, of in outputs.views.items()}
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
        tensors += [f.pooled, f.class_tokens, *f.tokens.values(), *(x for of in f.layers.values() for x in of.values())]
        tensors += [fused.pooled, fused.tokens] if fused is not None else []
    return [x for x in tensors if x is not None and x.is_leaf]
