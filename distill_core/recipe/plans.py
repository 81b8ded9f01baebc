"""What is known of a recipe before anything is built: of its components the `Plan`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from distill_core.batch import REPEATED
from distill_core.contracts.masker import Masker
from distill_core.contracts.nested import needs_of
from distill_core.contracts.optional import TokenPooling
from distill_core.contracts.raw import Raw
from distill_core.contracts.slot import Slot
from distill_core.contracts.teacher import Teacher
from distill_core.data.fields import FieldConfig
from distill_core.errors import KeyPath, UserError
from distill_core.interfaces import Augmentation, Backbone, FusionHead, Head, JointAugmentation, JointTower
from distill_core.plan import (
    DEFAULT_FUSION,
    DEFAULT_TEACHER,
    FieldPlan,
    HeadPlan,
    MaskPlan,
    MissingModality,
    ModalityPlan,
    Needs,
    Plan,
    TeacherPlan,
    joined,
)

Refuse = Callable[[KeyPath, str], None]
"""Takes the place in the recipe and a message of each thing that is wrong; the plan is then made of the rest."""


@dataclass(frozen=True)
class Parts:
    """What a plan is made of, by the names that the recipe gives. None stands for what is wrong by itself: how much it
    would bring is not known."""

    augment: Mapping[str, Slot[Augmentation] | None]
    joint: Mapping[str, Slot[JointAugmentation] | None]
    backbone: Mapping[str, Slot[Backbone] | None]
    masker: Mapping[str, Slot[Masker]]
    fusions: Mapping[str, Slot[FusionHead] | None]
    """By name; the section `fusion` is `default`."""
    heads: Mapping[str, Slot[Head]]
    teachers: Mapping[str, Slot[Teacher] | None]
    fields: Mapping[str, FieldConfig]
    optional: Collection[str]


def plan_of(parts: Parts, refuse: Refuse) -> Plan:
    """The plan of what is right."""
    modalities = _modalities(parts, refuse)
    modalities |= _joint_views(parts, modalities, refuse)
    raw = {name: modalities.pop(name) for name in [*modalities] if is_raw(parts.backbone[name])}
    towers = _joint_towers(parts, modalities | raw, refuse)
    modalities |= {name: _masked(modalities[name], slot) for name, slot in parts.masker.items() if name in modalities}
    modalities |= towers
    fusions = {name: _pools(slot) for name, slot in parts.fusions.items()}
    plan = Plan(
        modalities,
        _teachers(parts, modalities, refuse),
        DEFAULT_FUSION in fusions,
        fusions.pop(DEFAULT_FUSION, True),
        {name: FieldPlan(of.shape, of.dtype, name in parts.optional) for name, of in parts.fields.items()},
        fusions,
        raw=raw,
        complete={*modalities, *raw} == {*parts.augment, *parts.backbone},
    )
    return replace(plan, heads={name: _head(slot, plan) for name, slot in parts.heads.items()})


def _modalities(parts: Parts, refuse: Refuse) -> dict[str, ModalityPlan]:
    """Each modality as its own augmentation makes it, with a tower or without."""
    plans = {}
    for name, augment in parts.augment.items():
        backbone = parts.backbone.get(name)
        if augment is None or backbone is None:
            continue
        try:
            plan = ModalityPlan(
                roles=augment.cls.roles(augment.config),
                spec=backbone.cls.spec(backbone.config),
                augment=augment.config,
                shapes=augment.cls.shapes(augment.config),
                extras=augment.cls.extras(augment.config),
                optional=name in parts.optional,
            )
        except UserError as error:  # a backbone that cannot tell its widths
            refuse(("backbone", name), str(error))
            continue
        if _together(augment, plan, refuse):
            plans[name] = plan
    return plans


def _joint_views(parts: Parts, own: Mapping[str, ModalityPlan], refuse: Refuse) -> dict[str, ModalityPlan]:
    """The modalities that a joint augmentation makes, in place of their own plans."""
    changed: dict[str, ModalityPlan] = {}
    for key, slot in parts.joint.items():
        names = joined(key)
        if slot is None or not own.keys() >= {*names}:
            continue
        before = {name: changed.get(name, own[name]) for name in names}
        try:
            plans = slot.cls.plans(slot.config, before)
        except ValueError as error:
            refuse(slot.place, f"{slot.cls.name!r}: {error}")
            continue
        for name in names:
            changed[name] = replace(plans[name], joint=key)
            _together(slot, changed[name], refuse)
            if changed[name].roles != before[name].roles and any(plan.optional for plan in plans.values()):
                line = f"makes views of {name!r} that its own augmentation does not, and data.optional lets samples"
                refuse(slot.place, f"{slot.cls.name!r} {line} lack one of its modalities")
    return changed


def _together(augment: Slot[Any], plan: ModalityPlan, refuse: Refuse) -> bool:
    """Whether the views of each role follow one another."""
    roles = plan.roles
    starts = [role for i, role in enumerate(roles) if i == 0 or role != roles[i - 1]]
    if len(starts) == len(set(roles)):
        return True
    line = f"makes views in the order {', '.join(roles)}; each role must be together"
    refuse(augment.place, f"{augment.cls.name!r} {line}")
    return False


def _joint_towers(parts: Parts, modalities: Mapping[str, ModalityPlan], refuse: Refuse) -> dict[str, ModalityPlan]:
    """What each tower of several modalities reads as one."""
    plans = {}
    for key in joint_towers(parts.backbone):
        slot = parts.backbone[key]
        if slot is None or not issubclass(slot.cls, JointTower) or not modalities.keys() >= {*joined(key)}:
            continue
        try:
            plans[key] = _joint_tower(slot, {name: modalities[name] for name in joined(key)})
        except UserError as error:
            refuse(slot.place, str(error))
    return plans


def _joint_tower(slot: Slot[Backbone], parts: Mapping[str, ModalityPlan]) -> ModalityPlan:
    """Raises `UserError` where the views of its modalities do not pair."""
    roles: list[str] = []
    for role in slot.config.views:
        counts = {name: len(part.views(role)) for name, part in parts.items()}
        if len(set(counts.values())) > 1 or 0 in counts.values():
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise UserError(f"{slot.cls.name!r} pairs the {role} views of its modalities, of which there are {listed}")
        roles += [role] * next(iter(counts.values()))
    optional = any(part.optional for part in parts.values())
    return ModalityPlan(tuple(roles), slot.cls.spec(slot.config), optional=optional, parts=parts)


def _masked(plan: ModalityPlan, masker: Slot[Masker]) -> ModalityPlan:
    """With the views that the student sees of a modality that is masked."""
    role, times = masker.config.role, masker.cls.times(masker.config)
    own = plan.views(role) * (times - 1)
    return replace(
        plan,
        roles=(*plan.roles, *(REPEATED for _ in own)),
        shapes=None if plan.shapes is None else (*plan.shapes, *(plan.shapes[view] for view in own)),
        extras=(*plan.extras, *masker.cls.extras(masker.config)),
        mask=MaskPlan(role, times, masker.cls.drops, masker.cls.hides),
    )


def _teachers(parts: Parts, modalities: Mapping[str, ModalityPlan], refuse: Refuse) -> dict[str, TeacherPlan]:
    plans: dict[str, TeacherPlan] = {}
    # one that is not known sees everything: what it might lack is no error of the parts that read it
    everything = TeacherPlan({name: tuple(range(len(modality.roles))) for name, modality in modalities.items()})
    for name, slot in parts.teachers.items():
        source = slot.cls.source(slot.config) if slot is not None else None
        if source in parts.teachers and source not in plans:
            place = (*teacher_place(name), "source")
            refuse(place, f"the teacher {source!r} must stand before the one that copies it")
        try:
            plans[name] = everything if slot is None else _teacher(slot, modalities, plans)
        except UserError as error:
            refuse(teacher_place(name), str(error))
            plans[name] = everything
    return plans


def _teacher(
    teacher: Slot[Teacher], modalities: Mapping[str, ModalityPlan], before: Mapping[str, TeacherPlan]
) -> TeacherPlan:
    """What a teacher encodes of these modalities; `before` has the teachers that stand before it. Raises `UserError`
    where its backbones cannot tell their widths."""
    config = teacher.config
    specs = teacher.cls.specs(config, {name: modality.spec for name, modality in modalities.items()})
    views: dict[str, tuple[int, ...]] = {}
    for name, modality in modalities.items():
        own = tuple(i for i, role in enumerate(modality.roles) if role in config.views)
        if own and name in specs and (config.modalities is None or name in config.modalities):
            views[name] = own
    parts, source = teacher.cls.parts(config), before.get(teacher.cls.source(config) or "")
    if parts is None and source is not None:
        parts = source.parts  # it can have no others
    return TeacherPlan(views, {name: specs[name] for name in views}, parts)


def _head(head: Slot[Head], plan: Plan) -> HeadPlan:
    try:
        needs = needs_of(head.cls, head.config, plan)
    except MissingModality:  # which is reported where the head is asked for its needs
        needs = Needs()
    return HeadPlan(head.cls, head.config, needs)


def _pools(fusion: Slot[FusionHead] | None) -> bool:
    """Whether a loss may call `TokenPooling.pool` of the fusion; True where the fusion is not known."""
    return fusion is None or issubclass(fusion.cls, TokenPooling)


def teacher_place(name: str) -> KeyPath:
    """Where a recipe has the teacher of this name."""
    return ("teacher",) if name == DEFAULT_TEACHER else ("teachers", name)


def is_raw(backbone: Slot[Backbone] | None) -> bool:
    """Whether its modality is only collated."""
    return backbone is not None and issubclass(backbone.cls, Raw)


def joint_towers(names: Iterable[str]) -> list[str]:
    """The keys of `backbone` that name several modalities."""
    return [key for key in names if len(joined(key)) > 1]
