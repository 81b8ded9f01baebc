"""What recipes differ in, by path, and which runs are the same recipe with other seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
from score_values import means

from distill_core.cli import main
from distill_core.recipe.resolve import load_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry
from distill_study.compare import _group_name, compare, differences


def load(file: Path, registry: Registry, *overrides: str) -> Recipe:
    return load_recipe(file, registry=registry, overrides=overrides)


def finished(base: Path, name: str, recipe: Recipe, scores: dict[str, float] | None) -> Path:
    """A run folder as a finished run leaves it; without scores, as one that was stopped."""
    folder = base / name
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    if scores is not None:
        rows = [asdict(score) for score in means(scores, "M")]
        report = {"scores": rows, "steps": 4, "samples": 16, "seconds": 2.0, "parameters": 9, "split": "test"}
        (folder / "report.json").write_text(json.dumps(report))
    return folder


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (["name=x", "seed=3", "tags={study: s}"], {}),
        (["fusion.heads=4"], {"fusion.heads": ["2", "4"]}),
        (["loss.1.weight=0.5"], {"loss.cross_modal_distillation.weight": ["1.0", "0.5"]}),
        # losses go by id: the first one removed leaves the second one as it is
        (["loss.0=null"], {"loss.contrastive": ["contrastive", "-"]}),
        # the options that are not defaults, and no others
        (["fusion=null", "loss.1=null"], {"fusion": ["cross_attention(heads=2)", "none"],
         "loss.cross_modal_distillation": ["cross_modal_distillation", "-"]}),
        (["augment.text={name: caption, take: one}", "loss.0=clip"], {
            "augment.text": ["text_crop(local=1)", "caption(take=one)"],
            "loss.contrastive": ["contrastive", "-"], "loss.clip": ["-", "clip"]}),
        (["teacher=null", "loss.1=null"], {"teacher": ["ema(momentum=0.9)", "none"],
         "loss.cross_modal_distillation": ["cross_modal_distillation", "-"]}),
        (["train.lr_factors={backbone.text: 0.1}"], {"train.lr_factors.backbone.text": ["-", "0.1"]}),
        (["evaluate.tasks=[]"], {"evaluate.tasks.retrieval": ["retrieval", "-"]}),
    ],
)  # fmt: skip
def test_only_paths_that_differ(
    tiny_recipe: Path, registry: Registry, changes: Sequence[str], found: dict[str, list[str]]
) -> None:
    assert differences([load(tiny_recipe, registry), load(tiny_recipe, registry, *changes)]) == found


def test_runs_that_differ_in_seed_alone_are_one_group(tiny_recipe: Path, tmp_path: Path, registry: Registry) -> None:
    runs = tmp_path / "runs"
    score = "student/retrieval/M"
    folders = [
        finished(runs, "cosmos-seed0", load(tiny_recipe, registry, "seed=0"), {score: 10.0}),
        finished(runs, "heads-seed1", load(tiny_recipe, registry, "fusion.heads=4", "seed=1"), {score: 15.0}),
        finished(runs, "cosmos-seed1", load(tiny_recipe, registry, "seed=1"), {score: 14.0}),
        finished(runs, "heads-seed0", load(tiny_recipe, registry, "fusion.heads=4", "seed=0"), {score: 13.0}),
        finished(runs, "again", load(tiny_recipe, registry, "seed=0"), {score: 10.0}),
        finished(runs, "half", load(tiny_recipe, registry, "train.steps=9"), None),
    ]
    found = compare(folders, registry)
    names = [(group.name, sorted(run.seed for run in group.runs)) for group in found.table.groups]
    # the same recipe and seed once more is no second sample of the group
    assert names == [("cosmos", [0, 1]), ("heads", [0, 1]), ("again", [0]), ("half", [])]
    assert found.table.scores == (score,)
    heads = found.table.cells["heads"][score]
    assert heads.summary is not None
    assert heads.difference is not None
    assert heads.summary.mean == 14.0
    assert (heads.difference.mean, heads.difference.low, heads.difference.high) == (2.0, 1.0, 3.0)
    assert found.differences == {"fusion.heads": ["2", "4", "2", "2"], "train.steps": ["4", "4", "4", "9"]}
    assert found.unfinished == (str(runs / "half"),)


def test_the_command(tiny_recipe: Path, tmp_path: Path, registry: Registry, capfd: pytest.CaptureFixture[str]) -> None:
    score = "student/retrieval/M"
    folders = [
        str(finished(tmp_path, "one", load(tiny_recipe, registry), {score: 10.0, "student/retrieval/R@1": 4.0})),
        str(finished(tmp_path, "two", load(tiny_recipe, registry, "fusion.heads=4"), {score: 12.5})),
    ]
    main(["compare", *folders])
    out = capfd.readouterr().out
    assert "fusion.heads" in out
    assert "12.50 +2.50" in out
    assert "R@1" not in out
    main(["compare", *folders, "--json", "--score", "student/retrieval/R@1"])
    found = json.loads(capfd.readouterr().out)
    assert found["differences"] == {"fusion.heads": ["2", "4"]}
    assert found["variants"][0]["scores"]["student/retrieval/R@1"]["summary"]["mean"] == 4.0
    assert found["variants"][1]["scores"]["student/retrieval/R@1"]["summary"] is None


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (["x-seed0", "x-seed1"], "x"),
        (["x-seed10", "x-seed11"], "x"),
        (["x1-seed0", "x1-seed1"], "x1"),
        (["seed1", "seed2"], "seed1, ..."),
        (["x-seed0"], "x-seed0"),
    ],
)
def test_a_groups_name_has_no_part_of_a_seed(names: list[str], group: str) -> None:
    assert _group_name(names) == group


def test_a_score_that_no_run_has(
    tiny_recipe: Path, tmp_path: Path, registry: Registry, capfd: pytest.CaptureFixture[str]
) -> None:
    """An empty row would pass for a score of nothing."""
    folder = finished(tmp_path, "one", load(tiny_recipe, registry), {"student/retrieval/M": 10.0})
    with pytest.raises(SystemExit) as end:
        main(["compare", str(folder), "--score", "student/retreival/M"])
    assert end.value.code == 2
    seen = capfd.readouterr()
    assert seen.err == ("--score: no run has a score 'student/retreival/M', did you mean 'student/retrieval/M'?\n")
    assert seen.out == ""


def test_what_is_no_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["compare", str(tmp_path), str(tmp_path)])
    assert end.value.code == 2
    assert capfd.readouterr().err == f"{tmp_path}: given twice\n"
    with pytest.raises(SystemExit) as end:
        main(["compare", str(tmp_path)])
    assert end.value.code == 2
    assert "not a run folder" in capfd.readouterr().err
