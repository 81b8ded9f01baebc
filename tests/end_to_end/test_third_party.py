"""A plugin package from outside, installed as its pyproject.toml says and used from a recipe."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distill_core.evaluate.score import TaskScore, by_address, read_scores
from distill_core.run.report import bars

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).with_name("third_party")


def distill(*arguments: str | Path, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(site) if site else ""}
    command = [sys.executable, "-m", "distill_core.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


@pytest.fixture
def site(tmp_path: Path, install_plugin: Callable[[Path, Path], Path]) -> Path:
    return install_plugin(PROJECT, tmp_path / "site")


@pytest.fixture
def recipe(tiny_recipe: Path) -> Path:
    """The tiny recipe with the plugin's fusion and loss in place of COSMOS's."""
    text = tiny_recipe.read_text()
    for ours, theirs in (
        ("{name: cross_attention, heads: 2}", "token_mean"),
        ("{name: cross_modal_distillation}", "{name: agreement, weight: 0.5, power: 2.0}"),
    ):
        assert ours in text
        text = text.replace(ours, theirs)
    path = tiny_recipe.with_name("outside.yaml")
    path.write_text(text)
    return path


def test_it_trains_with_the_plugins_fusion_and_loss(recipe: Path, site: Path, tmp_path: Path) -> None:
    """Would catch core code that knows its own plugins only, a fusion that is built and not called, and a loss whose
    term or gradient is dropped on the way."""
    keep = ["--set", "train.checkpoint.every=1", "--set", "train.checkpoint.keep=9"]
    done = distill("run", recipe, "--runs", tmp_path / "runs", "--quiet", *keep, site=site)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "outside"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "terms" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    for row in steps:
        cosine = row["metrics"]["agreement/cosine"]
        assert -1 < cosine < 0.999, "a fusion that was not called would give the student's own embedding, cosine 1"
        assert row["terms"]["agreement"] == pytest.approx((1 - cosine) ** 2, abs=1e-6)
        assert row["loss"] == pytest.approx(row["terms"]["contrastive"] + 0.5 * row["terms"]["agreement"], abs=1e-6)
    first, last = (
        torch.load(run / "checkpoints" / f"step-{step:08d}.pt", weights_only=True)["objective"] for step in (1, 4)
    )
    names = [f"fusion.map.{m}.weight" for m in ("image", "text")]
    assert all(not torch.equal(first[name], last[name]) for name in names), "no gradient reached the fusion"
    assert "student/retrieval/M" in rows[-1]["scores"]


def test_the_plugins_headline_is_shown_as_a_built_in_s(recipe: Path, site: Path, tmp_path: Path) -> None:
    """Its task's one score is lower-is-better, in nats, and called neither M nor top1. Would catch any place that knows
    the built-in tasks' names, takes all scores for percent, or keeps the highest score as the best."""
    address = "student/uniformity/spread"
    evaluate = "evaluate={every: 1, tasks: [uniformity]}"
    keep = f"train.checkpoint={{every: 1, keep: 9, best: {address}}}"
    options = ["--set", evaluate, "--set", keep, "--set", "train.optimizer.lr=0.01"]
    done = distill("run", recipe, "--runs", tmp_path / "runs", *options, site=site)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "outside"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validated = {row["step"]: row["scores"][address] for row in rows if row.get("split") == "validation"}
    assert list(validated) == [1, 2, 3, 4]
    for step, value in validated.items():
        assert f"step {step}, validation: {address} {value:.4g}, teacher/uniformity/spread " in done.stderr
    best = torch.load(run / "checkpoints" / "best.pt", weights_only=True)["step"]
    assert best == min(validated, key=validated.__getitem__) != max(validated, key=validated.__getitem__)
    scores = read_scores(json.loads((run / "report.json").read_text())["scores"])
    mean = by_address(scores)[address]
    assert mean == TaskScore(None, "spread", mean.value, "nats", False, True, side="student", task="uniformity")
    assert bars(scores)["nats"]["uniformity spread \N{DOWNWARDS ARROW}"]["student"] == mean.value
    assert ["spread", f"{mean.value:.4g}"] == done.stdout.split("uniformity")[1].replace("│", " ").split()[:2]
    table = json.loads(distill("compare", run, "--json", site=site).stdout)
    assert table["scores"] == [address]
    assert table["variants"][0]["scores"][address]["summary"]["mean"] == mean.value
    assert f"{address}: nats, lower is better." in table["notes"]


def test_the_command_line_lists_it_with_its_package_and_options(site: Path) -> None:
    """Would catch a listing of built-in components alone, and options without their docstrings."""
    done = distill("plugins", "agreement", "--json", site=site)
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads(done.stdout)
    assert (entry["kind"], entry["package"], entry["plugin"]) == ("loss", "distill-token-mean", "token_mean")
    power = {"name": "power", "type": "float", "required": False, "default": 1.0, "doc": "Exponent of the distance."}
    assert power in entry["options"]


def test_without_the_package_the_recipe_is_refused_by_name(recipe: Path, tmp_path: Path) -> None:
    """The control: the run above is the plugin's doing. Would catch a test that passes with the plugin unused."""
    done = distill("run", recipe, "--runs", tmp_path / "runs", "--quiet")
    assert done.returncode == 2
    assert f"{recipe}:7: fusion: no fusion named 'token_mean'" in done.stderr
    assert f"{recipe}:10: loss.1: no loss named 'agreement'" in done.stderr
    assert not (tmp_path / "runs").exists()
