"""Do the parts of a recipe fit one another? Asked of what is written and of the plan, before anything is built.

Where parts are invalid by themselves, the checks continue with the valid rest (`Draft`); no check reports what only
follows from another error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from distill_core.batch import REPEATED
from distill_core.contracts.masker import Masker
from distill_core.contracts.nested import needs_of, seen_by
from distill_core.contracts.shared import SharedSlot
from distill_core.contracts.slot import Slot, is_word
from distill_core.contracts.teacher import Teacher
from distill_core.errors import KeyPath, UserError, did_you_mean
from distill_core.interfaces import JointTower, Loss
from distill_core.plan import DEFAULT_FUSION, DEFAULT_TEACHER, MissingModality, Needs, Plan, joined
from distill_core.recipe.draft import Draft, Problem
from distill_core.recipe.needs import (
    absent_samples,
    only_collated,
    uncopied,
    unknown_fields,
    unknown_heads,
    unknown_modality,
    unmet,
)
from distill_core.recipe.plans import is_raw, plan_of, teacher_place
from distill_core.recipe.sections import Recipe
from distill_core.recipe.splits import split_problems
from distill_core.teachers.copies import CopiedTeacher
from distill_core.teachers.own_views import with_others


def problems(draft: Draft) -> Iterator[Problem]:
    """Every unmet need of one part of a recipe in another."""
    yield from _ids(draft)
    yield from _names(draft)
    yield from _modalities(draft)
    yield from _joint_towers(draft)
    yield from _joint_views(draft)
    yield from _maskers(draft)
    yield from _optional(draft)
    problems: list[Problem] = []
    plan = plan_of(draft.parts, lambda place, line: problems.append((place, line)))
    yield from problems
    for path, slot in draft.slots.items():
        yield from ((path, line) for line in _component(draft, path, slot, plan))
    yield from _training(draft)
    yield from split_problems(draft.slots, draft.evaluate)


def _ids(draft: Draft) -> Iterator[Problem]:
    """Losses, hooks and tasks with the same id."""
    for section in (("loss",), ("hooks",), ("evaluate", "tasks")):
        ids = set()
        for path, slot in draft.slots.items():
            if path[:-1] == section:
                if slot.id in ids:
                    yield path, f"a second {slot.id!r}: give it an `id:` of its own"
                ids.add(slot.id)


def _names(draft: Draft) -> Iterator[Problem]:
    """The keys that name fusions, heads, teachers and fields."""
    for section, what, reserved in (
        ("fusions", "a fusion's name", DEFAULT_FUSION),
        ("heads", "a head's name", None),
        ("teachers", "a teacher's name", DEFAULT_TEACHER),
    ):
        for name in draft.names(section):
            if name == reserved:
                yield (section, name), f"{name!r} is the name of the section `{section[:-1]}`; choose another"
            elif not is_word(name):
                yield (section, name), f"{what} is a word of letters, digits, - and _"
    for name in draft.names("data", "fields"):
        if name in draft.modalities:
            yield ("data", "fields", name), f"{name!r} is a modality: give the field a name of its own"


def _modalities(draft: Draft) -> Iterator[Problem]:
    """Their augmentations and backbones, and the teachers that name them."""
    for one, other in (("augment", "backbone"), ("backbone", "augment")):
        for name in draft.names(one):
            if len(joined(name)) > 1:
                continue
            if isinstance(draft.document.get((other,)), dict) and name not in draft.names(other):
                yield (one, name), f"{name!r} has no entry in {other}; a modality needs both"
            if not is_word(name):
                yield (one, name), "a modality is a word of letters, digits, - and _"
            if one == "augment" and draft.makes_joint_views(name):
                line = f"makes views of several modalities at once: write them as its key, {name}+OTHER"
                yield (one, name), f"{draft.slots[one, name].cls.name!r} {line}"
    for teacher, slot in draft.teachers.items():
        at = (*teacher_place(teacher), "modalities")
        for name in (slot.config.modalities or ()) if slot is not None else ():
            if name not in draft.modalities:
                yield at, f"no modality {name!r}{did_you_mean(name, draft.modalities)}"
            elif is_raw(draft.slots.get(("backbone", name))):
                yield at, f"{name!r} is only collated (it has no tower)"


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


def _joint_views(draft: Draft) -> Iterator[Problem]:
    """The keys of `augment` that name several modalities."""
    named: dict[str, str] = {}
    for key in draft.joint_views:
        place, names = ("augment", key), joined(key)
        if place in draft.slots and not draft.makes_joint_views(key):
            yield place, f"{draft.slots[place].cls.name!r} makes the views of one modality, and {key!r} names several"
        if len(set(names)) < len(names):
            yield place, f"{key!r} names a modality twice"
        for name in dict.fromkeys(names):
            if name not in draft.names("augment"):
                yield place, f"no augmentation of {name!r}: give it an entry of its own, which this one builds on"
        if repeats := [name for name in names if named.setdefault(name, key) != key]:
            others = ", ".join(map(repr, dict.fromkeys(named[name] for name in repeats)))
            yield place, f"views of {', '.join(map(repr, repeats))} are made by {others} already"


def _maskers(draft: Draft) -> Iterator[Problem]:
    """The modalities that they mask."""
    for name in draft.names("masker"):
        if name in draft.joint_towers:
            parts = " or ".join(f"masker.{part}" for part in joined(name))
            yield ("masker", name), f"a tower of several modalities sees every token; mask one of them: {parts}"
        elif name not in draft.modalities:
            yield ("masker", name), f"no modality {name!r}{did_you_mean(name, draft.modalities)}"
        elif is_raw(draft.slots.get(("backbone", name))):
            yield ("masker", name), f"{name!r} is only collated: there is no tower to hide its tokens from"


def _optional(draft: Draft) -> Iterator[Problem]:
    """What samples may lack."""
    at, fields = ("data", "optional"), draft.names("data", "fields")
    for name in draft.optional:
        if name in draft.joint_towers:
            yield at, f"{name!r} is read where a sample has {' and '.join(joined(name))}: name one of these"
        elif name not in draft.modalities and name not in fields:
            yield at, f"no modality or field {name!r}{did_you_mean(name, [*draft.modalities, *fields])}"


def _component(draft: Draft, path: KeyPath, slot: Slot[Any], whole: Plan) -> Iterator[str]:
    """What is wrong with one component in this recipe."""
    outer = _outermost(draft, path, slot)
    plan = seen_by(outer.cls, outer.config, whole)
    try:
        needs, lines = slot.cls.needs(slot.config, plan), [*slot.cls.problems(slot.config, plan)]
        if issubclass(slot.cls, Masker) and path[1] in plan.modalities:
            needs = slot.cls.reads(slot.config, str(path[1]), plan)
    except MissingModality as error:
        if error.name in plan.raw:
            yield only_collated(slot.id, error.name)
        elif error.name not in draft.modalities:
            yield unknown_modality(slot.id, error.name, draft.modalities)
        return
    except UserError as error:  # a tower inside it that cannot tell its widths
        yield str(error)
        return
    yield from lines
    yield from unmet(slot.cls.name, needs, plan, draft.modalities)
    yield from unknown_heads(slot.cls.name, needs, plan, draft.names("heads"))
    yield from unknown_fields(slot.cls.name, needs, draft.names("data", "fields"))
    yield from _cached(draft, slot, needs)
    yield from _sharded(draft, slot, needs)
    modality = {**plan.modalities, **plan.raw}.get(str(path[-1]))
    if path[0] == "backbone" and len(path) == 2 and modality is not None:
        yield from slot.cls.view_problems(slot.config, modality)
    elif issubclass(slot.cls, Masker) and path[1] in plan.modalities:
        yield from _masker(slot, str(path[1]), plan)
    elif issubclass(slot.cls, Teacher):
        yield from _teacher(draft, slot, plan)
    elif issubclass(slot.cls, Loss):
        yield from _fusion(draft, path, slot, whole)
        yield from _loss(draft, slot, needs, plan)


def _outermost(draft: Draft, path: KeyPath, slot: Slot[Any]) -> Slot[Any]:
    """The loss in whose options a component stands, whose fusion is read in all of them; of any other, itself."""
    outer = draft.slots.get(path[:2], slot)
    return outer if issubclass(outer.cls, Loss) else slot


def _cached(draft: Draft, slot: Slot[Any], needs: Needs) -> Iterator[str]:
    """What it reads of a teacher and a cache does not hold."""
    for name in dict.fromkeys([*_read(needs.teacher_layers), *_read(needs.attention)]):
        teacher = draft.teachers.get(name)
        if teacher is not None and teacher.config.cache is not None:
            yield (
                f"{slot.id!r} reads layers or the attention of the teacher {name!r}, which its cache lacks; leave "
                "`cache` out"
            )


def _sharded(draft: Draft, slot: Slot[Any], needs: Needs) -> Iterator[str]:
    """What towers that are split over ranks cannot do."""
    if draft.train.parallel.shard == 1:
        return
    if isinstance(slot, SharedSlot) and slot.own:
        yield (
            f"shares all of {slot.same!r} but its `own` parts, which train.parallel.shard cannot split over ranks; "
            "make it 1, or share the tower whole"
        )
    if needs.attention:
        yield f"{slot.id!r} reads how a teacher attends, which train.parallel.shard does not allow; make it 1"


def _masker(slot: Slot[Any], name: str, plan: Plan) -> Iterator[str]:
    """Why it cannot mask the views of this modality."""
    cls, config, modality = slot.cls, slot.config, plan.modalities[name]
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


def _teacher(draft: Draft, slot: Slot[Any], plan: Plan) -> Iterator[str]:
    """Views of its own that its towers cannot encode, views that only the student sees, a cache of what changes."""
    if issubclass(slot.cls, CopiedTeacher):
        for name, own in slot.cls.own_views(slot.config, plan).items():
            tower = draft.slots["backbone", name]
            views = with_others(own, plan.modalities[name], slot.config.views)
            for reason in tower.cls.view_problems(tower.config, views):
                yield f"{slot.cls.name!r}: augment.{name}: {reason}"
    if slot.config.cache is not None and not slot.cls.cacheable(slot.config):
        yield (
            f"{slot.cls.name!r}: cache: only what a teacher makes of its views alone can be written before the run "
            "(`frozen`), and this one changes with the student, or is read already; leave `cache` out"
        )
    if REPEATED in slot.config.views:
        yield f"{slot.cls.name!r}: views: only the student sees a view a second time ({REPEATED!r})"


def _fusion(draft: Draft, path: KeyPath, slot: Slot[Any], plan: Plan) -> Iterator[str]:
    """A fusion that a loss names and there is not, or does not read; another one than the loss around it reads."""
    name, there = slot.config.fusion, [DEFAULT_FUSION, *plan.fusions]
    outer = _outermost(draft, path, slot)
    if outer is not slot:
        if name not in (DEFAULT_FUSION, outer.config.fusion):
            yield f"{slot.id!r} reads the fusion of the loss around it, {outer.id!r}: give its `fusion` there"
    elif name not in there:
        yield f"{slot.id!r}: no fusion {name!r}{did_you_mean(name, there)}"
    elif name != DEFAULT_FUSION:
        needs = needs_of(slot.cls, slot.config, plan)
        if not needs.fused and not needs.pools:
            yield f"{slot.id!r} reads no fused views: leave its `fusion` out"


def _loss(draft: Draft, slot: Slot[Any], needs: Needs, plan: Plan) -> Iterator[str]:
    """Samples that lack what it needs, copies that a teacher lacks, tokens that micro-batches do not keep."""
    yield from absent_samples(slot.cls, needs_of(slot.cls, slot.config, plan), plan)
    outer = draft.slots.get(slot.place[:2], slot)
    path = ".".join(("loss", outer.id, *map(str, slot.place[2:])))
    for module in slot.cls.teacher_modules:
        for teacher in needs.teacher:
            yield from uncopied(slot.cls.name, f"its {module!r}", f"{path}.{module}", teacher, plan)
    of_heads = any(plan.heads[head].needs.tokens for head in needs.heads if head in plan.heads)
    reads_tokens = needs.tokens or _read(needs.teacher) or of_heads or needs.pools or needs.attention
    if draft.train.parallel.micro_batch is not None and reads_tokens:
        yield f"{slot.id!r} reads tokens, which train.parallel.micro_batch does not keep; make it null"


def _read(of_teachers: Any) -> list[str]:
    """The teachers of which it names views or layers of some modality."""
    return [name for name, of_modality in of_teachers.items() if any(of_modality.values())]


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


def unknown_score(draft: Draft) -> Iterator[Problem]:
    """What is wrong with `train.checkpoint.best`, the address SIDE/TASK/NAME of a mean, where the tasks tell theirs. A
    score of one set, SIDE/TASK/SET/NAME, is known when it has been given."""
    best = draft.train.checkpoint.best
    if best is None or draft.evaluate.every is None or draft.is_wrong("evaluate", "tasks"):
        return
    known: list[str] = []
    tasks = [slot for path, slot in draft.slots.items() if path[:-1] == ("evaluate", "tasks")]
    for side in ("student", "teacher") if DEFAULT_TEACHER in draft.teachers else ("student",):
        for task in tasks:
            names, address = task.cls.means(task.config), f"{side}/{task.id}/"
            if best.startswith(address) and (names is None or "/" in best.removeprefix(address)):
                return
            known += [address + name for name in names] if names is not None else [address + "..."]
    if best not in known:
        near = get_close_matches(best, known, n=1)
        hint = f", did you mean {near[0]!r}?" if near else "."
        there = f"The means over sets: {', '.join(known)}" if known else "There is no task in evaluate.tasks"
        yield ("train", "checkpoint", "best"), f"no score {best!r}{hint} {there}"


def unread(recipes: Sequence[Recipe]) -> Iterator[str]:
    """A warning where no loss of a recipe or its stages reads a fusion or a head: nothing trains it, and replacing it
    changes nothing; or a teacher that is no copy, which is encoded for nobody."""
    needs = [(slot.config.fusion, needs_of(slot.cls, slot.config, one.plan)) for one in recipes for slot in one.loss]
    for name, fusion in {name: slot for one in recipes for name, slot in one.all_fusions.items()}.items():
        if not any(name == of and (need.fused or need.pools) for of, need in needs):
            at = fusion.path
            yield f"{at}: no loss of this recipe reads {fusion.cls.name!r}: it is not trained, and changes nothing"
    called = {name for _, need in needs for name in need.heads}
    for name, head in {name: slot for one in recipes for name, slot in one.heads.items()}.items():
        if name not in called:
            yield f"{head.path}: no loss of this recipe calls the head {name!r}: it is not trained"
    of_all = [need for one in recipes for _, need in one.needs()]
    read = {name for need in of_all for name in (*need.teacher, *need.attention, *need.teacher_heads)}
    for name, teacher in {name: slot for one in recipes for name, slot in one.all_teachers.items()}.items():
        if name not in read and teacher.cls.parts(teacher.config) == ():
            yield f"{teacher.path}: no loss of this recipe reads the teacher {name!r}"
