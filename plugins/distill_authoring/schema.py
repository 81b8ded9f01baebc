"""The JSON schema of a recipe, with the components of all installed plugins, so that editors complete and check YAML.

It checks single values; what components need of one another is checked by `distill validate`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from distill_core.tools import JSON_KEY, NONE, UNNAMED_KEY, Entry, Recipe, Registry, summary

Schema = dict[str, Any]

VARIABLE: Schema = {"$ref": "#/$defs/variable"}
_DEFINITIONS: dict[str, Schema] = {
    "variable": {
        "type": "string",
        "pattern": r"\$\{[A-Za-z_][A-Za-z0-9_]*\}",
        "description": "An environment variable, as ${NAME}.",
    },
    "id": {
        "type": "string",
        "pattern": "^[A-Za-z0-9_][A-Za-z0-9_-]*$",
        "description": "Names its terms, scores and paths, where the component's name is ambiguous.",
    },
}


def recipe_schema(registry: Registry) -> Schema:
    """JSON schema (draft 7, which editors know best) of a recipe as it is written, before `${NAME}` and `--set`."""
    root = Recipe.model_json_schema()
    definitions: dict[str, Schema] = root.pop("$defs")
    root["properties"]["name"].pop("pattern", None)  # it may contain ${NAME}; the file's name is the default
    root["required"] = [name for name in root["required"] if name != "name"]
    for entry in registry.entries.values():
        definitions |= _component(entry)
    for kind in {*registry.interfaces, *_kinds([root, definitions])}:  # a plugin's kind may have no component yet
        definitions[kind] = _any_of_kind(registry, kind)
    document = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A recipe of distill",
        **{key: value for key, value in root.items() if key != "title"},
        "$defs": definitions,
    }
    result: Schema = _as_written(document)
    result["$defs"] |= _DEFINITIONS
    return result


def _kinds(schema: Any) -> Iterator[str]:
    """Those of the slots in it."""
    if isinstance(schema, dict) and JSON_KEY in schema:
        yield schema[JSON_KEY]
    for item in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _kinds(item)


def _any_of_kind(registry: Registry, kind: str) -> Schema:
    """Options with a name, or a bare name."""
    names = sorted(name for k, name in registry.entries if k == kind)
    variants: list[Schema] = [{"allOf": [{"$ref": f"#/$defs/{kind}.{name}"}], "required": ["name"]} for name in names]
    # a name from the environment: its options are unknown
    variants.append({"type": "object", "required": ["name"], "properties": {"name": VARIABLE}})
    return {"anyOf": [{"oneOf": variants}, {"enum": names}]}


def _slot(schema: Schema) -> Schema:
    """A slot: any component of its kind; options without a name are those of its default component."""
    kind, rest = schema[JSON_KEY], {key: value for key, value in schema.items() if key != JSON_KEY}
    choices: list[Schema] = [{"$ref": f"#/$defs/{kind}"}]
    default = schema.get("default")
    name = rest.pop(UNNAMED_KEY, default["name"] if isinstance(default, dict) else None)
    if name is not None:
        choices.append({"allOf": [{"$ref": f"#/$defs/{kind}.{name}"}, {"not": {"required": ["name"]}}]})
    return {"anyOf": choices, **rest}


def _component(entry: Entry) -> dict[str, Schema]:
    """The definitions of a component and of what its options nest."""
    kind, name = entry.cls.kind, entry.cls.name
    config: type[BaseModel] = entry.cls.Config
    definition = config.model_json_schema(ref_template=f"#/$defs/{kind}.{name}.{{model}}")
    nested = {f"{kind}.{name}.{model}": schema for model, schema in definition.pop("$defs", {}).items()}
    about = summary(entry.cls)
    definition["title"] = f"{name} ({kind} of {entry.package})"
    definition["description"] = about
    definition["properties"] = {
        "name": {"const": name, "description": f"{kind}: {about}"},
        "id": {"$ref": "#/$defs/id", "description": _DEFINITIONS["id"]["description"]},
        **definition.get("properties", {}),
    }
    return {f"{kind}.{name}": definition, **nested}


def _as_written(schema: Any) -> Any:
    """Draft 7 where pydantic writes 2020-12, and `${NAME}` wherever a value may stand."""
    if isinstance(schema, list):
        return [_as_written(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if JSON_KEY in schema:
        return _slot(schema)
    choices = schema.get("anyOf", [])
    if any(JSON_KEY in choice for choice in choices):
        inherited = {key: schema[key] for key in ("default", UNNAMED_KEY) if key in schema}
        slots = [_slot(choice | inherited) if JSON_KEY in choice else choice for choice in choices]
        rest = {key: value for key, value in schema.items() if key != UNNAMED_KEY}
        schema = {**rest, "anyOf": [*slots, *([NONE] if {"type": "null"} in choices else [])]}
    result: Schema = {}
    for key, value in schema.items():
        if key in ("default", "const", "enum", "examples", "required"):
            result[key] = value
        elif key == "properties":
            result[key] = {name: _value(_as_written(item), name) for name, item in value.items()}
        elif key == "$defs":
            result[key] = {name: _as_written(item) for name, item in value.items()}
        elif key == "prefixItems":
            result["items"] = [_value(_as_written(item)) for item in value]
            result["additionalItems"] = False
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            slots = value.get("anyOf", [value])
            if any(JSON_KEY in slot for slot in slots):
                value = {"anyOf": [*slots, {"type": "null"}]}  # null removes the item
            result[key] = _value(_as_written(value))
        else:
            result[key] = _as_written(value)
    return result


def _value(schema: Schema, name: str = "") -> Schema:
    """The schema of a value, or a variable in its place."""
    if schema == VARIABLE or (name == "name" and "const" in schema) or _takes_any_string(schema):
        return schema
    annotations: Schema = {key: schema[key] for key in ("description", "default", "title") if key in schema}
    return {"anyOf": [schema, VARIABLE], **annotations}


def _takes_any_string(schema: Schema) -> bool:
    if any(_takes_any_string(choice) for choice in schema.get("anyOf", ())):
        return True
    return schema.get("type") == "string" and not {"pattern", "enum", "const", "format"} & schema.keys()
