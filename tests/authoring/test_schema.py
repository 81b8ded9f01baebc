"""The JSON schema of recipes: what is shipped passes, what the grammar allows passes, what is wrong does not."""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from distill_authoring.schema import recipe_schema
from distill_core.cli import main
from distill_core.errors import RecipeErrors
from distill_core.recipe.document import read_document
from distill_core.recipe.resolve import load_recipe, parse_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry

ROOT = Path(__file__).parents[2]
RECIPES = sorted(
    path
    for path in ROOT.glob("recipes/**/*.yaml")
    if {"augment", "loss"} <= set(read_document(path.read_text(), "").data)
)

RECIPE = """
augment: {image: {name: random_crop}, text: {name: caption}}
backbone: {image: {name: vit}, text: {name: clip_text}}
fusion: null
loss: [{name: contrastive}, {name: clip, weight: 0.5}]
data: {source: {name: emoji}}
train: {steps: 3, optimizer: {name: adamw, lr: 1e-3}}
"""


@pytest.fixture(scope="module")
def schema(registry: Registry) -> dict[str, Any]:
    return recipe_schema(registry)


@pytest.fixture(scope="module")
def validator(schema: dict[str, Any]) -> jsonschema.Draft7Validator:
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


def data(text: str) -> Any:
    return read_document(text, "recipe").data


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_validate(path: Path, validator: jsonschema.Draft7Validator, registry: Registry) -> None:
    """As they are written, and as a run writes them out with every default."""
    assert list(validator.iter_errors(data(path.read_text()))) == []
    resolved = load_recipe(path, registry=registry, allow_unset=True).to_yaml()
    assert list(validator.iter_errors(data(resolved))) == []


def test_there_are_recipes() -> None:
    assert {"cosmos_tiny", "clip_tiny", "cosmos_vitb16"} <= {path.stem for path in RECIPES}


ALLOWED = [
    ("fusion", "cross_attention"),
    ("fusion", "none"),
    ("fusion", {"name": "cross_attention", "heads": 4}),
    ("loss.0", "contrastive"),
    ("loss.1", None),
    ("loss.1.id", "mine"),
    ("teacher", None),
    ("teacher", "none"),
    ("teacher", {"momentum": 1}),
    ("tracking", None),
    ("evaluate", None),
    ("evaluate", {"tasks": None}),
    ("evaluate", {"tasks": ["retrieval", None, {"name": "zero_shot", "id": "other"}]}),
    ("evaluate", {"tasks": [{"name": "knn", "source": {"name": "class_folder", "train": "a", "test": "b"}}]}),
    ("evaluate", {"tasks": [{"name": "zero_shot", "templates": "openai"}]}),
    ("weights", "none"),
    ("weights", [{"name": "state_dict", "source": "w.pt"}]),
    ("train.optimizer", {"lr": 0.1}),
    ("train.schedule", {"warmup": 0.5}),
    ("train.optimizer", "adamw"),
    ("data.source", "emoji"),
    ("data.source", {"name": "webdataset", "urls": {"set": ["a.tar", "b.tar"]}}),
    ("augment.image.scale", [0.5, 1]),
    ("augment.text.layout", "dreamlip"),
    ("augment.text.layout", {"name": "txt"}),
    ("augment.text.layout", {}),
]

VARIABLES = [
    ("loss.1.weight", "${NUMBER}"),
    ("seed", "${NUMBER}"),
    ("augment.image.scale", ["${NUMBER}", 1.0]),
    ("train.precision", "${WORD}"),
    ("fusion", "${NOTHING}"),
    ("fusion", {"name": "${FUSION}", "heads": 8}),
    ("train.optimizer", {"betas": "${PAIR}"}),
    ("evaluate", {"every": "${NUMBER}"}),
    ("name", "run-${NUMBER}"),
]
ENVIRONMENT = {"NUMBER": "1", "WORD": "bf16", "NOTHING": "null", "FUSION": "cross_attention", "PAIR": "[0.9, 0.95]"}

WRONG = [
    ("losses", []),
    ("loss.0", "contrastiv"),
    ("loss.0.name", "contrastiv"),
    ("loss.0.name", "vit"),
    ("loss.0.wieght", 1.0),
    ("loss.0.weight", "much"),
    ("loss.0.weight", "1.0"),
    ("loss.0.weight", -1.0),
    ("loss.0.modalities", ["image", "text", "text"]),
    ("loss.0", {"weight": 1.0}),
    ("loss", "contrastive"),
    ("loss", []),
    ("fusion", {"heads": 4}),
    ("fusion", {"name": "cross_attention", "form": "fast"}),
    ("backbone.image.patch", 8.5),
    ("data.source", None),
    ("data.source", {"name": "karpathy"}),
    ("train.optimizer", None),
    ("train.optimizer", {"lr": 0.1, "momentum": 0.9}),
    ("train.steps", "many"),
    ("train.precision", "fp16"),
    ("teacher", {"momentum": 2}),
    ("teacher", "always"),
    ("evaluate", {"tasks": ["contrastive"]}),
    ("evaluate", {"tasks": [{"name": "knn", "source": {"name": "emoji", "sizes": 3}}]}),
    ("loss.1.id", "a.b"),
    ("seed", "${NUMBER"),
    ("augment.text.layout", "dreamlap"),
    ("augment.text.layout", None),
    ("augment.text.layout", {"name": "txt", "field": "txt"}),
]


def changed(path: str, value: Any) -> Any:
    """The recipe with one value replaced."""
    document = copy.deepcopy(data(RECIPE))
    *above, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    node = document
    for part in above:
        node = node[part]
    node[last] = value
    return document


@pytest.mark.parametrize(("path", "value"), ALLOWED, ids=str)
def test_what_the_grammar_allows_validates(
    path: str, value: Any, validator: jsonschema.Draft7Validator, registry: Registry
) -> None:
    """Would catch a schema that is narrower than the grammar; that the grammar allows it is checked as well."""
    document = changed(path, value)
    errors = [line for line in refused(document, registry) if "needs a teacher" not in line]
    assert errors == []
    assert list(validator.iter_errors(document)) == []


@pytest.mark.parametrize(("path", "value"), VARIABLES, ids=str)
def test_variables_may_stand_for_any_value(
    path: str, value: Any, validator: jsonschema.Draft7Validator, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`${NAME}` becomes a number, a list, null or a name when the recipe is read."""
    for name, text in ENVIRONMENT.items():
        monkeypatch.setenv(name, text)
    document = changed(path, value)
    assert refused(document, registry) == []
    assert list(validator.iter_errors(document)) == []


@pytest.mark.parametrize(("path", "value"), WRONG, ids=str)
def test_what_is_wrong_does_not_validate(
    path: str, value: Any, validator: jsonschema.Draft7Validator, registry: Registry
) -> None:
    """Unknown keys, components and words, wrong types and ranges. `distill validate` refuses the same."""
    document = changed(path, value)
    assert refused(document, registry) != []
    assert list(validator.iter_errors(document)) != []


def refused(document: Any, registry: Registry) -> list[str]:
    """What `distill validate` says of it; JSON is YAML."""
    try:
        parse_recipe(json.dumps(document), "recipe", registry=registry)
    except RecipeErrors as error:
        return error.lines
    return []


def places(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, definition in schema["$defs"].items():
        for option, described in definition.get("properties", {}).items():
            yield f"{name}.{option}", described
    for section, described in schema["properties"].items():
        yield section, described


def test_options_carry_their_description_and_default(schema: dict[str, Any], registry: Registry) -> None:
    """What an editor shows. Would catch a description that is lost where a variable is allowed beside the type."""

    def told(described: dict[str, Any]) -> bool:
        inner = [described, *described.get("anyOf", ())]
        named = [schema["$defs"][one["$ref"].rpartition("/")[2]] for one in inner[:2] if "$ref" in one]
        return any("description" in one for one in (described, *named))

    assert [where for where, described in places(schema) if not told(described)] == []
    heads = schema["$defs"]["fusion.cross_attention"]["properties"]["heads"]
    assert heads["default"] == 8
    assert heads["description"] == "Attention heads; they divide the embedding width D."
    assert set(schema["properties"]) == {field.alias or name for name, field in Recipe.model_fields.items()}
    assert {f"{kind}.{name}" for kind, name in registry.entries} <= set(schema["$defs"])


def test_the_command_prints_it(schema: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    main(["schema"])
    assert json.loads(capsys.readouterr().out) == schema
    assert os.environ.get("DISTILL_WITHOUT") is None
