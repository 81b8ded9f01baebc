"""A data source that a command names: by its name, or by options as in a recipe."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from distill_core.errors import RecipeErrors, did_you_mean, option_message
from distill_core.recipe.document import located, read_document

if TYPE_CHECKING:
    from distill_core.contracts.source import DataSource
    from distill_core.registry import Registry


def read_source(text: str, registry: Registry) -> DataSource | None:
    """The source that `text` names (`emoji`, `{name: webdataset, test: x.tar}`); None where it names none, as the name
    of a file does. Raises `RecipeErrors`."""
    if ("source", text) in registry.entries:
        text = f"{{name: {text}}}"
    if not (text.startswith("{") and text.rstrip().endswith("}")):  # `{a,b}.tar` is a name with braces
        return None
    document = read_document(text, "SOURCE")
    if unset := document.expand():
        raise RecipeErrors(
            [
                f"{located(document.origin(path), path)}: the environment variable {name} is not set"
                for path, name in unset
            ]
        )
    options = dict(document.data)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise RecipeErrors([f"{document.name}: needs a name: a data source, as {{name: ...}}"])
    try:
        cls: Any = registry.get("source", name).cls
    except KeyError as error:
        raise RecipeErrors([f"{document.name}: {error.args[0]}"]) from error
    try:
        source: DataSource = cls(cls.Config.model_validate_json(json.dumps(options)))
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            path, what = item["loc"], option_message(item)
            if item["type"] == "extra_forbidden":
                options_known = [field.alias or option for option, field in cls.Config.model_fields.items()]
                what = f"unknown option {path[-1]!r}{did_you_mean(str(path[-1]), options_known)}"
            lines.append(f"{located(document.origin(path), path)}: {what}")
        raise RecipeErrors(lines) from error
    return source
