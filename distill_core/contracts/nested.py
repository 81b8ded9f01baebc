"""Components inside other components' options: where they are, and what all of them together need of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel

from distill_core.contracts.component import Component
from distill_core.contracts.schedule import Scheduled
from distill_core.contracts.slot import Slot
from distill_core.plan import Needs, Plan


def slots_in(value: Any) -> Iterator[Slot[Any]]:
    """Every component in options, a section or a recipe, those inside other components' options too, in order."""
    for _, slot in places_in(value):
        yield slot
        yield from slots_in(slot.config)


def places_in(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Slot[Any]]]:
    """(path, component) of those that stand in options themselves, not in another component's: ("of", "0")."""
    if isinstance(value, Slot):
        yield path, value
    elif isinstance(value, Scheduled):
        yield from places_in(value.source, path)
    elif isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            yield from places_in(getattr(value, name), (*path, field.alias or name))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from places_in(item, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from places_in(item, (*path, str(i)))


def needs_of(cls: type[Component], config: Any, plan: Plan) -> Needs:
    """What a component needs of the recipe, with the components in its options and the heads that they call.

    A loss that names no modality reads all of them; one around others reads what they do.
    """
    plan = seen_by(cls, config, plan)
    parts = [cls.needs(config, plan)]
    for slot in slots_in(config):
        needs = slot.cls.needs(slot.config, plan)
        reads_all = slot.cls.kind == "loss" and not needs.named and not has_nested(slot.cls, slot.config)
        parts.append(replace(needs, student=tuple(plan.modalities)) if reads_all else needs)
    called = dict.fromkeys(name for part in parts for name in part.heads)
    parts += [plan.heads[name].needs for name in called if name in plan.heads]
    return parts[0] if len(parts) == 1 else Needs.union(parts)


def seen_by(cls: type[Component], config: Any, plan: Plan) -> Plan:
    """The plan as a component sees it: a loss, with the fusion that it reads."""
    return plan.reading(config.fusion) if cls.kind == "loss" else plan


def problems_of(cls: type[Component], config: Any, plan: Plan) -> Iterator[str]:
    """Why a component, or one in its options, cannot work in the recipe."""
    plan = seen_by(cls, config, plan)
    yield from cls.problems(config, plan)
    for slot in slots_in(config):
        yield from slot.cls.problems(slot.config, plan)


def has_nested(cls: type[Component], config: Any) -> bool:
    """Whether there are components of the same kind in its options."""
    return any(slot.cls.kind == cls.kind for slot in slots_in(config))
