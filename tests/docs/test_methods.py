"""docs/methods.md: a row of one shape for every method; its deviations and published settings are where it says."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
TINY = sorted([*RECIPES.glob("*_tiny.yaml"), *RECIPES.glob("pretrained/*.yaml")])
PUBLISHED = sorted(file.stem for file in [*RECIPES.glob("published/*.yaml"), RECIPES / "cosmos_vitb16.yaml"])


def rows() -> list[list[str]]:
    """The cells of the table's rows."""
    text = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    table = re.search(r"\| method .*\n\|[-|]+\|\n((?:\|.*\n)+)", text)
    assert table is not None
    return [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in table[1].splitlines()]


def words(cell: str) -> set[str]:
    """What stands between backquotes."""
    return set(re.findall(r"`([^`]+)`", cell))


def sections() -> dict[str, list[str]]:
    """Of docs/deviations.md: anchor -> the items of its list."""
    parts = (ROOT / "docs/deviations.md").read_text(encoding="utf-8").split("\n## ")[1:]
    anchor = {part.partition("\n")[0]: part for part in parts}
    return {
        re.sub(r"[^a-z0-9 -]", "", name.lower()).replace(" ", "-"): re.findall(r"^- ", part, re.M)
        for name, part in anchor.items()
    }


def test_rows_have_one_shape() -> None:
    """Method, paper and phrase, recipe, parts, published setting, deviations, score; as many deviations as it says."""
    found = sections()
    for row in rows():
        assert len(row) == 6, row
        method, recipe, parts, published, deviations, score = row
        assert re.fullmatch(r"\[[^]]+\]\(https://arxiv\.org/abs/\d{4}\.\d{5}\): [^.]+", method), method
        assert words(recipe)
        assert parts
        assert published == "-" or words(published)
        match = re.fullmatch(r"\[(\d+)\]\(deviations\.md#([a-z0-9-]+)\)", deviations)
        assert match is not None, deviations
        assert len(found.pop(match[2])) == int(match[1]), f"{method}: docs/deviations.md lists another number"
        assert re.match(r"-$|\d|kNN \d|mIoU \d", score), score
    assert found == {}, "docs/deviations.md has a method that is not in docs/methods.md"


@pytest.mark.parametrize("file", TINY, ids=lambda file: file.stem)
def test_every_method_has_a_row(file: Path) -> None:
    """And the row names each loss of the recipe, or the row of the method that it is made of."""
    of_recipe = [row for row in rows() if file.stem in words(row[1])]
    assert of_recipe, f"docs/methods.md has no row with `{file.stem}`"
    losses = {loss["name"] for loss in yaml.safe_load(file.read_text(encoding="utf-8"))["loss"]}
    named = set().union(*(words(row[2]) for row in of_recipe))
    assert losses <= named or any("'s" in row[2] or " and " in row[2] for row in of_recipe), losses - named


def test_every_published_setting_is_named() -> None:
    """Catches a recipe that is in no row, and a row that names one that is not there."""
    patterns = set().union(*(words(row[3]) for row in rows()))
    assert [name for name in PUBLISHED if not any(fnmatch(name, pattern) for pattern in patterns)] == []
    assert [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in PUBLISHED)] == []
    told = (ROOT / "docs/published.md").read_text(encoding="utf-8")
    assert [name for name in PUBLISHED if name.partition("_")[0] not in told] == []
