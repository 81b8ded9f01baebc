"""The study file: what variants it stands for, and what is said of a wrong one."""

from pathlib import Path

import pytest

from distill_core.errors import RecipeErrors
from distill_core.recipe.document import read_document
from distill_study.grammar import Study, label_of, make_study, swaps_document


def read(text: str) -> Study:
    return make_study(read_document(text, "s.yaml"), Path("place"), "s")


def errors(text: str) -> list[str]:
    with pytest.raises(RecipeErrors) as caught:
        read(text)
    return caught.value.lines


def test_variants_and_their_changes() -> None:
    study = read(
        "recipe: a.yaml\n"
        "name: mine\n"
        "set: [train.threads=1]\n"
        "seeds: [3, 1]\n"
        "base: heads\n"
        "variants:\n"
        "  plain: {}\n"
        "  heads: {fusion.heads: 2, 'data.source': {name: emoji, tiny: 1e-05}}\n"
        "  listed: [fusion=null, 'loss.1.weight=0.5']\n"
        "  other: {recipe: ../b.yaml}\n"
    )
    assert (study.name, study.seeds, study.base) == ("mine", (3, 1), "heads")
    assert study.shared == (("train.threads=1", "s.yaml:3"),)
    assert [(v.name, v.recipe, [change for change, _ in v.changes]) for v in study.variants] == [
        ("plain", "place/a.yaml", []),
        ("heads", "place/a.yaml", ["fusion.heads=2", 'data.source={"name": "emoji", "tiny": 1e-05}']),
        ("listed", "place/a.yaml", ["fusion=null", "loss.1.weight=0.5"]),
        ("other", "place/../b.yaml", []),
    ]
    assert [origin for _, origin in study.variants[1].changes] == ["s.yaml:8", "s.yaml:8"]


SWAPS = "recipe: a.yaml\nswaps:\n  fusion: [null, {name: gated, heads: 2}]\n  loss.1.weight: {off: 0, on: 1}\n"


def test_a_grid_is_every_combination() -> None:
    study = read(SWAPS)
    assert [(v.label, [change for change, _ in v.changes]) for v in study.variants] == [
        ("fusion=none, loss.1.weight=off", ["fusion=null", "loss.1.weight=0"]),
        ("fusion=none, loss.1.weight=on", ["fusion=null", "loss.1.weight=1"]),
        ("fusion=gated(heads=2), loss.1.weight=off", ['fusion={"name": "gated", "heads": 2}', "loss.1.weight=0"]),
        ("fusion=gated(heads=2), loss.1.weight=on", ['fusion={"name": "gated", "heads": 2}', "loss.1.weight=1"]),
    ]
    assert study.base == study.variants[0].name == "fusion-none-loss.1.weight-off"


def test_one_at_a_time_starts_from_the_recipe_as_it_is() -> None:
    study = read(SWAPS + "design: one_at_a_time\n")
    assert [(v.name, len(v.changes)) for v in study.variants] == [
        ("base", 0),
        ("fusion-none", 1),
        ("fusion-gated-heads-2", 1),
        ("loss.1.weight-off", 1),
        ("loss.1.weight-on", 1),
    ]
    assert study.base == "base"


def test_names_that_fall_together_are_told_apart() -> None:
    study = read("recipe: a.yaml\nswaps:\n  freeze: [[a, b], ['a', 'b c'], ['a b', c]]\n")
    assert len({variant.name for variant in study.variants}) == 3


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "none"),
        ({"name": "gated", "heads": 1}, "gated(heads=1)"),
        ({"name": "gated"}, "gated"),
        ({"momentum": 0.9}, "(momentum=0.9)"),
        ({}, "(defaults)"),
        ([1, 2], "[1, 2]"),
    ],
)
def test_values_as_labels(value: object, words: str) -> None:
    """Would catch a mapping without a name as JSON, beside components that read as calls."""
    assert label_of(value) == words


def test_swaps_of_the_command_line() -> None:
    document = swaps_document("r.yaml", ["fusion=none, {name: gated, heads: 2}", "loss.1.weight=0,1e-1"])
    assert document.data["swaps"] == {"fusion": ["none", {"name": "gated", "heads": 2}], "loss.1.weight": [0, 0.1]}
    study = make_study(document, Path(), "r")
    assert len(study.variants) == 4
    assert study.variants[0].changes[0] == ('fusion="none"', "--swap fusion")


@pytest.mark.parametrize(
    ("swaps", "line"),
    [
        (["fusion"], "--swap fusion: write it as path=value,value, as fusion=none,cross_attention"),
        (["fusion="], "--swap fusion=: write it as path=value,value, as fusion=none,cross_attention"),
        (["a=1", "a=2"], "--swap a: given twice; name all its values in one"),
    ],
)
def test_wrong_swaps_of_the_command_line(swaps: list[str], line: str) -> None:
    with pytest.raises(RecipeErrors) as caught:
        swaps_document("r.yaml", swaps)
    assert caught.value.lines == [line]


def test_all_that_is_wrong_at_once_with_its_line() -> None:
    assert errors(
        "recipe: a.yaml\n"
        "seeds: [1, 1]\n"
        "base: plian\n"
        "budget:\n"
        "  steps: 3\n"
        "  seconds: 4\n"
        "variants:\n"
        "  plain: {seed: 3}\n"
        "  'a b': {}\n"
        "  long:\n"
        "    train.steps: 7\n"
        "  worse: 3\n"
        "  worst: [3]\n"
    ) == [
        "s.yaml:4: budget: give one of `steps`, `samples` and `seconds`",
        "s.yaml:8: variants.plain.seed: 'seed' is set by the study; see `seeds`",
        "s.yaml:9: variants.a b: a variant's name is a word of letters, digits, - . and _",
        "s.yaml:11: variants.long.train.steps: 'train.steps' and `budget` are both given; remove one",
        "s.yaml:12: variants.worse: changes are {path: value} or a list of path=value",
        "s.yaml:13: variants.worst.0: write it as path=value, for example loss.1.weight=0.5",
        "s.yaml:3: base: no variant 'plian', did you mean 'plain'?",
        "s.yaml:2: seeds.1: seed 1 is given twice",
    ]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("variants: {a: {}}\n", ["s.yaml:1: recipe: is required and not given"]),
        ("recipe: a.yaml\n", ["s.yaml:1: give `variants` or `swaps`, one of them"]),
        ("recipe: a.yaml\nvariants: {a: {}}\nswaps: {a: [1]}\n", ["s.yaml:1: give `variants` or `swaps`, one of them"]),
        ("recipe: a.yaml\nvariants: {}\n", ["s.yaml:2: variants: there is no variant"]),
        ("recipe: a.yaml\nswaps: {x: 3}\n", ["s.yaml:2: swaps.x: needs the values to try: a list, or {name: value}"]),
        (
            "recipe: a.yaml\nvariant: {a: {}}\n",
            ["s.yaml:2: variant: unknown option 'variant', did you mean 'variants'?"],
        ),
        (
            "recipe: a.yaml\nvariants: {a: {}}\nseeds: [0, x]\nbudget: {step: 3}\n",
            [
                "s.yaml:3: seeds.1: must be an integer, got 'x'",
                "s.yaml:4: budget.step: unknown option 'step', did you mean 'steps'?",
            ],
        ),
        (
            "recipe: a.yaml\nswaps: {seed: [1, 2]}\n",
            ["s.yaml:2: swaps.seed: 'seed' is set by the study; see `seeds`"],
        ),
    ],
)
def test_wrong_studies(text: str, lines: list[str]) -> None:
    assert errors(text) == lines
