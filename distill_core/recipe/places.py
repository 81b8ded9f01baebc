"""Where in a document sections and components stand: those of `Recipe`, and of the components that it names."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from distill_core.contracts.component import Component
from distill_core.contracts.schedule import Schedule, Scheduled
from distill_core.contracts.slot import NullIsDefault, Slot, Unnamed, default_of, interfaces_of
from distill_core.errors import KeyPath
from distill_core.registry import Registry


@dataclass(frozen=True)
class Place:
    """A part of a document that takes a component, a section's options, or something that null empties."""

    path: KeyPath
    interfaces: tuple[type[Component], ...] = ()
    """Those of the components that may stand here; none for a section."""
    default: str | None = None
    """The component that stands here where the document has nothing."""
    unnamed: str | None = None
    """The component whose options stand here where the document names none."""
    nullable: bool = False
    item: bool = False
    """Whether it is one of a list or mapping, which null takes out."""
    options: type[BaseModel] | None = None
    """The model of the options that are written here; None where the component is unknown."""

    def option_names(self) -> list[str]:
        """What may be written here."""
        fields = self.options.model_fields if self.options is not None else {}
        return [*(field.alias or name for name, field in fields.items()), *(["name", "id"] if self.interfaces else [])]


def places(model: type[BaseModel], data: Any, registry: Registry, path: KeyPath = ()) -> Iterator[Place]:
    """Those of the data that is written for a model, outer ones first; and the slots that such a model has but that
    are not written."""
    yield Place(path, options=model)
    if not isinstance(data, dict):
        return
    for key, field, empties in _holders(model):
        default = _default_component(field)
        unnamed = next((mark.name for mark in field.metadata if isinstance(mark, Unnamed)), default)
        place = Place((*path, key), default=default, unnamed=unnamed)
        if empties:
            yield replace(place, nullable=True)
        yield from _inside(field.annotation, data.get(key), registry, place)


@cache
def _holders(model: type[BaseModel]) -> list[tuple[str, FieldInfo, bool]]:
    """(key, field, whether null empties it) of the fields in which a place may be; most options are plain values."""
    fields = [
        (field.alias or name, field, any(isinstance(mark, NullIsDefault) for mark in field.metadata))
        for name, field in model.model_fields.items()
    ]
    return [(key, field, empties) for key, field, empties in fields if empties or _may_hold(field.annotation)]


def _may_hold(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return True
    return typing.get_origin(annotation) in (Slot, Scheduled) or any(map(_may_hold, typing.get_args(annotation)))


def _inside(annotation: Any, value: Any, registry: Registry, place: Place) -> Iterator[Place]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    scheduled = origin is Scheduled and (isinstance(value, str | dict) or (value is None and place.default is not None))
    if origin is Slot or scheduled:  # a number is no component
        interfaces = interfaces_of(annotation) if origin is Slot else (Schedule,)
        name = value.get("name", place.unnamed) if isinstance(value, dict) else None
        entries = (registry.entries.get((interface.kind, str(name))) for interface in interfaces)
        options = next((entry.cls.Config for entry in entries if entry is not None), None)
        yield replace(place, interfaces=interfaces, options=options)
        if options is not None:
            # without the first, which is this place
            yield from list(places(options, value, registry, place.path))[1:]
    elif origin in (typing.Union, types.UnionType):
        for choice in arguments:
            yield from _inside(choice, value, registry, replace(place, nullable=type(None) in arguments))
    elif origin is typing.Annotated:
        yield from _inside(arguments[0], value, registry, place)
    elif origin is dict and isinstance(value, dict):
        for key, item in value.items():
            yield from _inside(arguments[1], item, registry, Place((*place.path, key), item=True))
    elif origin in (list, tuple) and isinstance(value, list):
        for i, item in enumerate(value):
            yield from _inside(arguments[0], item, registry, Place((*place.path, i), item=True))
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel) and value is not None:
        yield from places(annotation, value, registry, place.path)


def _default_component(field: FieldInfo) -> str | None:
    default = default_of(field)
    return default.get("name") if isinstance(default, dict) else None
