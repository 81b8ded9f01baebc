"""Whether a recipe has what its components need (`Needs`), by its plan: a line for each thing that is missing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import chain

from distill_core.batch import REPEATED
from distill_core.errors import did_you_mean
from distill_core.interfaces import Loss
from distill_core.plan import DEFAULT_TEACHER, BackboneSpec, ModalityPlan, Needs, Plan


def unmet(name: str, needs: Needs, plan: Plan, modalities: Collection[str]) -> Iterator[str]:
    """A line for each need of component `name` in teachers, fused views and modalities that the recipe does not meet.

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
    for missing in sorted(needs.named - {*modalities}):
        yield unknown_modality(name, missing, modalities)
    for modality in sorted(needs.encoded & plan.raw.keys()):
        yield only_collated(name, modality)
    modalities = {**plan.modalities, **plan.raw}
    for modality in sorted(needs.named & modalities.keys()):
        yield from _of_student(component, needs, modality, modalities[modality])
        yield from _of_views(component, needs, modality, modalities[modality], plan)
        if modality in plan.modalities:
            yield from _of_teachers(component, needs, modality, plan)


def unknown_modality(name: str, modality: str, there: Collection[str]) -> str:
    """The line for a component that names a modality which the recipe does not have."""
    return f"{name!r} needs a modality {modality!r}{did_you_mean(modality, sorted(there))}"


def only_collated(name: str, modality: str) -> str:
    """The line for a component that reads the features of a modality that has none."""
    return f"{name!r} needs the embedding of {modality!r}, which is only collated (it has no tower)"


def _of_student(component: str, needs: Needs, name: str, modality: ModalityPlan) -> Iterator[str]:
    """The student's tokens, layers and masks of one modality."""
    tokens, spec, mask = needs.tokens.get(name, ()), modality.spec, modality.mask
    if tokens and not spec.has_tokens:
        yield f"{component} needs tokens of {name!r}; its backbone gives none"
    if max(tokens, default=-1) >= len(modality.roles):
        count = len(modality.roles)
        yield f"{component} needs the tokens of view {max(tokens)} of {name!r}; it has {count} views"
    yield from _layers(component, name, needs.layers.get(name, ()), tokens, spec)
    if name in needs.dropped and (mask is None or not mask.drops):
        yield f"{component} needs dropped tokens of {name!r}; add masker.{name}, one that drops some"
    if name in needs.masked and not spec.can_mask:
        option = spec.mask_option.partition(":")[0]
        without = f" without its option `{option}`" if option else ""
        yield f"{component} needs masked views of {name!r}; its backbone cannot hide tokens{without}"
    if mask is not None and mask.drops:
        masked = modality.views(mask.role) + modality.views(REPEATED)
        if set(masked) & set(needs.whole.get(name, ())):
            yield (
                f"{component} reads all tokens of {mask.role} views of {name!r}, and masker.{name} drops some: leave "
                "it out, or give it the `role` of other views"
            )


def _of_views(component: str, needs: Needs, name: str, modality: ModalityPlan, plan: Plan) -> Iterator[str]:
    """What the augmentation makes of one modality."""
    missing = [extra for extra in needs.extra.get(name, ()) if extra not in modality.extras]
    if missing:
        extras = "; ".join(f"{m!r}: {', '.join(p.extras) or 'none'}" for m, p in plan.modalities.items())
        yield (
            f"{component} needs the extra {', '.join(map(repr, missing))} of views of {name!r}, which its augmentation "
            f"does not make. Extras by modality: {extras}"
        )
    for role, number in needs.views.get(name, {}).items():
        count = len(modality.views(role))
        if count < number:
            yield f"{component} needs {number} {role} view(s) of {name!r}; its augmentation makes {count}"


def _of_teachers(component: str, needs: Needs, name: str, plan: Plan) -> Iterator[str]:
    """What teachers make of one modality."""
    for teacher, read in needs.teacher.items():
        if name in read and teacher in plan.teachers:
            yield from _unseen(component, teacher, name, read[name], plan)
            layers = needs.teacher_layers.get(teacher, {}).get(name, ())
            yield from _layers(component, name, layers, read[name], plan.teacher_spec(teacher, name), teacher)
    for teacher, read in needs.attention.items():
        if read.get(name) and teacher in plan.teachers:
            yield from _unseen(component, teacher, name, read[name], plan)
            if not plan.teacher_spec(teacher, name).attention:
                yield f"{component} needs the teacher {teacher!r}'s attention in {name!r}; its tower gives none"


def _unseen(component: str, teacher: str, modality: str, tokens: tuple[int, ...], plan: Plan) -> Iterator[str]:
    """What a component reads of a teacher's modality that the teacher does not give."""
    views = plan.teacher_views(teacher, modality)
    who = "the teacher" if teacher == DEFAULT_TEACHER else f"the teacher {teacher!r}"
    if not views:
        whose = "this recipe's teacher" if teacher == DEFAULT_TEACHER else who
        yield f"{component} needs a teacher of {modality!r}; {whose} sees none of its views"
        return
    if tokens and not plan.teacher_spec(teacher, modality).has_tokens:
        yield f"{component} needs tokens of {modality!r}; {who} gives none"
    elif unseen := sorted(set(tokens) - set(views)):
        yield f"{component} needs the teacher's tokens of view {unseen[0]} of {modality!r}; {who} does not see it"


def _layers(
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


def unknown_heads(name: str, needs: Needs, plan: Plan, heads: Collection[str]) -> Iterator[str]:
    """What is wrong with the heads that component `name` calls; `heads` has all that the recipe names."""
    for head in dict.fromkeys(chain(needs.heads, *needs.teacher_heads.values())):
        if head not in heads:
            near = did_you_mean(head, sorted(heads)) if heads else "; this recipe has no `heads`"
            yield f"{name!r} needs a head {head!r}{near}"
    for teacher, copied in needs.teacher_heads.items():
        for head in copied:
            if head in heads:
                yield from uncopied(name, f"the head {head!r}", f"heads.{head}", teacher, plan)


def uncopied(name: str, part: str, path: str, teacher: str, plan: Plan) -> Iterator[str]:
    """A line where component `name` reads a teacher's copy of a part of the student, and that teacher has none."""
    if teacher in plan.teachers and not plan.teachers[teacher].copies(path):
        yield (
            f"{name!r} needs a copy of {part}, which the teacher {teacher!r} has not: take a teacher that copies "
            f"(`ema`), with {path} in its `of`, if that is given"
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


def absent_samples(loss: type[Loss], needs: Needs, plan: Plan) -> Iterator[str]:
    """What is wrong where a loss needs all samples of a modality that some may lack."""
    names = (needs.named or set(plan.modalities)) | set(needs.fields)
    optional = sorted(names & plan.optional)
    if optional and not loss.partial:
        some = " and ".join(repr(name) for name in optional)
        yield (
            f"{loss.name!r} needs {some} of every sample, and data.optional lets some lack it: take a loss that can do "
            f"without those samples (`partial`), or leave {some} out of data.optional, which skips them"
        )
