"""`distill replay`: a step that is run again is that step, bit for bit; of a bad one it says what was not finite."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import distill_core.cli
from distill_core.data.example import example_batch
from distill_core.errors import TrainingStopped, UserError
from distill_core.interfaces import Loss
from distill_core.outputs import Outputs, Progress
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import load_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Entry, Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_core.run.inspection import Inspection, leave_out
from distill_core.run.replay import replay_step
from distill_core.step import TrainStep
from distill_core.train import Trainer

BLACK = "train-1-2"
"""The sample whose picture is black."""


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


class Contrast(Loss):
    """Of each picture; of a black one its logarithm is not finite. And noise of each random generator."""

    name = "contrast"
    armed: ClassVar[bool] = True

    def __init__(self, config: Any, plan: Any) -> None:
        super().__init__(config, plan)
        self.root = Root()

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        spread = outputs.views["image"].groups[0].x[0].flatten(2).std(2).mean(1)  # [B]
        if self.armed:
            spread = self.root(spread - 1e-4)
        noise = torch.rand(()) + np.random.rand() + random.random()
        return {"contrast": (spread * (1 + outputs.student["image"].embedding[0, :, 0])).mean() + noise}, {}


@pytest.fixture
def more(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Registry:
    Contrast.armed = True
    mine = Registry([*registry.entries.values(), Entry(Contrast, "mine", "mine")])
    monkeypatch.setattr(distill_core.cli, "_registry", lambda: mine)
    return mine


@pytest.fixture
def recipe(tiny_recipe: Path, more: Registry, write_shards: Callable[..., list[Path]]) -> Recipe:
    """8 steps, each logged; a checkpoint each second, of which all are kept."""
    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, "PNG")
    black = {(1, 2): {"png": file.getvalue(), "txt": b"night"}}
    write_shards(tiny_recipe.parent / "shards", 3, 4, replace=black)
    settings = (
        "loss=[{name: contrastive}, {name: cross_modal_distillation}, {name: contrast}]",
        "evaluate=null",
        "train.steps=8",
        "train.checkpoint={every: 2, keep: 9}",
        "data.workers=1",
        "data.batch_size=3",
    )
    return load_recipe(tiny_recipe, registry=more, overrides=settings)


def train(recipe: Recipe, folder: RunFolder, resume: str | None = None) -> None:
    Trainer(recipe, folder, resume=resume, quiet=True).run()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_healthy_step_has_the_loss_that_was_logged(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the beginning, right after a checkpoint, and two steps after one. Would catch another batch or other views,
    random numbers or a learning rate of another step, an inspection that changes what it looks at, and a folder that is
    written to."""
    Contrast.armed = False
    folder = RunFolder.create(tmp_path / "runs", recipe)
    train(recipe, folder)
    before = files(folder.path)
    rows = {row["step"]: row for row in folder.rows()}
    for step, start in ((1, 0), (3, 2), (8, 6)):
        seen = replay_step(recipe, RunFolder(folder.path), step, quiet=True)
        assert (seen.start, seen.captured, seen.first_bad, seen.bad_gradients) == (start, False, None, [])
        assert seen.logged == rows[step]["loss"]
        assert (seen.loss, seen.terms, seen.metrics) == tuple(rows[step][part] for part in ("loss", "terms", "metrics"))
        assert seen.grad_norm == rows[step]["grad_norm"]
        assert list(seen.contributions) == list(seen.keys)
    assert files(folder.path) == before
    with pytest.raises(UserError, match="a run of 8 steps has no step 9"):
        replay_step(recipe, folder, 9, quiet=True)
    distill_core.cli.main(["replay", str(folder.path), "--step", "3", "--quiet"])
    said = capsys.readouterr().out
    assert f"{folder.path}: step 3, 1 step from the checkpoint of step 2" in said
    assert "(as in metrics.jsonl)" in said
    assert "every number of it is finite" in said


@pytest.mark.slow
@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_a_step_that_was_not_finite(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], nonfinite: str
) -> None:
    """Would catch the batch after the one that was bad, a module after the first bad one, a sample that is not to
    blame, and steps after a stop that are replayed on other samples than the resumed run took."""
    trial = recipe.model_copy(update={"train": recipe.train.model_copy(update={"nonfinite": nonfinite})})
    folder = RunFolder.create(tmp_path / "runs", trial)
    if nonfinite == "stop":
        with pytest.raises(TrainingStopped, match=r"distill replay \S+ --step \d runs it again") as stopped:
            train(trial, folder)
        step = int(str(stopped.value).partition("--step ")[2][0])
        assert Checkpoints(folder.path).steps()[-1] == step - 1
    else:
        train(trial, folder)
        assert "the step is skipped. distill replay" in capsys.readouterr().err
        step = next(row["step"] for row in folder.rows() if "not_finite" in row)
    (note,) = [row for row in folder.rows() if "not_finite" in row and row["step"] == step]
    assert BLACK in note["keys"]
    capture = json.loads((folder.path / "bad-steps" / f"step-{step:08d}.json").read_text())
    assert capture["keys"] == note["keys"]
    assert capture["seed"] == 0
    assert capture["ranks"][0]["terms"]["contrast"] == "nan"
    assert "contrastive/scale" in capture["ranks"][0]["metrics"]
    seen = replay_step(trial, folder, step, quiet=True)
    assert seen.captured
    assert list(seen.keys) == note["keys"]
    assert seen.first_bad == "what comes out of loss.contrast.root (Root), [3]: 1 of 3 values"
    assert list(seen.culprits) == [BLACK]
    assert seen.terms["contrastive"] == capture["ranks"][0]["terms"]["contrastive"]
    assert seen.bad_gradients
    assert all(name.startswith("backbone.image") for name in seen.bad_gradients)
    capsys.readouterr()
    distill_core.cli.main(["replay", str(folder.path), "--step", str(step), "--json"])
    assert json.loads(capsys.readouterr().out)["culprits"] == [BLACK]

    if nonfinite == "stop":
        for _ in range(3):  # the black sample comes once a pass, of which there are two
            with suppress(TrainingStopped):
                train(trial, folder, "last")
    rows = {row["step"]: row for row in folder.rows() if "terms" in row}
    assert max(rows) == 8
    captured = {int(path.stem.removeprefix("step-")) for path in (folder.path / "bad-steps").iterdir()}
    later = min(number for number in rows if number > step and number not in captured)
    for checkpoint in Checkpoints(folder.path).steps():
        if step - 1 <= checkpoint < later:  # so that the replay passes through the bad step
            Checkpoints(folder.path).path(checkpoint).unlink()
    seen = replay_step(trial, folder, later, quiet=True)
    assert seen.start < step
    assert seen.loss == rows[later]["loss"]


def test_what_samples_add(tiny_recipe: Path, registry: Registry) -> None:
    """Of a mean over samples each sample's own loss, in a step that nothing disturbs. Would catch samples in another
    order, another sample left out, buffers and random numbers that the trial steps use up."""

    class Mean(Loss):
        name = "mean"

        def __init__(self, config: Any, plan: Any) -> None:
            super().__init__(config, plan)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            self.calls.add_(1)
            self.own = outputs.student["image"].pooled[0].square().sum(-1)
            if len(outputs.student["text"].tokens):
                assert len(next(iter(outputs.student["text"].tokens.values()))) == len(self.own)
            return {"mean": self.own.mean()}, {"draw": torch.rand(())}

    mine = Registry([*registry.entries.values(), Entry(Mean, "mine", "mine")])
    recipe = load_recipe(tiny_recipe, registry=mine, overrides=["loss=[{name: mean}]", "fusion=null", "evaluate=null"])
    batch, results, own = example_batch(recipe, 4), [], []
    for looks in (False, True):
        torch.manual_seed(3)
        step = TrainStep(recipe, build_objective(recipe), torch.device("cpu"))
        inspection = Inspection(step.objective, batch, alone=True)
        if looks:
            with inspection:
                results.append(step(batch, Progress(0, 9)))
        else:
            results.append(step(batch, Progress(0, 9)))
            own = step.objective.loss["mean"].own.tolist()  # type: ignore[union-attr, operator]
        assert step.objective.loss["mean"].calls == 1
    plain, looked = results
    assert (plain.loss, plain.norm, plain.terms, plain.metrics) == (
        looked.loss, looked.norm, looked.terms, looked.metrics,
    )  # fmt: skip
    assert inspection.contributions == pytest.approx(own, rel=1e-4, abs=1e-5)
    assert inspection.culprits == []


@pytest.mark.parametrize("lacks", [False, True])
def test_a_step_whose_samples_may_lack_a_modality(
    tiny_recipe: Path, registry: Registry, write_shards: Callable[..., list[Path]], lacks: bool
) -> None:
    """Catches an inspection that walks from what was cut for a loss to the whole, and from there back again."""
    if lacks:
        write_shards(tiny_recipe.parent / "shards", 3, 4, replace={(1, 2): {"txt": b"night"}})
    settings = ("data.optional=[image]", "evaluate=null", "train.checkpoint.every=1", "loss.1=null", "fusion=null")
    recipe = load_recipe(tiny_recipe, registry=registry, overrides=settings)
    folder = RunFolder.create(tiny_recipe.parent / "runs", recipe)
    train(recipe, folder)
    rows = {row["step"]: row for row in folder.rows()}
    for step in (1, 2, 3):
        seen = replay_step(recipe, RunFolder(folder.path), step, quiet=True)
        assert (seen.loss, seen.terms, seen.first_bad) == (rows[step]["loss"], rows[step]["terms"], None)
        assert seen.no_contributions == "samples lack modalities"


def test_leaving_a_sample_out(tiny_recipe: Path, registry: Registry) -> None:
    """Would catch a tensor of which another sample, or another axis, is left out."""
    recipe = load_recipe(tiny_recipe, registry=registry)
    objective = build_objective(recipe)
    batch = example_batch(recipe, 4)
    whole = objective.represent(batch, Progress(0, 1))
    some = leave_out(whole, 1)
    kept = [0, 2, 3]
    for name, features in whole.student.items():
        assert torch.equal(some.student[name].pooled, features.pooled[:, kept])
        for view, tokens in features.tokens.items():
            assert torch.equal(some.student[name].tokens[view], tokens[kept])
        for before, after in zip(whole.views[name].groups, some.views[name].groups, strict=True):
            assert torch.equal(after.x, before.x[:, kept])
            assert before.lengths is None or np.array_equal(after.lengths, before.lengths[:, kept])
        assert torch.equal(some.fused[name].pooled, whole.fused[name].pooled[:, kept])
        teacher = whole.teacher["default"][name].pooled
        assert torch.equal(some.teacher["default"][name].pooled, teacher[:, kept])
