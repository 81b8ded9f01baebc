"""A place that takes a component: `Slot[Loss]` is a field of a recipe's section, or of any component's `Config`.

It is written `{name: NAME, ...the component's options}`, or as the bare name; `Slot[A | B]` takes components of either
kind. Pydantic validates the options as part of whatever holds the slot, so that all errors come at once, each with its
whole path. The component is looked up in the registry, which the validation's context holds:
`Model.model_validate_json(text, context=Context(registry))`.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, Union, get_args, get_origin

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError, ValidationInfo
from pydantic.fields import FieldInfo
from pydantic_core import (
    CoreSchema,
    InitErrorDetails,
    PydanticCustomError,
    PydanticOmit,
    PydanticUseDefault,
    core_schema,
)
from torch import nn

from distill_core.contracts.component import Component, ComponentConfig
from distill_core.errors import KeyPath, UserError, option_message

C = TypeVar("C", bound=Component)
PLACE = "@"
"""Key under which a recipe's reader writes a component's place in the document beside its options; a list's item that
`null` removes is written `{PLACE: null}`."""
JSON_KEY = "x-component"
"""Key of a JSON schema that stands for any component of the kind that it holds."""
UNNAMED_KEY = "x-unnamed"
"""Key of a JSON schema of a slot that takes a component's options without its name: that component."""
NONE = {"type": "string", "pattern": "^[Nn][Oo][Nn][Ee]$", "description": "As null."}
"""JSON schema of the word that a recipe may write for null, where null stands for no component or no section."""

_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
# attributes of torch's containers, which a module below them cannot be named after
_RESERVED = frozenset(dir(nn.ModuleDict()))


def is_word(value: Any) -> bool:
    """Whether it can name a part of a path, of a score, and of a torch module."""
    return isinstance(value, str) and _WORD.fullmatch(value) is not None and value not in _RESERVED


class Components(Protocol):
    """Where components are looked up: the registry."""

    def get(self, kind: str, name: str, *others: str) -> Any:
        """An entry, with the component's `cls` and `package`; `others` are further kinds of which it may be. Raises
        KeyError with a message for the user."""


@dataclass
class Context:
    """What slots are validated with, and by place those that were valid, whatever else was wrong around them."""

    registry: Components
    slots: dict[KeyPath, Slot[Any]] = field(default_factory=dict)


class Slot(Generic[C]):
    """A component's class and validated options."""

    # not a dataclass: pydantic would validate its fields, in place of the component's options

    def __init__(self, cls: type[C], config: Any, id: str = "", package: str = "", place: KeyPath = ()) -> None:
        self.cls, self.config = cls, config
        self.id = id or cls.name
        """What its terms, scores and paths are named after: its name, where the recipe gives none."""
        self.package = package
        """The package that brought the component; "" where a class names it as a default."""
        self.place = place

    def __eq__(self, other: object) -> bool:
        identity = (self.cls, self.config, self.id)
        return isinstance(other, Slot) and identity == (other.cls, other.config, other.id)

    def __repr__(self) -> str:
        return f"Slot({self.cls.name!r}, {self.config!r}, id={self.id!r}, place={self.path!r})"

    @property
    def path(self) -> str:
        """Its place in the recipe, with dots: `loss.1`."""
        return ".".join(str(part) for part in self.place)

    def build(self, *arguments: Any) -> C:
        """The component; a ValueError of its constructor becomes a `UserError` that names its path."""
        make: Callable[..., C] = self.cls
        try:
            return make(self.config, *arguments)
        except ValueError as error:
            raise UserError(f"{self.path}: {self.cls.name}: {error}") from error

    def dump(self) -> dict[str, Any]:
        """As a recipe would write it, with every default."""
        named = {"name": self.cls.name, **({"id": self.id} if self.id != self.cls.name else {})}
        return {**named, **self.config.model_dump(mode="json", by_alias=True)}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        interfaces = interfaces_of(source)

        def validate(value: Any, info: ValidationInfo) -> Slot[Any]:
            return resolve_slot(interfaces, value, info.context)

        slots: list[dict[str, Any]] = [{JSON_KEY: interface.kind} for interface in interfaces]
        json_schema = slots[0] if len(slots) == 1 else {"anyOf": slots}

        return core_schema.with_info_plain_validator_function(
            validate,
            serialization=core_schema.plain_serializer_function_ser_schema(lambda slot: slot.dump()),
            metadata={"pydantic_js_functions": [lambda schema, handler: dict(json_schema)]},
        )


def interfaces_of(annotation: Any) -> tuple[type[Component], ...]:
    """The T of `Slot[T]`, or several. Raises TypeError for anything else."""
    if get_origin(annotation) is not Slot:
        raise TypeError(f"{annotation!r}: write the interface of the components that it takes, as Slot[Loss]")
    (interface,) = get_args(annotation)
    return get_args(interface) if get_origin(interface) in (Union, types.UnionType) else (interface,)


def default_component(component: str | type[Component]) -> Any:
    """The default of a slot: this component. Options that are written without a name are then its.

    A name is looked up in the registry; of a class, the options around the slot are also made without one, by hand.
    """
    if isinstance(component, str):
        return Field({"name": component}, validate_default=True)
    return Field(
        default_factory=lambda: Slot(component, component.Config()),
        json_schema_extra={"default": {"name": component.name}},
    )


def default_of(field: FieldInfo) -> Any:
    """An option's default as a recipe writes it, a component as {name: NAME}; None where it is required."""
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    return default.dump() if isinstance(default, Slot) else default


@dataclass(frozen=True)
class Unnamed:
    """Marks an option (`Annotated[Slot[...] | None, Unnamed("NAME")]`): options that a recipe writes without a name are
    those of this component. Unlike `default_component`, nothing written is no component."""

    name: str

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), UNNAMED_KEY: self.name}


class NullIsDefault:
    """Marks an option (`Annotated[..., NullIsDefault()]`) that a recipe empties with `null`: it takes its default."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        # not a function before it: what that hands on is no longer JSON, in which a list may stand for a tuple
        return core_schema.no_info_after_validator_function(
            _default_for_null, core_schema.nullable_schema(handler(source))
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [handler(schema.get("schema", schema)), NONE]}


def _default_for_null(value: Any) -> Any:
    if value is None:
        raise PydanticUseDefault
    return value


def resolve_slot(interfaces: Sequence[type[Component]], value: Any, context: Any) -> Slot[Any]:
    """A `Slot` of a component that implements one of the interfaces. Raises `ValidationError`."""
    if isinstance(value, Slot) and issubclass(value.cls, tuple(interfaces)):
        return value
    if not isinstance(context, Context):
        raise TypeError("a component is looked up in a registry: validate with context=Context(registry)")
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        raise PydanticCustomError("dict_type", "must be a mapping")
    options = dict(value)
    place = options.pop(PLACE, ())
    if place is None:
        raise PydanticOmit
    kinds = [interface.kind for interface in interfaces]
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise PydanticCustomError(
            "unnamed_component", f"needs a name: a component of kind {kinds[0]}, as {{name: ...}}"
        )
    errors: list[InitErrorDetails] = []
    own_id = options.pop("id", None)
    if own_id is not None and not is_word(own_id):
        errors.append(detail("id", "an id is a word of letters, digits, - and _", ("id",), own_id))
    try:
        entry = context.registry.get(kinds[0], name, *kinds[1:])
    except KeyError as error:
        errors.append(detail("unknown_component", error.args[0], ("name",), name))
    else:
        config = _options(entry.cls.Config, options, context, errors)
    if errors:
        raise ValidationError.from_exception_data(kinds[0], errors)
    slot: Slot[Any] = Slot(entry.cls, config, own_id or name, entry.package, tuple(place))
    if slot.place:
        context.slots[slot.place] = slot
    return slot


def _options(
    model: type[ComponentConfig], options: Mapping[str, Any], context: Context, errors: list[InitErrorDetails]
) -> Any:
    """The component's options, read as JSON, in which a list may stand for a tuple; `errors` gains what is wrong."""
    try:
        return model.model_validate_json(json.dumps(options), context=context)
    except ValidationError as error:
        errors += details(error)
        return None


def details(error: ValidationError) -> list[InitErrorDetails]:
    """What is wrong with options, in our words, to be raised again by what is around them."""
    return [
        detail(item["type"], option_message(item), item["loc"], item["input"])
        for item in error.errors(include_url=False)
    ]


def detail(kind: str, message: str, place: KeyPath, value: Any) -> InitErrorDetails:
    """One thing that is wrong with an option's value."""
    # without a context of its own, the template is taken as it is
    return InitErrorDetails(type=PydanticCustomError(kind, message), loc=place, input=value)
