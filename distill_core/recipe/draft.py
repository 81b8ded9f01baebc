"""A recipe of which parts may be wrong by themselves: what is right of it is checked all the same, so that a user sees
all errors at once."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from distill_core.contracts.component import ComponentConfig
from distill_core.contracts.slot import Context, Slot
from distill_core.contracts.teacher import Teacher
from distill_core.data.fields import FieldConfig
from distill_core.errors import KeyPath
from distill_core.interfaces import JointAugmentation
from distill_core.plan import DEFAULT_FUSION, DEFAULT_TEACHER, joined
from distill_core.recipe.document import Document
from distill_core.recipe.plans import Parts, joint_towers, teacher_place
from distill_core.recipe.sections import EvaluateConfig, Recipe, TrainConfig
from distill_core.registry import Registry

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
    teachers: Mapping[str, Slot[Teacher] | None]
    """Those that the document names; their invalid options have their defaults. None: it is not known which."""
    wrong: Collection[KeyPath] = ()
    """Paths of the parts that are invalid by themselves."""

    @classmethod
    def of(cls, recipe: Recipe, document: Document, slots: Mapping[KeyPath, Slot[Any]]) -> Draft:
        """The draft of a recipe whose parts are all valid."""
        return cls(document, slots, recipe.train, recipe.evaluate, recipe.all_teachers)

    @classmethod
    def without(
        cls, wrong: Collection[KeyPath], document: Document, slots: Mapping[KeyPath, Slot[Any]], registry: Registry
    ) -> Draft:
        """The draft of a recipe in which the parts `wrong` are invalid."""

        def valid(at: KeyPath) -> dict[str, Any]:
            """The options of a section or component that are not wrong."""
            options = document.get(at)
            named = options.items() if isinstance(options, dict) else ()
            return {k: v for k, v in named if not any(path[: len(at) + 1] == (*at, k) for path in wrong)}

        def section(model: type[Section], name: str) -> Section:
            return model.model_validate_json(json.dumps(valid((name,))), context=Context(registry))

        def teacher(name: str) -> Slot[Teacher] | None:
            at = teacher_place(name)
            if at in slots or not isinstance(document.get(at), dict):
                return slots.get(at)
            try:
                slot: Slot[Teacher] = TypeAdapter(Slot[Teacher]).validate_python(valid(at), context=Context(registry))
            except ValidationError:
                return None
            return slot

        others = document.get(("teachers",))
        names = [DEFAULT_TEACHER] if document.get(("teacher",)) is not None else []
        names += [*others] if isinstance(others, dict) else []
        teachers = {name: teacher(name) for name in names}
        return cls(document, slots, section(TrainConfig, "train"), section(EvaluateConfig, "evaluate"), teachers, wrong)

    def names(self, *section: str) -> list[str]:
        """The keys of a mapping in the document."""
        holder = self.document.get(section)
        return list(holder) if isinstance(holder, dict) else []

    def is_wrong(self, *path: str) -> bool:
        """Whether there is an error at this path or below it."""
        return any(other[: len(path)] == path for other in self.wrong)

    @property
    def optional(self) -> list[str]:
        """The modalities and fields that a sample may lack."""
        names = self.document.get(("data", "optional"))
        return [str(name) for name in names] if isinstance(names, list) else []

    @property
    def modalities(self) -> list[str]:
        """All that the document names, towers of several among them."""
        single = [name for name in self.names("augment") if name not in self.joint_views]
        return list(dict.fromkeys([*single, *self.names("backbone")]))

    @property
    def joint_towers(self) -> list[str]:
        """The keys of `backbone` that name several modalities."""
        return joint_towers(self.names("backbone"))

    @property
    def joint_views(self) -> list[str]:
        """The keys of `augment` that name several modalities."""
        return [key for key in self.names("augment") if len(joined(key)) > 1]

    def makes_joint_views(self, key: str) -> bool:
        """Whether the component at this key of `augment` is for several modalities."""
        slot = self.slots.get(("augment", key))
        return slot is not None and issubclass(slot.cls, JointAugmentation)

    @property
    def parts(self) -> Parts:
        """What the plan is made of."""

        def of(section: str) -> dict[str, Slot[Any] | None]:
            return {name: self.slots.get((section, name)) for name in self.names(section)}

        def valid(section: str) -> dict[str, Slot[Any]]:
            return {name: slot for name, slot in of(section).items() if slot is not None}

        augment, joint = of("augment"), self.joint_views
        default = self.document.get(("fusion",)) is not None
        return Parts(
            augment={m: None if self.makes_joint_views(m) else slot for m, slot in augment.items() if m not in joint},
            joint={key: augment[key] if self.makes_joint_views(key) else None for key in joint},
            backbone=of("backbone"),
            masker=valid("masker"),
            fusions={**({DEFAULT_FUSION: self.slots.get(("fusion",))} if default else {}), **of("fusions")},
            heads=valid("heads"),
            teachers=self.teachers,
            fields={
                name: FieldConfig.model_validate_json(json.dumps(self.document.get(("data", "fields", name))))
                for name in self.names("data", "fields")
                if not self.is_wrong("data", "fields", name)
            },
            optional=self.optional,
        )
