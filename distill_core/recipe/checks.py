"""Checks what the parts of a recipe need of one another, before anything is built.

Where parts of a recipe are invalid by themselves, the checks continue with the valid rest (`Draft`), so that a user
sees all errors at once; no check reports what only follows from another error.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError

from distill_core.batch import REPEATED
from distill_core.contracts.component import ComponentConfig
from distill_core.contracts.masker import Masker
from distill_core.contracts.nested import needs_of, seen_by
from distill_core.contracts.shared import SharedSlot, build_all, unknown_parts
from distill_core.contracts.slot import Context, Slot, is_word
from distill_core.contracts.teacher import Teacher
from distill_core.data.fields import FieldConfig
from distill_core.errors import KeyPath, UserError, did_you_mean
from distill_core.interfaces import JointAugmentation, JointTower, Loss
from distill_core.plan import (
    DEFAULT_FUSION,
    DEFAULT_TEACHER,
    BackboneSpec,
    HeadPlan,
    MissingModality,
    ModalityPlan,
    Needs,
    Plan,
    TeacherPlan,
    joined,
)
from distill_core.recipe.document import Document
from distill_core.recipe.sections import (
    EvaluateConfig,
    Recipe,
    TrainConfig,
    changes,
    field_plans,
    head_plan,
    is_raw,
    joint_plans,
    joint_tower_plan,
    joint_towers,
    masked_plan,
    modality_plan,
    pools,
    teacher_plan,
)
from distill_core.recipe.splits import split_problems
from distill_core.registry import Registry
from distill_core.teachers.copies import CopiedTeacher
from distill_core.teachers.own_views import with_others

Problem = tuple[KeyPath, str]
"""(place in the recipe, message)"""
Section = TypeVar("Section", bound=ComponentConfig)


@dataclass(frozen=True)
class Draft:
    """A recipe, or the parts of it that are valid by themselves."""

    document: Document
    """The recipe as written."""
    slots: Mapping[KeyPath, Slot[Any]]
    """The valid components, by path."""
    train: TrainConfig
    evaluate: EvaluateConfig
    """In `train` and `evaluate`, invalid options have their defaults."""
    teachers: Mapping[KeyPath, Slot[Teacher] | None]
    """Those that the document names; their invalid options have their defaults. None: it is not known which."""
    wrong: Collection[KeyPath] = ()
    """Paths of the parts that are invalid by themselves."""

    @classmethod
    def of(cls, recipe: Recipe, document: Document, slots: Mapping[KeyPath, Slot[Any]]) -> Draft:
        """The draft of a recipe whose parts are all valid."""
        return cls(document, slots, recipe.train, recipe.evaluate, {at: slots[at] for at in _teacher_places(document)})

    @classmethod
    def without(
        cls, wrong: Collection[KeyPath], document: Document, slots: Mapping[KeyPath, Slot[Any]], registry: Registry
    ) -> Draft:
        """The draft of a recipe in which the parts `wrong` are invalid."""

        def section(model: type[Section], name: str) -> Section:
            options = document.get((name,))
            right = {
                key: value
                for key, value in (options.items() if isinstance(options, dict) else ())
                if not any(path[:2] == (name, key) for path in wrong)
            }
            return model.model_validate_json(json.dumps(right), context=Context(registry))

        def teacher(at: KeyPath) -> Slot[Teacher] | None:
            options = document.get(at)
            if at in slots or not isinstance(options, dict):
                return slots.get(at)
            right = {k: v for k, v in options.items() if not any(path[: len(at) + 1] == (*at, k) for path in wrong)}
            try:
                slot: Slot[Teacher] = TypeAdapter(Slot[Teacher]).validate_python(right, context=Context(registry))
            except ValidationError:
                return None
            return slot

        teachers = {at: teacher(at) for at in _teacher_places(document)}
        return cls(document, slots, section(TrainConfig, "train"), section(EvaluateConfig, "evaluate"), teachers, wrong)

    def names(self, *section: str) -> list[str]:
        """The keys of a mapping in the document."""
        holder = self.document.get(section)
        return list(holder) if isinstance(holder, dict) else []

    @property
    def optional(self) -> list[str]:
        """The modalities that a sample may lack."""
        names = self.document.get(("data", "optional"))
        return [str(name) for name in names] if isinstance(names, list) else []

    @property
    def modalities(self) -> list[str]:
        """All modalities that the document names."""
        names = [*self.names("augment"), *self.names("backbone")]
        return [name for name in dict.fromkeys(names) if name not in self.joint or name in self.joint_towers]

    @property
    def joint_towers(self) -> list[str]:
        """The keys of `backbone` that name several modalities."""
        return joint_towers(self.names("backbone"))

    @property
    def joint(self) -> list[str]:
        """The keys of `augment` that name several modalities."""
        return [key for key in self.names("augment") if len(joined(key)) > 1]

    def is_wrong(self, *path: str) -> bool:
        """Whether there is an error at this path or below it."""
        return any(other[: len(path)] == path for other in self.wrong)


def _teacher_places(document: Document) -> list[KeyPath]:
    """Where the document names a teacher."""
    others = document.get(("teachers",))
    default: list[KeyPath] = [("teacher",)] if document.get(("teacher",)) is not None else []
    return [*default, *(("teachers", name) for name in (others if isinstance(others, dict) else ()))]


def _teacher_name(at: KeyPath) -> str:
    return DEFAULT_TEACHER if at == ("teacher",) else str(at[-1])


def _teacher_place(name: str) -> KeyPath:
    return ("teacher",) if name == DEFAULT_TEACHER else ("teachers", name)


def problems(draft: Draft) -> Iterator[Problem]:
    """Every unmet need of one part of a recipe in another."""
    yield from _ids(draft)
    yield from _modalities(draft)
    yield from _head_names(draft)
    plan = yield from _plan(draft)
    yield from _components(draft, plan)
    yield from _training(draft)
    yield from split_problems(draft.slots, draft.evaluate)
    yield from _part_names(draft)


def _ids(draft: Draft) -> Iterator[Problem]:
    """Losses, hooks and tasks with the same id."""
    for section in (("loss",), ("hooks",), ("evaluate", "tasks")):
        ids = set()
        for path, slot in draft.slots.items():
            if path[:-1] == section:
                if slot.id in ids:
                    yield path, f"a second {slot.id!r}: give it an `id:` of its own"
                ids.add(slot.id)


def _modalities(draft: Draft) -> Iterator[Problem]:
    for one, other in (("augment", "backbone"), ("backbone", "augment")):
        for name in draft.names(one):
            if len(joined(name)) > 1:
                continue
            if isinstance(draft.document.get((other,)), dict) and name not in draft.names(other):
                yield (one, name), f"{name!r} has no entry in {other}; a modality needs both"
            if not is_word(name):
                yield (one, name), "a modality is a word of letters, digits, - and _"
            if one == "augment" and _is_joint(draft, name):
                line = f"makes views of several modalities at once: write them as its key, {name}+OTHER"
                yield (one, name), f"{draft.slots[one, name].cls.name!r} {line}"
    yield from _joint(draft)
    yield from _joint_towers(draft)
    for name in draft.names("masker"):
        if name in draft.joint_towers:
            parts = " or ".join(f"masker.{part}" for part in joined(name))
            yield ("masker", name), f"a tower of several modalities sees every token; mask one of them: {parts}"
        elif name not in draft.modalities:
            yield ("masker", name), f"no modality {name!r}{did_you_mean(name, draft.modalities)}"
    for name in draft.names("fusions"):
        if name == DEFAULT_FUSION:
            yield ("fusions", name), f"{name!r} is the name of the section `fusion`; choose another"
        elif not is_word(name):
            yield ("fusions", name), "a fusion's name is a word of letters, digits, - and _"
    for at, slot in draft.teachers.items():
        id = _teacher_name(at)
        if at != ("teacher",) and id == DEFAULT_TEACHER:
            yield at, f"{id!r} is the name of the section `teacher`; choose another"
        elif not is_word(id):
            yield at, "a teacher's name is a word of letters, digits, - and _"
        for name in (slot.config.modalities or ()) if slot is not None else ():
            if name not in draft.modalities:
                yield (*at, "modalities"), f"no modality {name!r}"
            elif (tower := draft.slots.get(("backbone", name))) is not None and is_raw(tower):
                yield (*at, "modalities"), f"{name!r} is only collated (it has no tower)"
    fields = draft.names("data", "fields")
    for name in fields:
        if name in draft.modalities:
            yield ("data", "fields", name), f"{name!r} is a modality: give the field a name of its own"
    for name in draft.optional:
        if name in draft.joint_towers:
            parts = " and ".join(joined(name))
            yield ("data", "optional"), f"{name!r} is read where a sample has {parts}: name one of these"
        elif name not in draft.modalities and name not in fields:
            near = did_you_mean(name, [*draft.modalities, *fields])
            yield ("data", "optional"), f"no modality or field {name!r}{near}"


def _head_names(draft: Draft) -> Iterator[Problem]:
    for name in draft.names("heads"):
        if not is_word(name):
            yield ("heads", name), "a head's name is a word of letters, digits, - and _"


def _joint_towers(draft: Draft) -> Iterator[Problem]:
    """The keys of `backbone` that name several modalities."""
    for name in draft.names("backbone"):
        slot, names = draft.slots.get(("backbone", name)), joined(name)
        if slot is not None and issubclass(slot.cls, JointTower) != (len(names) > 1):
            line = "several modalities at once: write them as its key, NAME+OTHER"
            if len(names) > 1:
                line = f"one modality, and {name!r} names several"
            yield slot.place, f"{slot.cls.name!r} reads {line}"
        if len(set(names)) < len(names):
            yield ("backbone", name), f"{name!r} names a modality twice"
        for part in dict.fromkeys(names) if len(names) > 1 else ():
            if part not in draft.names("backbone"):
                line = f"no entry {part!r} in backbone, which collates its views: a tower of its own, or `raw`"
                yield ("backbone", name), line


def _is_joint(draft: Draft, key: str) -> bool:
    slot = draft.slots.get(("augment", key))
    return slot is not None and issubclass(slot.cls, JointAugmentation)


def _joint(draft: Draft) -> Iterator[Problem]:
    """The keys of `augment` that name several modalities."""
    named: dict[str, str] = {}
    for key in draft.joint:
        place, names = ("augment", key), joined(key)
        if place in draft.slots and not _is_joint(draft, key):
            yield place, f"{draft.slots[place].cls.name!r} makes the views of one modality, and {key!r} names several"
        if len(set(names)) < len(names):
            yield place, f"{key!r} names a modality twice"
        for name in dict.fromkeys(names):
            if name not in draft.names("augment"):
                yield place, f"no augmentation of {name!r}: give it an entry of its own, which this one builds on"
        if taken := [name for name in names if named.setdefault(name, key) != key]:
            others = ", ".join(map(repr, dict.fromkeys(named[name] for name in taken)))
            yield place, f"views of {', '.join(map(repr, taken))} are made by {others} already"


def _plan(draft: Draft) -> Generator[Problem, None, Plan]:
    """Returns the plan of those modalities whose augmentation and backbone are valid."""
    modalities: dict[str, ModalityPlan] = {}
    for name in draft.modalities:
        augment, backbone = draft.slots.get(("augment", name)), draft.slots.get(("backbone", name))
        if augment is None or backbone is None or _is_joint(draft, name):
            continue
        try:
            modality = modality_plan(augment, backbone, name in draft.optional)
        except UserError as error:
            yield ("backbone", name), str(error)
            continue
        if problem := _scattered(augment, modality):
            yield augment.place, problem
            continue
        modalities[name] = modality
    for key in draft.joint:
        if not (_is_joint(draft, key) and all(name in modalities for name in joined(key))):
            continue
        slot = draft.slots["augment", key]
        try:
            plans = joint_plans(key, slot, modalities)
        except UserError as error:
            yield slot.place, str(error)
            continue
        for name, modality in plans.items():
            if problem := _scattered(slot, modality):
                yield slot.place, problem
            if modality.roles != modalities[name].roles and any(other.optional for other in plans.values()):
                line = f"makes views of {name!r} that its own augmentation does not, and data.optional lets samples"
                yield slot.place, f"{slot.cls.name!r} {line} lack one of its modalities"
        modalities |= plans
    raw = {name: modalities.pop(name) for name in [*modalities] if is_raw(draft.slots["backbone", name])}
    for name in raw:
        if (masker := draft.slots.get(("masker", name))) is not None:
            yield masker.place, f"{name!r} is only collated: there is no tower to hide its tokens from"
    together: dict[str, ModalityPlan] = {}
    for key in draft.joint_towers:
        tower = draft.slots.get(("backbone", key))
        if tower is None or not issubclass(tower.cls, JointTower) or not {*joined(key)} <= {*modalities, *raw}:
            continue
        try:
            together[key] = joint_tower_plan(key, tower, modalities | raw)
        except UserError as error:
            yield tower.place, str(error)
    for name in modalities:
        if (masker := draft.slots.get(("masker", name))) is not None:
            modalities[name] = masked_plan(modalities[name], masker)
    modalities |= together
    fusion = draft.document.get(("fusion",)) is not None
    complete = {*modalities, *raw} == set(draft.modalities)
    fields = {
        name: FieldConfig.model_validate_json(json.dumps(draft.document.get(("data", "fields", name))))
        for name in draft.names("data", "fields")
        if not draft.is_wrong("data", "fields", name)
    }
    teachers: dict[str, TeacherPlan] = {}
    for at, teacher in draft.teachers.items():
        # one that is not known sees everything: what it might lack is no error of the parts that read it
        plan = TeacherPlan({name: tuple(range(len(modality.roles))) for name, modality in modalities.items()})
        try:
            plan = teacher_plan(teacher, modalities, teachers) if teacher is not None else plan
        except UserError as error:
            yield at, str(error)
        teachers[_teacher_name(at)] = plan
    pooling = pools(draft.slots.get(("fusion",)))
    named = {name: pools(draft.slots.get(("fusions", name))) for name in draft.names("fusions")}
    of_fields = field_plans(fields, draft.optional)
    whole = Plan(modalities, teachers, fusion, pooling, of_fields, fusions=named, raw=raw, complete=complete)
    heads: dict[str, HeadPlan] = {}
    for name in draft.names("heads"):
        if (head := draft.slots.get(("heads", name))) is not None:
            try:
                heads[name] = head_plan(head, whole)
            except MissingModality:  # which `_components` reports
                heads[name] = HeadPlan(head.cls, head.config, Needs())
    return replace(whole, heads=heads)


def _scattered(augment: Slot[Any], modality: ModalityPlan) -> str | None:
    """What is wrong where views of a role are not together."""
    roles = modality.roles
    if len([role for i, role in enumerate(roles) if i == 0 or role != roles[i - 1]]) == len(set(roles)):
        return None
    return f"{augment.cls.name!r} makes views in the order {', '.join(roles)}; each role must be together"


def _components(draft: Draft, plan: Plan) -> Iterator[Problem]:
    """Problems that each component reports about the plan."""
    every, encoded = plan, {**plan.modalities, **plan.raw}
    for path, slot in draft.slots.items():
        outer = _outermost(draft, path, slot)
        plan = seen_by(outer.cls, outer.config, every)
        try:
            needs = slot.cls.needs(slot.config, plan)
            lines = list(slot.cls.problems(slot.config, plan))
            if path[0] == "backbone" and path[1:] and (views := encoded.get(str(path[1]))) is not None:
                lines += slot.cls.view_problems(slot.config, views)
            if issubclass(slot.cls, Masker) and path[1:] and path[1] in plan.modalities:
                needs = slot.cls.reads(slot.config, str(path[1]), plan)
                lines += mask_problems(slot.cls, slot.config, str(path[1]), plan.modalities[str(path[1])])
        except MissingModality as error:
            if error.name in plan.raw:
                yield (
                    path,
                    f"{slot.id!r} needs the embedding of {error.name!r}, which is only collated (it has no tower)",
                )
            elif error.name not in draft.modalities:
                near = did_you_mean(error.name, draft.modalities)
                yield path, f"{slot.id!r} needs a modality {error.name!r}{near}"
            continue
        if issubclass(slot.cls, CopiedTeacher):
            for name, own in slot.cls.own_views(slot.config, plan).items():
                tower = draft.slots[("backbone", name)]
                views = with_others(own, plan.modalities[name], slot.config.views)
                reasons = tower.cls.view_problems(tower.config, views)
                lines += (f"{slot.cls.name!r}: augment.{name}: {reason}" for reason in reasons)
        if issubclass(slot.cls, Teacher) and slot.config.cache is not None and not slot.cls.cacheable(slot.config):
            lines.append(
                f"{slot.cls.name!r}: cache: only what a teacher makes of its views alone can be written before the run "
                "(`frozen`), and this one changes with the student, or is read already; leave `cache` out"
            )
        inside = (needs.teacher_layers, needs.attention)
        for name in dict.fromkeys(name for of in inside for name, read in of.items() if any(read.values())):
            if (teacher := draft.teachers.get(_teacher_place(name))) is not None and teacher.config.cache is not None:
                lines.append(
                    f"{slot.id!r} reads layers or the attention of the teacher {name!r}, which its cache lacks; "
                    "leave `cache` out"
                )
        if issubclass(slot.cls, Teacher) and REPEATED in slot.config.views:
            lines.append(f"{slot.cls.name!r}: views: only the student sees a view a second time ({REPEATED!r})")
        if isinstance(slot, SharedSlot) and slot.own and draft.train.parallel.shard != 1:
            lines.append(
                f"shares all of {slot.same!r} but its `own` parts, which train.parallel.shard cannot split over ranks; "
                "make it 1, or share the tower whole"
            )
        if needs.attention and draft.train.parallel.shard != 1:
            lines.append(
                f"{slot.id!r} reads how a teacher attends, which train.parallel.shard does not allow; make it 1"
            )
        if issubclass(slot.cls, Loss):
            lines += _fusion_problems(draft, path, slot, needs_of(slot.cls, slot.config, every), every)
            lines += absence_problems(slot.cls, needs_of(slot.cls, slot.config, plan), plan)
            lines += _uncopied(draft, slot, needs, plan)
            of_teachers = any(views for of_teacher in needs.teacher.values() for views in of_teacher.values())
            of_heads = any(plan.heads[head].needs.tokens for head in needs.heads if head in plan.heads)
            reads_tokens = needs.tokens or of_teachers or of_heads or needs.pools or needs.attention
            if draft.train.parallel.micro_batch is not None and reads_tokens:
                lines.append(f"{slot.id!r} reads tokens, which train.parallel.micro_batch does not keep; make it null")
        lines += head_problems(slot.cls.name, needs, plan, draft.names("heads"))
        lines += unknown_fields(slot.cls.name, needs, draft.names("data", "fields"))
        for problem in [*unmet(slot.cls.name, needs, plan, set(draft.modalities)), *lines]:
            yield path, problem


def _outermost(draft: Draft, path: KeyPath, slot: Slot[Any]) -> Slot[Any]:
    """The loss in whose options a component stands, whose fusion is read in all of them; of any other, itself."""
    outer = draft.slots.get(path[:2], slot)
    return outer if issubclass(outer.cls, Loss) else slot


def _fusion_problems(draft: Draft, path: KeyPath, slot: Slot[Any], needs: Needs, plan: Plan) -> Iterator[str]:
    """A fusion that a loss names and there is not, or does not read; another one than the loss around it reads."""
    name, there = slot.config.fusion, [DEFAULT_FUSION, *plan.fusions]
    outer = _outermost(draft, path, slot)
    if outer is not slot:
        if name not in (DEFAULT_FUSION, outer.config.fusion):
            yield f"{slot.id!r} reads the fusion of the loss around it, {outer.id!r}: give its `fusion` there"
    elif name not in there:
        yield f"{slot.id!r}: no fusion {name!r}{did_you_mean(name, there)}"
    elif name != DEFAULT_FUSION and not needs.fused and not needs.pools:
        yield f"{slot.id!r} reads no fused views: leave its `fusion` out"


def mask_problems(cls: type[Masker], config: Any, name: str, modality: ModalityPlan) -> Iterator[str]:
    """Why a masker cannot mask the views of this modality."""
    have, spec = sorted(set(modality.roles) - {REPEATED}), modality.spec
    if config.role not in have:
        yield f"{cls.name!r}: role: no view of {name!r} has the role {config.role!r}{did_you_mean(config.role, have)}"
    if cls.drops and not spec.can_drop:
        yield f"{cls.name!r} drops tokens of {name!r}, which backbone.{name} cannot: take another masker or backbone"
    if cls.hides and not spec.can_mask:
        way = f"add `{spec.mask_option}` to its options" if spec.mask_option else "take another masker or backbone"
        yield f"{cls.name!r} hides tokens of {name!r}, which backbone.{name} cannot: {way}"
    if not spec.stride:
        yield f"{cls.name!r} needs tokens in a grid; the backbone of {name!r} does not say how they lie (`stride`)"
    elif modality.shapes is not None:
        for grid in dict.fromkeys(spec.grid(modality.shapes[view]) for view in modality.views(config.role)):
            yield from cls.grid_problems(config, grid)


def head_problems(name: str, needs: Needs, plan: Plan, heads: Collection[str]) -> Iterator[str]:
    """What is wrong with the heads that component `name` calls; `heads` has all that the recipe names."""
    for head in dict.fromkeys((*needs.heads, *(head for of in needs.teacher_heads.values() for head in of))):
        if head not in heads:
            near = did_you_mean(head, sorted(heads)) if heads else "; this recipe has no `heads`"
            yield f"{name!r} needs a head {head!r}{near}"
    for teacher, copied in needs.teacher_heads.items():
        known = plan.teachers.get(teacher)
        for head in copied:
            if known is not None and head in heads and not known.copies(f"heads.{head}"):
                yield (
                    f"{name!r} needs a copy of the head {head!r}, which the teacher {teacher!r} has not: take a "
                    f"teacher that copies (`ema`), with heads.{head} in its `of`, if that is given"
                )


def unknown_fields(name: str, needs: Needs, fields: Sequence[str]) -> Iterator[str]:
    """A line for each field that component `name` needs and `data.fields` does not give."""
    for field in needs.fields:
        if field not in fields:
            near = did_you_mean(field, fields) if fields else ""
            yield (
                f"{name!r} needs the field {field!r} of each sample{near}; say where it stands: data.fields: "
                f"{{{field}: {{member: npy}}}}"
            )


def absence_problems(loss: type[Loss], needs: Needs, plan: Plan) -> Iterator[str]:
    """What is wrong where a loss needs all samples of a modality that some may lack."""
    names = (needs.named or set(plan.modalities)) | set(needs.fields)
    optional = sorted(names & plan.optional)
    if optional and not loss.partial:
        some = " and ".join(repr(name) for name in optional)
        yield (
            f"{loss.name!r} needs {some} of every sample, and data.optional lets some lack it: take a loss that can do "
            f"without those samples (`partial`), or leave {some} out of data.optional, which skips them"
        )


def _uncopied(draft: Draft, slot: Slot[Any], needs: Needs, plan: Plan) -> Iterator[str]:
    """Heads of which a loss reads a teacher's copy, where that teacher has none."""
    outer = draft.slots.get(slot.place[:2], slot)
    path = ".".join(("loss", outer.id, *map(str, slot.place[2:])))
    for head in slot.cls.teacher_modules:
        for name in needs.teacher:
            if name in plan.teachers and not plan.teachers[name].copies(f"{path}.{head}"):
                yield (
                    f"{slot.cls.name!r} needs a copy of its {head!r}, which the teacher {name!r} has not: take a "
                    f"teacher that copies (`ema`), with {path}.{head} in its `of`, if that is given"
                )


def _training(draft: Draft) -> Iterator[Problem]:
    """The length of the run, and the score that its best checkpoint is kept by."""
    train = draft.train
    written = isinstance(draft.document.get(("train",)), dict)
    wrong = draft.is_wrong("train", "steps") or draft.is_wrong("train", "epochs")
    if written and train.steps is None and train.epochs is None and not wrong:
        yield ("train",), "give `steps` or `epochs`"
    if train.parallel.micro_batch is not None and draft.optional:
        yield ("train", "parallel", "micro_batch"), "samples that may lack a modality (data.optional) train at once"
    if train.checkpoint.best is None:
        return
    if draft.evaluate.every is None and not draft.is_wrong("evaluate", "every"):
        yield ("train", "checkpoint", "best"), "needs `evaluate.every`: scores on the validation split"


def unknown_score(draft: Draft) -> str | None:
    """What is wrong with `train.checkpoint.best`, the address SIDE/TASK/NAME of a mean, where the tasks tell theirs. A
    score of one set, SIDE/TASK/SET/NAME, is known when it has been given."""
    best = draft.train.checkpoint.best
    if best is None or draft.evaluate.every is None or draft.is_wrong("evaluate", "tasks"):
        return None
    known: list[str] = []
    tasks = [slot for path, slot in draft.slots.items() if path[:-1] == ("evaluate", "tasks")]
    for side in ("student", "teacher") if ("teacher",) in draft.teachers else ("student",):
        for task in tasks:
            names, address = task.cls.means(task.config), f"{side}/{task.id}/"
            if best.startswith(address) and (names is None or "/" in best.removeprefix(address)):
                return None
            known += [address + name for name in names] if names is not None else [address + "..."]
    if best in known:
        return None
    near = get_close_matches(best, known, n=1)
    hint = f", did you mean {near[0]!r}?" if near else "."
    there = f"The means over sets: {', '.join(known)}" if known else "There is no task in evaluate.tasks"
    return f"no score {best!r}{hint} {there}"


def _part_names(draft: Draft) -> Iterator[Problem]:
    """Paths in `freeze` and `train.lr_factors`, as far as the document names the parts of the model; the backbones in
    `train.lr_decay`."""
    backbones = [f"backbone.{name}" for name in draft.names("backbone")]
    shared = {
        f"backbone.{path[1]}": slot
        for path, slot in draft.slots.items()
        if path[:1] == ("backbone",) and isinstance(slot, SharedSlot) and not slot.own
    }
    for part in draft.train.lr_decay:
        if part in shared:
            yield ("train", "lr_decay", part), _elsewhere(part, shared[part])
        elif part not in backbones:
            yield ("train", "lr_decay", part), f"{part!r} is no backbone{did_you_mean(part, backbones)}"
    losses = [slot.id for path, slot in draft.slots.items() if path[:-1] == ("loss",)]
    parts = [f"backbone.{name}" for name in draft.names("backbone")] + [f"loss.{name}" for name in losses]
    parts += [f"{kind}.{name}" for kind in ("fusions", "heads") for name in draft.names(kind)]
    single = [part for part in ("fusion", "balance") if draft.document.get((part,)) is not None]
    parts += [*single, "backbone", "fusions", "heads", "loss"]
    losses_are_wrong = draft.is_wrong("loss")
    for at, part in _listed_parts(draft.document.get(("freeze",)), draft.train.lr_factors):
        whole = ".".join(part.split(".")[:2])
        if whole in shared:
            yield at, _elsewhere(whole, shared[whole])
            continue
        depth = 1 if part.startswith(("fusion.", "balance.")) else 2
        name = part if part in parts else ".".join(part.split(".")[:depth])
        if name not in parts and not (losses_are_wrong and part.startswith("loss.")):
            yield at, f"{part!r} names no part of the model{did_you_mean(part, parts)}"


def _elsewhere(part: str, slot: SharedSlot[Any]) -> str:
    return f"the tower of {part!r} is that of another modality: name backbone.{slot.same}"


def _listed_parts(freeze: Any, factors: Mapping[str, float]) -> Iterator[tuple[KeyPath, str]]:
    """(place in the recipe, path of a part of the model)."""
    for i, part in enumerate(freeze if isinstance(freeze, list) else ()):
        if isinstance(part, str):
            yield ("freeze", i), part
    for part in factors:
        yield ("train", "lr_factors", part), part


def part_problems(recipe: Recipe) -> tuple[list[Problem], list[str]]:
    """What is wrong with the paths in `freeze`, `train.lr_factors` and `train.lr_decay`, by the model itself, which is
    built without memory; and a warning where it cannot be."""
    from distill_core.recipe.build import build_objective

    shared = {m: slot for m, slot in recipe.backbone.items() if isinstance(slot, SharedSlot) and slot.own}
    if not recipe.freeze and not recipe.train.lr_factors and not recipe.train.lr_decay and not shared:
        return [], []
    try:
        with torch.device("meta"):
            towers = build_all(recipe.backbone, {slot.same for slot in shared.values()})
            wrong = [(m, line) for m, slot in shared.items() for line in unknown_parts(slot, towers[slot.same])]
            if wrong:
                return [(("backbone", m, "own"), line) for m, line in wrong], []
            objective = build_objective(recipe)
    except Exception as error:  # a component of a plugin may need memory
        why = next(iter(str(error).splitlines()), "")
        return [], [
            "freeze, train.lr_factors, train.lr_decay: their paths are checked only when training starts, since the "
            f"model cannot be built without memory: {type(error).__name__}: {why}"
        ]
    unknown = [
        (at, message)
        for at, part in _listed_parts(recipe.freeze, recipe.train.lr_factors)
        for _, message in objective.unknown_parts([part])
    ]
    unknown += [
        (
            ("train", "lr_decay", part),
            f"{part!r} has no units, as a transformer's blocks: its rate cannot decay by them",
        )
        for part in recipe.train.lr_decay
        if part not in objective.decaying()
    ]
    if not unknown:
        try:
            objective.trainable(recipe.freeze, {})
        except UserError as error:
            return [(("freeze",), str(error).removeprefix("freeze: "))], []
    return unknown, []


STAGE_MAY_CHANGE = (
    "augment", "backbone", "masker", "fusion", "fusions", "heads", "loss", "balance", "teacher", "teachers", "hooks",
    "freeze", "train.optimizer", "train.schedule", "train.lr_factors", "train.lr_decay", "train.clip_grad",
    "train.precision",
)  # fmt: skip


def stage_problems(recipe: Recipe, stages: Sequence[Recipe]) -> tuple[list[Problem], list[str]]:
    """What a stage changes that belongs to the whole run, points that do not rise, and weights that would not fit, by
    models that are built without memory; and a warning where they cannot be."""
    mistakes: list[Problem] = []
    points = [_comparable(stage.at, recipe.train.steps) for stage in recipe.stages]
    for i, (before, after) in enumerate(pairwise(points), 1):
        if before[0] != after[0]:
            line = "give all points as parts of the run, or all as steps (or give train.steps)"
            mistakes.append((("stages", i, "at"), line))
        elif before[1] >= after[1]:
            mistakes.append((("stages", i, "at"), "comes no later than the stage before"))
    for i, (old, new) in enumerate(pairwise([recipe, *stages])):
        for path in changes(old.to_dict() | {"stages": []}, new.to_dict()):
            allowed = any(path == part or path.startswith(f"{part}.") for part in STAGE_MAY_CHANGE)
            if not allowed or path == "train.optimizer.name":
                line = f"{path} holds for the whole run; a stage may change {', '.join(STAGE_MAY_CHANGE)}"
                mistakes.append((("stages", i), line))
    if not stages:
        return mistakes, []
    try:
        shapes = [_shapes(one) for one in (recipe, *stages)]
    except Exception as error:  # a component of a plugin may need memory
        why = next(iter(str(error).splitlines()), "")
        return mistakes, [
            "stages: whether weights fit is checked only when a stage begins, since a model cannot be built without "
            f"memory: {type(error).__name__}: {why}"
        ]
    for i, (old_shapes, new_shapes) in enumerate(pairwise(shapes)):
        for name, shape in old_shapes.items():
            if (other := new_shapes.get(name, shape)) != shape:
                line = f"{name} would be {other} in place of {shape}, and a stage keeps the weights"
                mistakes.append((("stages", i), line))
    return mistakes, []


def _comparable(at: float, steps: int | None) -> tuple[str, float]:
    if steps is not None:
        return "steps", at * steps if at < 1 else at
    return ("part" if at < 1 else "steps"), at


def _shapes(recipe: Recipe) -> dict[str, list[int]]:
    from distill_core.recipe.build import build_objective

    with torch.device("meta"):
        return {name: list(tensor.shape) for name, tensor in build_objective(recipe).state_dict().items()}


def unmet(name: str, needs: Needs, plan: Plan, modalities: set[str]) -> Iterator[str]:
    """A line for each need of component `name` that the recipe does not meet.

    `plan` lacks a modality whose own entries are wrong; `modalities` has all that the recipe names.
    """
    component = repr(name)
    for teacher in {**needs.teacher, **needs.attention, **needs.teacher_heads}:
        if teacher not in plan.teachers:
            others = f"; there {'is' if len(plan.teachers) == 1 else 'are'} {', '.join(plan.teachers)}"
            one = "a teacher" if teacher == DEFAULT_TEACHER else f"a teacher {teacher!r}"
            yield f"{component} needs {one}; this recipe has none{others if plan.teachers else ''}"
    if needs.fused and not plan.fusion:
        yield f"{component} needs fused views; this recipe has no fusion"
    names = needs.named
    for missing in sorted(names - modalities):
        yield f"{component} needs a modality {missing!r}{did_you_mean(missing, sorted(modalities))}"
    for name in sorted(needs.encoded & set(plan.raw)):
        yield f"{component} needs the embedding of {name!r}, which is only collated (it has no tower)"
    known = {**plan.modalities, **plan.raw}
    for name in sorted(names & set(known)):
        modality = known[name]
        if needs.tokens.get(name) and not modality.spec.has_tokens:
            yield f"{component} needs tokens of {name!r}; its backbone gives none"
        if max(needs.tokens.get(name, ()), default=-1) >= len(modality.roles):
            last = max(needs.tokens[name])
            yield f"{component} needs the tokens of view {last} of {name!r}; it has {len(modality.roles)} views"
        yield from _no_layers(component, name, needs.layers.get(name, ()), needs.tokens.get(name, ()), modality.spec)
        for teacher, read in needs.teacher.items():
            if name in read and teacher in plan.teachers:
                yield from _unseen(component, teacher, name, read[name], plan)
                layers = needs.teacher_layers.get(teacher, {}).get(name, ())
                spec = plan.teachers[teacher].specs.get(name, modality.spec)
                yield from _no_layers(component, name, layers, read[name], spec, teacher)
        for teacher, read in needs.attention.items():
            if read.get(name) and teacher in plan.teachers:
                yield from _unseen(component, teacher, name, read[name], plan)
                if not plan.teachers[teacher].specs.get(name, modality.spec).attention:
                    yield f"{component} needs the teacher {teacher!r}'s attention in {name!r}; its tower gives none"
        if name in needs.dropped and (modality.mask is None or not modality.mask.drops):
            yield f"{component} needs dropped tokens of {name!r}; add masker.{name}, one that drops some"
        if name in needs.masked and not modality.spec.can_mask:
            option = modality.spec.mask_option.partition(":")[0]
            without = f" without its option `{option}`" if option else ""
            yield f"{component} needs masked views of {name!r}; its backbone cannot hide tokens{without}"
        if modality.mask is not None and modality.mask.drops:
            masked = modality.views(modality.mask.role) + modality.views(REPEATED)
            if set(masked) & set(needs.whole.get(name, ())):
                yield (
                    f"{component} reads all tokens of {modality.mask.role} views of {name!r}, and masker.{name} drops "
                    "some: leave it out, or give it the `role` of other views"
                )
        missing_extras = [extra for extra in needs.extra.get(name, ()) if extra not in modality.extras]
        if missing_extras:
            made = "; ".join(f"{m!r}: {', '.join(p.extras) or 'none'}" for m, p in plan.modalities.items())
            yield (
                f"{component} needs the extra {', '.join(map(repr, missing_extras))} of views of {name!r}, which its "
                f"augmentation does not make. Extras by modality: {made}"
            )
        for role, number in needs.views.get(name, {}).items():
            count = len(modality.views(role))
            if count < number:
                yield f"{component} needs {number} {role} view(s) of {name!r}; its augmentation makes {count}"


def _unseen(component: str, id: str, modality: str, tokens: tuple[int, ...], plan: Plan) -> Iterator[str]:
    """What a component reads of a teacher's modality that the teacher does not give."""
    views = plan.teacher_views(id, modality)
    who = "the teacher" if id == DEFAULT_TEACHER else f"the teacher {id!r}"
    if not views:
        whose = "this recipe's teacher" if id == DEFAULT_TEACHER else who
        yield f"{component} needs a teacher of {modality!r}; {whose} sees none of its views"
        return
    spec = plan.teachers[id].specs.get(modality, plan.modalities[modality].spec)
    if tokens and not spec.has_tokens:
        yield f"{component} needs tokens of {modality!r}; {who} gives none"
    elif unseen := sorted(set(tokens) - set(views)):
        yield f"{component} needs the teacher's tokens of view {unseen[0]} of {modality!r}; {who} does not see it"


def _no_layers(
    component: str,
    modality: str,
    layers: Sequence[int],
    views: Sequence[int],
    spec: BackboneSpec,
    teacher: str | None = None,
) -> Iterator[str]:
    """What is wrong with the layers that a component reads, of the student where no teacher is named."""
    whose = "its backbone" if teacher is None else f"the teacher {teacher!r}"
    if missing := [layer for layer in layers if not 0 <= layer < spec.layers]:
        have = f"has layers 0 to {spec.layers - 1}" if spec.layers else "hands on its last layer's tokens alone"
        yield f"{component} needs layer {missing[0]} of {modality!r}; {whose} {have}"
    elif layers and not views:
        field = "tokens" if teacher is None else "teacher"
        yield f"{component} needs layers of {modality!r} of no view: name their views in Needs.{field}"


def unread(recipe: Recipe) -> Iterator[str]:
    """A warning where no loss reads a fusion or a head: nothing trains it, and replacing it changes nothing; or a
    teacher that is no copy, which is encoded for nobody."""
    needs = [(slot.config.fusion, needs_of(slot.cls, slot.config, recipe.plan)) for slot in recipe.loss]
    fusions = {**({DEFAULT_FUSION: recipe.fusion} if recipe.fusion is not None else {}), **recipe.fusions}
    for name, fusion in fusions.items():
        if not any(name == of and (need.fused or need.pools) for of, need in needs):
            at = fusion.path
            yield f"{at}: no loss of this recipe reads {fusion.cls.name!r}: it is not trained, and changes nothing"
    called = {name for _, need in needs for name in need.heads}
    for name, head in recipe.heads.items():
        if name not in called:
            yield f"{head.path}: no loss of this recipe calls the head {name!r}: it is not trained"
    read = {name for _, need in recipe.needs() for name in (*need.teacher, *need.attention, *need.teacher_heads)}
    for name, slot in recipe.all_teachers.items():
        if name not in read and slot.cls.parts(slot.config) == ():
            yield f"{slot.path}: no loss of this recipe reads the teacher {name!r}"
