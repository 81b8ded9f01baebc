"""Views that a teacher draws for itself: the student's crops at another size, or with other colours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from distill_core.batch import Sample, View
from distill_core.contracts.slot import Slot
from distill_core.contracts.teacher import Visit
from distill_core.errors import counted
from distill_core.interfaces import Augmentation, Collator
from distill_core.plan import ModalityPlan


@dataclass(frozen=True)
class OwnViews:
    """A `TeacherReader` of views that are drawn as the student's are, or that are the student's own."""

    collators: Mapping[str, Collator]
    augment: Mapping[str, Augmentation]
    roles: tuple[str, ...]

    def __call__(self, sample: Sample, views: Mapping[str, list[View]], visit: Visit) -> dict[str, list[View]]:
        """The views of its roles."""
        drawn = {
            m: self.augment[m].train_views(sample, visit.generator(m)) if m in self.augment else views[m]
            for m in self.collators
            if m in views
        }
        return {m: [view for view in of_modality if view.role in self.roles] for m, of_modality in drawn.items()}


def own_plan(student: ModalityPlan, augment: Slot[Augmentation] | None, views: Sequence[str]) -> ModalityPlan:
    """What a teacher of the views of these roles sees of a modality, drawn by `augment` where that is not None."""
    own = student
    if augment is not None:
        roles, shapes = augment.cls.roles(augment.config), augment.cls.shapes(augment.config)
        own = replace(student, roles=roles, augment=augment.config, shapes=shapes)
    numbers = [i for i, role in enumerate(own.roles) if role in views]
    shapes = tuple(own.shapes[i] for i in numbers) if own.shapes is not None else None
    return replace(own, roles=tuple(own.roles[i] for i in numbers), shapes=shapes)


def with_others(own: ModalityPlan, student: ModalityPlan, views: Sequence[str]) -> ModalityPlan:
    """What a tower that both share is given of a modality: a teacher's own views of some roles, and all others of the
    student's."""
    others = [i for i, role in enumerate(student.roles) if role not in views]
    shapes = None
    if own.shapes is not None and student.shapes is not None:
        shapes = (*own.shapes, *(student.shapes[i] for i in others))
    return replace(own, roles=(*own.roles, *(student.roles[i] for i in others)), shapes=shapes)


def own_problems(name: str, student: ModalityPlan, own: ModalityPlan, views: Sequence[str]) -> Iterator[str]:
    """Lines where a teacher's augmentation of modality `name` makes more or fewer views than the student has, or other
    crops."""
    if student.joint is not None and own.augment is not student.augment:
        yield (
            f"augment.{name}: the student's views are made by augment.{student.joint}, and views of its own would not "
            "be the same crops; leave it out"
        )
    has = len([role for role in student.roles if role in views])
    if len(own.roles) != has:
        yield (
            f"augment.{name} makes {counted(len(own.roles), 'view')} of the roles {', '.join(views)}, "
            f"and the student has {has}"
        )
