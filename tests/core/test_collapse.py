"""Indicators of a collapse against numpy's singular values, in a run's rows, and the rule's one warning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from host_reads import HostReads

from distill_core.collapse import ROWS, CollapseRule, collapse_indicators, indicators
from distill_core.outputs import Features, Outputs, Progress
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_core.run.folder import RunFolder
from distill_core.train import Trainer


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (2, 3), (33, 8)])
def test_against_singular_values(shape: tuple[int, int]) -> None:
    """The rank from numpy's singular values and the similarity pair by pair, on either side of B = D. Would catch a
    norm that is forgotten, a mean that is not subtracted, and pairs of a sample with itself."""
    x = torch.randn(*shape) * torch.rand(shape[0], 1) + 0.3
    rows = x.double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    l = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2  # noqa: E741
    pairs = [rows[i] @ rows[j] for i in range(len(rows)) for j in range(len(rows)) if i != j]
    values = {name: value.item() for name, value in indicators(x).items()}
    assert values["rank"] == pytest.approx(l.sum() ** 2 / (l**2).sum(), rel=1e-4)
    assert values["similarity"] == pytest.approx(np.mean(pairs), abs=1e-5)
    assert values["spread"] == pytest.approx(rows.std(0).mean() * shape[1] ** 0.5, rel=1e-4)


def test_the_extremes() -> None:
    """Embeddings in all directions, on a line, and in one point (of which nothing may be NaN)."""
    even = indicators(torch.randn(500, 16))
    assert even["spread"] == pytest.approx(1, abs=0.02)
    assert even["rank"] > 15
    line = indicators(torch.randn(50, 1) * torch.randn(16) + torch.randn(16))
    assert 1 <= line["rank"] < 2.1  # normalised, a line is an arc
    point = indicators(torch.randn(16).expand(50, 16).clone())
    assert point["spread"] < 1e-3
    assert point["similarity"] == pytest.approx(1, abs=1e-4)
    assert all(value.isfinite() for value in point.values())


def test_what_is_measured_and_that_nobody_waits() -> None:
    """Would catch a modality that is left out, the projection that no loss trains, and a read of the device."""

    def features(views: int) -> Features:
        return Features(torch.randn(views, 6, 4, requires_grad=True), class_tokens=torch.randn(views, 6, 2, 3))

    student = {"image": features(3), "text": features(2)}
    teacher = {"image": features(1)}
    outputs = Outputs({}, student, {"default": teacher}, {}, None, Progress(0, 1), lambda module: module)
    with HostReads() as reads:
        reads.mark(*(f.pooled for f in (*student.values(), *teacher.values())))
        values = collapse_indicators(outputs, {"text"})
    assert reads.lines == []
    sides = ("student/image", "student/text", "teacher/image")
    assert list(values) == [f"embeddings/{side}/{name}" for side in sides for name in ("spread", "rank", "similarity")]
    assert not any(value.requires_grad for value in values.values())
    assert student["text"].class_tokens is not None
    for side, x in (("student/image", student["image"].pooled[0]), ("student/text", student["text"].class_tokens[0])):
        torch.testing.assert_close(values[f"embeddings/{side}/rank"], indicators(x.detach().flatten(1))["rank"])
    one = Outputs({}, {"image": Features(torch.randn(1, 1, 4))}, {}, {}, None, Progress(0, 1), lambda module: module)
    assert collapse_indicators(one) == {}, "of one sample nothing can be said"


def test_the_rule_warns_once_of_what_lasts() -> None:
    """Would catch a warning of a few rows, of rows that are not in a row, of the teacher, of a batch of two, and a
    second one."""

    def row(spread: float, rank: float = 9.0, side: str = "student") -> dict[str, float]:
        return {f"embeddings/{side}/image/spread": spread, f"embeddings/{side}/image/rank": rank, "other/spread": 0.0}

    rule = CollapseRule(16)
    assert [rule.check(row(0.001)) for _ in range(ROWS - 1)] == [None] * (ROWS - 1)
    assert rule.check(row(0.5)) is None
    said = [rule.check(row(0.001)) for _ in range(2 * ROWS)]
    assert [i for i, line in enumerate(said) if line is not None] == [ROWS - 1]
    assert "student/image (spread 0.001, effective rank 9)" in str(said[ROWS - 1])
    healthy, by_rank, teacher, few = (CollapseRule(samples) for samples in (16, 16, 16, 2))
    assert not any(healthy.check(row(0.5)) for _ in range(2 * ROWS))
    assert any(by_rank.check(row(0.5, 1.1)) for _ in range(ROWS))
    assert not any(teacher.check(row(0.0, side="teacher")) for _ in range(2 * ROWS))
    assert not any(few.check(row(0.5, 1.0)) for _ in range(2 * ROWS)), "two samples differ in one direction"


@pytest.mark.slow
def test_in_the_rows_of_a_run(
    tiny_recipe: Path, registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the steps that are logged, and no others; a student whose weights are all 0 has collapsed, and the run says so
    once."""
    overrides = ["evaluate=null", "train.log_every=2", "train.steps=27", "teacher.momentum=0.5"]
    recipe = load_recipe(tiny_recipe, registry=registry, overrides=overrides)
    healthy = Trainer(recipe, RunFolder.create(tmp_path / "runs", recipe), quiet=True).run().folder
    rows = RunFolder(healthy).rows()
    assert [row["step"] for row in rows] == [*range(2, 27, 2), 27]
    for row in rows:
        values = {name: value for name, value in row["metrics"].items() if name.startswith("embeddings/")}
        of = {name.removeprefix("embeddings/").rpartition("/")[0] for name in values}
        assert of == {"student/image", "student/text", "teacher/image", "teacher/text"}
        assert all(0 < value <= 3.001 for name, value in values.items() if name.endswith("rank"))
    assert "collapsed" not in capsys.readouterr().err

    recipe = load_recipe(tiny_recipe, registry=registry, overrides=[*overrides, "train.optimizer.lr=1e-30"])
    trainer = Trainer(recipe, RunFolder.create(tmp_path / "runs", recipe), quiet=True)
    with torch.no_grad():
        for name, parameter in trainer.objective.backbone.named_parameters():
            parameter.mul_(0 if "proj" not in name else 1)
    trainer.run()
    assert capsys.readouterr().err.count("the embeddings have collapsed: student/image (spread 0") == 1
