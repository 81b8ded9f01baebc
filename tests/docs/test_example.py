"""The example of docs/plugins.md: its length, and that a recipe alone puts it to use."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[2] / "docs"
PROJECT = DOCS / "example_plugin"
NAME = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["name"]
OUR_FUSION, OUR_LOSS = "fusion: {name: cross_attention, heads: 2}", "  - {name: cross_modal_distillation}"


@pytest.fixture
def recipe(tiny_recipe: Path) -> Path:
    """The tiny recipe with the lines that docs/plugins.md shows in place of COSMOS's."""
    shown = re.search(r"```yaml\n(fusion: .*\n)loss:\n.*contrastive.*\n(.*\n)```", (DOCS / "plugins.md").read_text())
    assert shown is not None
    text = tiny_recipe.read_text()
    for ours, theirs in ((OUR_FUSION, shown[1]), (OUR_LOSS, shown[2])):
        assert f"{ours}\n" in text
        text = text.replace(f"{ours}\n", theirs)
    path = tiny_recipe.with_name("example.yaml")
    path.write_text(text)
    return path


def run(recipe: Path, folder: Path, site: Path | None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distill_core.cli", "run", str(recipe), "--runs", str(folder), "--quiet"]
    keep = ["--set", "train.checkpoint.every=1", "--set", "train.checkpoint.keep=9"]
    environment = os.environ | {"PYTHONPATH": str(site) if site else ""}
    return subprocess.run([*command, *keep], capture_output=True, text=True, env=environment, timeout=240, check=False)


def test_it_is_at_most_45_lines() -> None:
    # pip leaves a build folder beside it
    files = [
        p for p in PROJECT.rglob("*") if p.suffix in (".py", ".toml", ".cfg") and PROJECT / "build" not in p.parents
    ]
    assert len(files) == 3
    assert sum(bool(line.strip()) for path in files for line in path.read_text().splitlines()) <= 45


def test_a_recipe_alone_trains_with_it(
    recipe: Path, tmp_path: Path, install_plugin: Callable[[Path, Path], Path]
) -> None:
    """Catches an example that no longer fits the interfaces, and one that is loaded but not used."""
    done = run(recipe, tmp_path / "runs", install_plugin(PROJECT, tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "example"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "terms" in row]
    assert len(steps) == 4
    for row in steps:
        terms = row["terms"]
        assert 0 < terms["fused_agreement"] < 2
        assert row["loss"] == pytest.approx(terms["contrastive"] + 0.5 * terms["fused_agreement"], abs=1e-6)
    first, last = (
        torch.load(folder / "checkpoints" / f"step-{step:08d}.pt", weights_only=True)["objective"] for step in (1, 4)
    )
    for modality in ("image", "text"):
        name = f"fusion.map.{modality}.weight"
        assert not torch.equal(first[name], last[name]), f"no gradient reached {name}"


def test_without_it_the_recipe_is_refused(recipe: Path, tmp_path: Path) -> None:
    """The control: what trained above was the plugin."""
    if any(distribution.name == NAME for distribution in distributions()):
        pytest.skip(f"{NAME} is installed here")
    done = run(recipe, tmp_path / "runs", None)
    assert done.returncode == 2
    assert "fusion: no fusion named 'max_pooling'" in done.stderr
    assert "loss.1: no loss named 'fused_agreement'" in done.stderr
