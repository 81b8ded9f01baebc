"""The JSON schema of a recipe, with the components of all installed plugins, so that editors complete and check YAML.

It holds what one value can be checked for; what components need of one another `distill validate` says.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from distill_core.tools import DEFAULTS, OPTIONAL, SLOTS, Entry, Frame, Registry, summary

Schema = dict[str, Any]

VARIABLE: Schema = {"$ref": "#/$defs/variable"}
NONE: Schema = {"type": "string", "pattern": "^[Nn][Oo][Nn][Ee]$", "description": "As null."}
_DEFINITIONS: dict[str, Schema] = {
    "variable": {
        "type": "string",
        "pattern": r"\$\{[A-Za-z_][A-Za-z0-9_]*\}",
        "description": "An environment variable, as ${NAME}.",
    },
    "id": {
        "type": "string",
        "pattern": "^[A-Za-z0-9_][A-Za-z0-9_-]*$",
        "description": "What its terms, scores and paths are named after, where the name is not enough.",
    },
}


INSIDE = {("evaluate", "tasks", "#", "source")}
"""Places among a component's own options."""


def recipe_schema(registry: Registry) -> Schema:
    """JSON schema (draft 7, which editors know best) of a recipe as it is written, before `${NAME}` and `--set`."""
    root = Frame.model_json_schema()
    definitions: dict[str, Schema] = root.pop("$defs")
    root["properties"]["name"].pop("pattern", None)  # ${NAME} may stand in it; the file's name is the default
    root["required"] = [name for name in root["required"] if name != "name"]
    for path, kind in SLOTS:
        if path in INSIDE:
            continue
        holder, key = _holder(root, definitions, path)
        old = holder[key]
        nullable = {"type": "null"} in old.get("anyOf", [])
        kept = {name: old[name] for name in ("description", "default") if name in old}
        holder[key] = _place(registry, kind, nullable, DEFAULTS.get(path)) | kept
    for path in OPTIONAL:
        holder, key = _holder(root, definitions, path)
        old = holder[key]
        kept = {name: old[name] for name in ("description", "default") if name in old}
        holder[key] = {"anyOf": [old, {"type": "null"}, NONE]} | kept
    for entry in registry.entries.values():
        definitions |= _component(registry, entry)
    whole = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A recipe of distill",
        **{key: value for key, value in root.items() if key != "title"},
        "$defs": definitions,
    }
    written: Schema = _as_written(whole)
    written["$defs"] |= _DEFINITIONS
    return written


def _holder(root: Schema, definitions: dict[str, Schema], path: tuple[str | int, ...]) -> tuple[Schema, str]:
    """The mapping that holds the schema of a place of the recipe, and its key there."""
    here = root
    for i, part in enumerate(path):
        while "$ref" in here or "anyOf" in here:
            if "$ref" in here:
                here = definitions[here["$ref"].rpartition("/")[2]]
            else:
                here = next(choice for choice in here["anyOf"] if choice.get("type") != "null")
        holder, key = (
            (here, {"*": "additionalProperties", "#": "items"}[str(part)])
            if part in ("*", "#")
            else (
                here["properties"],
                str(part),
            )
        )
        if i + 1 == len(path):
            return holder, key
        here = holder[key]
    raise ValueError("an empty path")


def _place(registry: Registry, kind: str, nullable: bool, default: str | None) -> Schema:
    """A component's place: options with a name, a bare name, and null where the recipe may lack it."""
    entries = sorted((entry for (k, _), entry in registry.entries.items() if k == kind), key=lambda e: e.cls.name)
    variants: list[Schema] = []
    for entry in entries:
        unnamed = {} if entry.cls.name == default else {"required": ["name"]}
        variants.append({"allOf": [{"$ref": f"#/$defs/{kind}.{entry.cls.name}"}], **unnamed})
    # a name from the environment: its options are anybody's
    variants.append({"type": "object", "required": ["name"], "properties": {"name": VARIABLE}})
    choices: list[Schema] = [{"oneOf": variants}, {"enum": [entry.cls.name for entry in entries]}]
    if nullable:
        choices += [{"type": "null"}, NONE]
    return {"anyOf": choices}


def _component(registry: Registry, entry: Entry) -> dict[str, Schema]:
    """The definitions of a component and of what its options nest."""
    kind, name = entry.cls.kind, entry.cls.name
    config: type[BaseModel] = entry.cls.Config
    own = config.model_json_schema(ref_template=f"#/$defs/{kind}.{name}.{{model}}")
    nested = {f"{kind}.{name}.{model}": schema for model, schema in own.pop("$defs", {}).items()}
    about = summary(entry.cls)
    own["title"] = f"{name} ({kind} of {entry.package})"
    own["description"] = about
    own["properties"] = {
        "name": {"const": name, "description": f"{kind}: {about}"},
        "id": {"$ref": "#/$defs/id", "description": _DEFINITIONS["id"]["description"]},
        **own.get("properties", {}),
    }
    if kind == "task":
        own["properties"]["source"] = {
            **_place(registry, "source", True, None),
            "description": "Data of its own, in place of the recipe's.",
        }
    return {f"{kind}.{name}": own, **nested}


def _as_written(schema: Any) -> Any:
    """Draft 7 where pydantic writes 2020-12, and `${NAME}` wherever a value may stand."""
    if isinstance(schema, list):
        return [_as_written(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
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
            result[key] = _value(_as_written(value))
        else:
            result[key] = _as_written(value)
    return result


def _value(schema: Schema, name: str = "") -> Schema:
    """The schema of a value, or a variable in its place."""
    if schema == VARIABLE or (name == "name" and "const" in schema) or _takes_any_string(schema):
        return schema
    kept: Schema = {key: schema[key] for key in ("description", "default", "title") if key in schema}
    return {"anyOf": [schema, VARIABLE], **kept}


def _takes_any_string(schema: Schema) -> bool:
    if any(_takes_any_string(choice) for choice in schema.get("anyOf", ())):
        return True
    return schema.get("type") == "string" and not {"pattern", "enum", "const", "format"} & schema.keys()
