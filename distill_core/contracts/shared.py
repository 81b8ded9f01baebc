"""Components that stand at two places: `backbone: {A: {name: ...}, B: {same: A}}`, one tower for both.

A `dict[str, Slot[Backbone]]` that is marked with `MayShare` takes `{same: NAME}` in the place of a component. Both
entries then have the same class and options, and `build_all` makes one module of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError, ValidationInfo
from pydantic_core import CoreSchema, InitErrorDetails, core_schema
from torch import nn

from distill_core.contracts.component import Component
from distill_core.contracts.slot import JSON_KEY, PLACE, Context, Slot, detail, details
from distill_core.errors import KeyPath, UserError, did_you_mean

C = TypeVar("C", bound=Component)

SAME, OWN = "same", "own"


class SharedSlot(Slot[C]):
    """A slot that takes the component of another, all of it but the parts `own`."""

    def __init__(self, of: Slot[C], same: str, own: tuple[str, ...] = (), place: KeyPath = ()) -> None:
        super().__init__(of.cls, of.config, package=of.package, place=place)
        self.of, self.same, self.own = of, same, own

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, SharedSlot) and (self.same, self.own) == (other.same, other.own) and self.of == other.of
        )

    def dump(self) -> dict[str, Any]:
        """As a recipe would write it."""
        return {SAME: self.same, **({OWN: list(self.own)} if self.own else {})}


class MayShare:
    """Marks a mapping of slots (`Annotated[dict[str, Slot[Backbone]], MayShare()]`) whose entries may be
    `{same: NAME}`, or `{same: NAME, own: [PART, ...]}` with parts of their own."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_wrap_validator_function(_validate, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        written = handler(schema)
        shared = {
            "type": "object",
            "properties": {
                SAME: {"type": "string", "description": "The entry whose component stands here, too."},
                OWN: {"type": "array", "items": {"type": "string"}, "description": "Its parts that are not shared."},
            },
            "required": [SAME],
            "additionalProperties": False,
        }
        assert JSON_KEY in written["additionalProperties"]
        return {**written, "additionalProperties": {"anyOf": [written["additionalProperties"], shared]}}


def _validate(value: Any, handler: Any, info: ValidationInfo) -> Any:
    entries = value if isinstance(value, Mapping) else {}
    shared = {name: entry for name, entry in entries.items() if isinstance(entry, Mapping) and SAME in entry}
    if not shared:
        return handler(value)
    errors: list[InitErrorDetails] = []
    slots: dict[str, Slot[Any]] = {}
    try:
        slots = handler({name: entry for name, entry in entries.items() if name not in shared})
    except ValidationError as error:
        errors += details(error)
    known = info.context.slots if isinstance(info.context, Context) else {}
    components = dict(slots)
    for name, entry in shared.items():
        place = tuple(entry.get(PLACE, ()))
        wrong = list(_problems(name, entry, entries, shared))
        errors += [detail("shared_component", line, (name, *at), entry.get(SAME)) for at, line in wrong]
        of = slots.get(entry[SAME]) or known.get((*place[:-1], entry[SAME])) if not wrong else None
        if of is not None:  # one that is wrong itself has been named
            components[name] = SharedSlot(of, entry[SAME], tuple(entry.get(OWN, ())), place)
            if place and isinstance(info.context, Context):
                info.context.slots[place] = components[name]
    if errors:
        raise ValidationError.from_exception_data("components", errors)
    return {name: components[name] for name in entries if name in components}


def _problems(
    name: str, entry: Mapping[str, Any], entries: Mapping[str, Any], shared: Mapping[str, Any]
) -> Iterable[tuple[KeyPath, str]]:
    same, own = entry[SAME], entry.get(OWN, [])
    if not isinstance(same, str):
        yield (SAME,), "must be the name of the entry whose component it takes"
    elif same == name:
        yield (SAME,), f"{name!r} cannot be the same as itself; name the entry whose component it takes"
    elif same in shared:
        yield (SAME,), f"{same!r} is the same as {shared[same][SAME]!r} itself: name an entry that has a component"
    elif same not in entries:
        yield (
            (SAME,),
            f"no entry {same!r}{did_you_mean(same, [other for other in entries if other not in shared])}",
        )
    for option in entry:
        if option not in (SAME, OWN, PLACE):
            yield (
                (option,),
                f"{option!r} is that of {same!r}: an entry with `same` takes the component as it is, and has no option "
                "but `own`, the parts that it does not share",
            )
    if not isinstance(own, list) or not all(isinstance(part, str) and part for part in own):
        yield (OWN,), "must be a list of names of parts, as [proj]"


def build_all(slots: Mapping[str, Slot[Any]], names: Iterable[str] | None = None) -> dict[str, Any]:
    """The components of these slots, all of them or those of `names`; what two of them share is one object.

    Those that take another's come last: a module's parameters are named after the first place at which they stand.
    Without parts of its own a shared component is the other one itself; with some it is a module of the same class
    whose other parts are those of the other one. Raises `UserError` for a part that it has not.
    """
    built: dict[str, Any] = {}

    def component(name: str) -> Any:
        if name not in built:
            slot = slots[name]
            built[name] = _shared(slot, component(slot.same)) if isinstance(slot, SharedSlot) else slot.build()
        return built[name]

    ordered = sorted(slots if names is None else names, key=lambda name: isinstance(slots[name], SharedSlot))
    return {name: component(name) for name in ordered}


def _shared(slot: SharedSlot[Any], whole: nn.Module) -> nn.Module:
    if not slot.own:
        return whole
    if unknown := list(unknown_parts(slot, whole)):
        raise UserError(f"{slot.path}.{OWN}: {unknown[0]}")
    module: nn.Module = slot.build()
    _tie(module, whole, slot.own)
    return module


def unknown_parts(slot: SharedSlot[Any], whole: nn.Module) -> Iterable[str]:
    """A line for each part in `own` that the module has not."""
    names = [name for name, _ in (*whole.named_modules(), *whole.named_parameters()) if name]
    for part in slot.own:
        if part not in names:
            near = did_you_mean(part, [name for name in names if name.count(".") == part.count(".")])
            yield f"{part!r} names no part of {slot.cls.name!r}{near}"


def _tie(module: nn.Module, whole: nn.Module, own: Iterable[str]) -> None:
    """All of the module's parts become those of `whole`, but for `own`."""
    for name, part in whole.named_children():
        inner = [path.removeprefix(f"{name}.") for path in own if path.startswith(f"{name}.")]
        if name in own:
            continue
        if inner:
            _tie(module.get_submodule(name), part, inner)
        else:
            setattr(module, name, part)
    for name, tensor in (*whole.named_parameters(recurse=False), *whole.named_buffers(recurse=False)):
        if name not in own:
            setattr(module, name, tensor)


def distinct(modules: Iterable[Any]) -> list[Any]:
    """Each module once, in order."""
    return list(dict.fromkeys(modules))


def tied(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """Of different modules, those that have a parameter in common with another one."""
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in distinct(modules):
        for parameter in module.parameters():
            owners.setdefault(parameter, []).append(module)
    return {module for sharing in owners.values() if len(sharing) > 1 for module in sharing}
