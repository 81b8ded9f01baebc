"""The loop: values that are not finite, clipping, the schedule, precision, evaluation on the way, interrupts."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from score_values import reported
from torch import Tensor, nn

import distill_core.cli
from distill_core.batch import Batch
from distill_core.contracts.optimizer import Optimizer
from distill_core.contracts.schedule import Constant, WarmupCosine
from distill_core.contracts.task import Task, TaskConfig
from distill_core.errors import TrainingStopped, UserError
from distill_core.evaluate.score import Score
from distill_core.interfaces import Loss, LossConfig
from distill_core.outputs import Outputs, Progress
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Entry, Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_core.run.load import run_recipe
from distill_core.run.metrics import MetricsLog
from distill_core.step import StepResult, TrainStep
from distill_core.system.process import Interrupt
from distill_core.train import Trainer


class PoisonConfig(LossConfig):
    at: int
    what: Literal["loss", "gradient"] = "loss"


class Poison(Loss):
    """Not finite at one step: its value, or only its gradient (the square root of 0)."""

    name = "poison"
    Config = PoisonConfig

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        value = outputs.student["image"].pooled.sum() * 0
        if outputs.progress.step == self.config.at:
            value = value + torch.nan if self.config.what == "loss" else value.sqrt()
        return {"poison": value}, {}


class Recording(torch.optim.SGD):
    norms: ClassVar[list[float]] = []

    def step(self, closure: Any = None) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in gradients)))
        return super().step(closure)


class Sgd(Optimizer):
    """Plain SGD that keeps the norm of the gradients it is given."""

    name = "recording_sgd"

    def groups(self, parameters: Sequence[tuple[str, nn.Parameter, float]]) -> list[dict[str, Any]]:
        return [{"params": [p for _, p, _ in parameters], "lr": 0.1}]

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        Recording.norms.clear()
        return Recording(groups)


class ScriptedConfig(TaskConfig):
    scores: tuple[float, ...]


class Scripted(Task):
    """Gives its scores one after the other."""

    name = "scripted"
    Config = ScriptedConfig
    calls: ClassVar[int] = 0
    higher_is_better: ClassVar[bool | None] = True

    def run(self, model: Any, sets: Any) -> list[Score]:
        Scripted.calls += 1
        value = self.config.scores[Scripted.calls - 1]
        return [Score(None, "M", value, higher_is_better=self.higher_is_better)]


Run = Callable[..., RunFolder]
PLAIN = ("fusion=null", "teacher=null", "loss=[{name: contrastive}]", "evaluate=null")


@pytest.fixture
def more(registry: Registry) -> Registry:
    mine = [Entry(cls, "mine", "mine") for cls in (Poison, Sgd, Scripted)]
    return Registry([*registry.entries.values(), *mine])


@pytest.fixture
def run(tiny_recipe: Path, more: Registry, tmp_path: Path) -> Run:
    """Trains the tiny recipe with these overrides, in this process."""

    def train(*overrides: str) -> RunFolder:
        recipe = load_recipe(tiny_recipe, registry=more, overrides=overrides)
        folder = RunFolder.create(tmp_path / "runs", recipe)
        Trainer(recipe, folder, quiet=True).run()
        return folder

    return train


def training(folder: RunFolder) -> list[dict[str, Any]]:
    return [row for row in folder.rows() if "terms" in row]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "said"), [("loss", "the loss is not finite"), ("gradient", "gradient's norm is nan")])
def test_not_finite_stops(
    tiny_recipe: Path,
    more: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: str,
    said: str,
) -> None:
    """Catches a run that trains on NaN, and an end that does not say where: step, terms, samples."""
    monkeypatch.setattr(distill_core.cli, "_registry", lambda: more)
    losses = f"loss=[{{name: contrastive}}, {{name: poison, at: 2, what: {what}}}]"
    arguments = ["run", str(tiny_recipe), "--runs", str(tmp_path / "runs"), "--quiet"]
    for override in ("fusion=null", "teacher=null", losses):
        arguments += ["--set", override]
    with pytest.raises(SystemExit) as end:
        distill_core.cli.main(arguments)
    assert end.value.code == 3
    error = capsys.readouterr().err
    folder = RunFolder(tmp_path / "runs" / "tiny")
    first = error.splitlines()[0]
    assert first.startswith("step 3: ")
    assert said in first
    assert "contrastive = " in first
    assert re.search("poison = nan" if what == "loss" else "poison = -?0;", first)
    (row,) = [row for row in folder.rows() if "not_finite" in row]
    assert len(row["keys"]) == 4
    assert all(key in first for key in row["keys"])
    assert "Traceback" not in error
    saved = Checkpoints(folder.path).read()
    assert saved["step"] == 2
    assert all(torch.isfinite(value).all() for value in saved["objective"].values())


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite_may_be_passed_over(run: Run, what: str) -> None:
    """Catches a skipped step that moves weights, teacher or optimiser all the same, or is not counted."""
    losses = f"loss=[{{name: contrastive}}, {{name: cross_modal_distillation}}, {{name: poison, at: 2, what: {what}}}]"
    folder = run(losses, "train.nonfinite=skip", "train.steps=5", "train.checkpoint={every: 1, keep: 9}")
    saved = [Checkpoints(folder.path).read(str(step)) for step in range(1, 6)]
    assert equal(saved[1]["objective"], saved[2]["objective"])
    for before, after in zip(
        saved[1]["optimizer"]["state"].values(), saved[2]["optimizer"]["state"].values(), strict=True
    ):
        assert equal(before, after)
    for i in (0, 2, 3):
        for part in ("backbone.image", "backbone.text", "fusion", "teacher.default.backbone.image"):
            a, b = saved[i]["objective"], saved[i + 1]["objective"]
            assert any(not torch.equal(a[key], b[key]) for key in a if key.startswith(part)), (i, part)
    assert all(torch.isfinite(value).all() for value in saved[-1]["objective"].values())
    assert json.loads((folder.path / "report.json").read_text())["skipped_steps"] == 1
    assert [row["step"] for row in training(folder)] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in folder.rows() if "not_finite" in row] == [3]


def test_rows_are_json_even_when_values_are_not_finite(run: Run) -> None:
    """Catches bare NaN in metrics.jsonl, which other readers of JSON refuse."""
    folder = run(*PLAIN[:2], "loss=[{name: contrastive}, {name: poison, at: 1}]", "train.nonfinite=skip")

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    rows = [json.loads(line, parse_constant=refuse) for line in folder.metrics.read_text().splitlines()]
    row = next(row for row in rows if "terms" in row and row["step"] == 2)
    assert row["loss"] is None
    assert row["terms"]["poison"] is None
    assert math.isfinite(row["grad_norm"])  # the poison is a constant
    assert math.isfinite(row["terms"]["contrastive"])


def test_more_workers_than_cores(run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line in a recipe's terms, and none of torch's."""
    monkeypatch.setattr("distill_core.run.notices.cores", lambda: 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("train.steps=1", "data.workers=2", "evaluate=null")
    assert "data.workers is 2, but this process may use only 1 cores: --set data.workers=0" in capsys.readouterr().err


def test_clipping_bounds_the_gradient(run: Run) -> None:
    """The norm is measured by the optimiser. Catches clipping that is only logged, comes after the step, or is per
    tensor."""
    options = (*PLAIN, "train.optimizer={name: recording_sgd}", "train.schedule={name: constant}", "train.steps=3")
    folder = run(*options)
    for row, norm in zip(training(folder), list(Recording.norms), strict=True):
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
    clip = min(Recording.norms) / 3
    folder = run(*options, f"train.clip_grad={clip}")
    assert list(Recording.norms) == pytest.approx([clip] * 3, rel=1e-4)
    assert all(row["grad_norm"] > clip for row in training(folder)), "metrics give the norm before clipping"


def test_learning_rate_of_each_step(run: Run) -> None:
    """Hand-computed. Catches an off-by-one in the warm-up or the cosine, and a schedule that is applied a step late."""
    folder = run(
        *PLAIN,
        "train.steps=8",
        "train.optimizer={name: adamw, lr: 0.002}",
        "train.schedule={name: warmup_cosine, warmup: 3, final: 0.1}",
    )
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 5)) / 2 for i in range(5)]
    expected = [0.002 * factor for factor in (1 / 3, 2 / 3, 1, *cosine)]
    assert [row["lr"] for row in training(folder)] == pytest.approx(expected, rel=1e-12)


def test_schedules_by_hand() -> None:
    half = WarmupCosine(WarmupCosine.Config.model_validate({"warmup": 0.25}))
    assert [half.value(Progress(i, 8)) for i in (0, 1, 2, 5)] == pytest.approx([0.5, 1, 1, 0.5])
    none = WarmupCosine(WarmupCosine.Config.model_validate({"warmup": 0}))
    assert [none.value(Progress(i, 4)) for i in range(4)] == pytest.approx(
        [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]
    )
    flat = Constant(Constant.Config.model_validate({"warmup": 4}))
    assert [flat.value(Progress(i, 9)) for i in (0, 1, 3, 4, 8)] == pytest.approx([0.25, 0.5, 1, 1, 1])


@pytest.mark.slow
def test_bf16(run: Run) -> None:
    """Catches weights, teacher or optimiser state that end up in bf16, and a bf16 run that is fp32 in truth."""
    rough, exact = (run(f"train.precision={precision}", "seed=3") for precision in ("bf16", "fp32"))
    saved = Checkpoints(rough.path).read()
    assert {value.dtype for value in saved["objective"].values()} == {torch.float32}
    assert {v.dtype for state in saved["optimizer"]["state"].values() for v in state.values()} == {torch.float32}
    pairs = [(a["loss"], b["loss"]) for a, b in zip(training(rough), training(exact), strict=True)]
    assert all(a != b for a, b in pairs)
    assert all(a == pytest.approx(b, rel=0.05) for a, b in pairs)
    assert json.loads((rough.path / "report.json").read_text())["scores"]


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_matmul_precision_is_set_and_said(
    tiny_recipe: Path,
    more: Registry,
    tmp_path: Path,
    precision: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the trainer, before anything is computed."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "highest"
    monkeypatch.setattr("distill_core.run.notices.arithmetic", lambda precision, matmul, device: f"sums in {matmul}")
    overrides = ["train.steps=1", "evaluate=null", f"train.matmul_precision={precision}"]
    recipe = load_recipe(tiny_recipe, registry=more, overrides=overrides)
    Trainer(recipe, RunFolder.create(tmp_path / "runs", recipe)).run()
    assert torch.backends.cuda.matmul.allow_tf32 == (precision == "high")
    assert f"trained parameters, sums in {precision}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_evaluates_on_the_way_and_keeps_the_best(run: Run) -> None:
    """Catches a best checkpoint by the last or the lowest score or by the test split, one that `keep` deletes, and
    evaluations at the wrong steps."""
    Scripted.calls = 0
    folder = run(
        *PLAIN[:3],
        "train.steps=9",
        "train.checkpoint={every: 1, keep: 2, best: student/scripted/M}",
        "evaluate={every: 2, tasks: [{name: scripted, scores: [3.0, 9.0, 5.0, 9.0, 1.0, 50.0]}]}",
    )
    rows = [
        (row["step"], row["split"], row["scores"]["student/scripted/M"]) for row in folder.rows() if "scores" in row
    ]
    assert rows == [
        (2, "validation", 3.0),
        (4, "validation", 9.0),
        (6, "validation", 5.0),
        (8, "validation", 9.0),
        (9, "validation", 1.0),
        (9, "test", 50.0),
    ]
    checkpoints = Checkpoints(folder.path)
    assert checkpoints.steps() == [8, 9]
    assert checkpoints.read("best")["step"] == 4
    assert checkpoints.read("last")["step"] == 9
    report = json.loads((folder.path / "report.json").read_text())
    assert reported(report["scores"]) == {"student/scripted/M": 50.0}
    assert [row["step"] for row in report["validation"]] == [2, 4, 6, 8, 9]


@pytest.mark.parametrize(("higher_is_better", "best"), [(True, 4), (False, 8), (None, None)])
def test_which_way_is_better_chooses_the_best(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    higher_is_better: bool | None,
    best: int,
) -> None:
    """Catches a loss or a rank whose highest value is kept as the best, and a count that any is kept of in silence.
    NaN is never the best."""
    Scripted.calls = 0
    monkeypatch.setattr(Scripted, "higher_is_better", higher_is_better)
    folder = run(
        *PLAIN[:3],
        "train.steps=9",
        "train.checkpoint={every: 1, keep: 2, best: student/scripted/M}",
        "evaluate={every: 2, tasks: [{name: scripted, scores: [.nan, 9.0, 5.0, 1.0, .nan, 50.0]}]}",
    )
    if best is None:
        assert "'student/scripted/M' is better neither higher nor lower" in capsys.readouterr().err
        with pytest.raises(UserError, match="no checkpoint 'best'"):
            Checkpoints(folder.path).read("best")
    else:
        assert Checkpoints(folder.path).read("best")["step"] == best


def test_the_last_step_may_be_the_best(run: Run) -> None:
    Scripted.calls = 0
    folder = run(
        *PLAIN[:3],
        "train.checkpoint={every: null, best: student/scripted/M}",
        "evaluate={every: 2, tasks: [{name: scripted, scores: [3.0, 4.0, 0.0]}]}",
    )
    assert Checkpoints(folder.path).read("best")["step"] == 4


@pytest.mark.slow
def test_an_unknown_best_score_is_told_once(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a long run that dies of a misspelt score at its first validation, or keeps no best in silence."""
    Scripted.calls = 0
    folder = run(
        *PLAIN[:3],
        "train.checkpoint.best=student/scripted/N",
        "evaluate={every: 2, tasks: [{name: scripted, scores: [3.0, 4.0, 5.0]}]}",
    )
    error = capsys.readouterr().err
    assert error.count("warning") == 1
    assert "no score 'student/scripted/N'" in error
    assert "did you mean 'student/scripted/M'?" in error
    with pytest.raises(UserError, match="no checkpoint 'best'"):
        Checkpoints(folder.path).read("best")


@pytest.mark.slow
def test_epochs_make_steps(tiny_recipe: Path, more: Registry, run: Run) -> None:
    """12 samples, batches of 4. Catches a wrong length, and epochs that win over steps."""
    folder = run(*PLAIN, "train.steps=null", "train.epochs=1.7")
    assert [row["step"] for row in training(folder)] == [1, 2, 3, 4, 5]
    assert training(folder)[2]["epoch"] == 1.0
    assert len(training(run(*PLAIN, "train.steps=2", "train.epochs=5"))) == 2


def test_a_device_that_is_not_there(run: Run) -> None:
    with pytest.raises(UserError, match=r"train\.device: 'cuda:77'"):
        run("train.device=cuda:77")


def test_second_signal_stops_at_once() -> None:
    """The first only asks the loop to stop; handlers are given back afterwards."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    said: list[str] = []
    interrupt = Interrupt(said.append)
    with interrupt.listening():
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.signal == signal.SIGTERM
        assert [line.split(":")[0] for line in said] == ["SIGTERM"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_training_stopped_has_its_exit_code() -> None:
    assert (TrainingStopped.exit_code, UserError.exit_code) == (3, 2)


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have training meet SIGTERM in that step."""
    make = TrainStep.__call__

    def stopping(self: TrainStep, batch: Batch, progress: Progress, **options: Any) -> StepResult:
        if progress.step + 1 == step:
            signal.raise_signal(signal.SIGTERM)
        return make(self, batch, progress, **options)

    monkeypatch.setattr(TrainStep, "__call__", stopping)


def go_on(folder: RunFolder, registry: Registry, checkpoint: str = "last") -> None:
    Trainer(run_recipe(folder.path, registry), RunFolder(folder.path), resume=checkpoint, quiet=True).run()


@pytest.mark.slow
def test_going_back_keeps_both_branches(
    run: Run, more: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`resume --checkpoint OLDER`, stopped and resumed once more. Catches new checkpoints that pruning drops at once, a
    next `resume` that takes the abandoned branch, rows of both branches in one file, and anything that is deleted."""
    Scripted.calls = 0
    scores = "[1.0, 9.0, 2.0, 10.0, 8.0, 5.0, 6.0, 3.0, 0.0]"  # of steps 2, 4, 6, 8, 8; then 6, 8, 8
    folder = run(
        *PLAIN[:3],
        "train.steps=8",
        "train.checkpoint={every: 1, keep: 4, best: student/scripted/M}",
        f"evaluate={{every: 2, tasks: [{{name: scripted, scores: {scores}}}]}}",
    )
    checkpoints, rows, report = Checkpoints(folder.path), folder.rows(), folder.path / "report.json"
    assert (checkpoints.steps(), checkpoints.read("best")["step"]) == ([5, 6, 7, 8], 8)
    before, old_report = {step: checkpoints.load(str(step)).digest for step in (5, 6, 7, 8)}, report.read_text()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        stop_after(6, patch)
        go_on(folder, more, "5")
    said = capsys.readouterr().err
    aside = folder.path / "set-aside-1"
    names = "step-00000006.pt, step-00000007.pt, step-00000008.pt, best.pt"
    assert f"going back to step 5: {names} and their metrics and reports are set aside in {aside}" in said
    assert checkpoints.steps() == [5, 6]
    assert checkpoints.load("6").digest != before[6], "of the new branch: other seconds, at least"
    assert [row["step"] for row in training(folder)] == [1, 2, 3, 4, 5, 6]
    assert not report.exists()
    assert checkpoints.read("best")["step"] == 6, "the best of the common part was written over"
    assert RunFolder(aside).rows() == rows
    assert (aside / "report.json").read_text() == old_report
    old = Checkpoints(aside)
    assert {step: old.load(str(step)).digest for step in old.steps()} == {n: before[n] for n in (6, 7, 8)}
    assert old.read("best")["step"] == 8
    assert run_recipe(aside, more).to_dict() == run_recipe(folder.path, more).to_dict()
    go_on(folder, more)
    assert [row["step"] for row in training(folder)] == list(range(1, 9))
    assert checkpoints.steps() == [5, 6, 7, 8]
    assert checkpoints.read("best")["step"] == 8
    assert report.exists()
    assert [path.name for path in folder.path.glob("set-aside-*")] == ["set-aside-1"]


@pytest.mark.slow
def test_a_best_checkpoint_of_the_common_part_stays(run: Run, more: Registry) -> None:
    """Catches a score of the abandoned branch that the new one is held to, and a best that is forgotten."""
    Scripted.calls = 0
    folder = run(
        *PLAIN[:3],
        "train.steps=6",
        "train.checkpoint={every: 2, keep: 9, best: student/scripted/M}",
        "evaluate={every: 2, tasks: [{name: scripted, scores: [5.0, 1.0, 2.0, 0.0, 4.0, 5.5, 0.0]}]}",
    )
    checkpoints = Checkpoints(folder.path)
    assert checkpoints.read("best")["step"] == 2
    go_on(folder, more, "2")
    assert checkpoints.read("best")["step"] == 6
    assert checkpoints.read("6")["best"] == 5.5
    assert checkpoints.read("4")["best"] == 5.0


@pytest.mark.slow
def test_a_damaged_checkpoint_is_gone_back_behind(run: Run, more: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    """One flipped bit in the last one: the run goes on from the one before, and keeps the damaged file elsewhere."""
    folder = run("train.steps=4", "train.checkpoint={every: 2, keep: 2}")
    path = Checkpoints(folder.path).path(4)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)
    (folder.path / "report.json").unlink()
    capsys.readouterr()
    go_on(folder, more)
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warned) == 2
    assert "step-00000004.pt: cannot be read (damaged" in warned[0]
    assert "using step-00000002.pt instead" in warned[0]
    assert "going back to step 2: step-00000004.pt and" in warned[1]
    assert (folder.path / "set-aside-1" / "checkpoints" / path.name).read_bytes() == bytes(data)
    assert [row["step"] for row in training(folder)] == [1, 2, 3, 4]
    assert Checkpoints(folder.path).read()["step"] == 4


def no_room(monkeypatch: pytest.MonkeyPatch, number: int, *calls: int) -> None:
    """Have these saves (from 0) fail with an error of the system's."""
    fsync, done = os.fsync, []

    def failing(descriptor: int) -> None:
        done.append(descriptor)
        if len(done) - 1 in calls:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_save_that_fails_is_tried_again(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    """Catches an end of training, a good checkpoint that is lost, and a warning that does not say what is full."""
    no_room(monkeypatch, number, 1, 2)
    folder = run("train.steps=4", "train.checkpoint={every: 1, keep: 1}", "evaluate=null")
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warned) == 2
    for step, line in zip((2, 3), warned, strict=True):
        assert f"checkpoints/step-0000000{step}.pt: cannot be written: {os.strerror(number)}" in line
        assert line.endswith(f"Step {step} is not saved; the last checkpoint is of step 1")
        assert ("it takes" in line and "are free)" in line) == (number == errno.ENOSPC)
    assert Checkpoints(folder.path).steps() == [4]
    assert [row["step"] for row in training(folder)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_run_whose_last_save_fails_says_so(
    tiny_recipe: Path,
    more: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches exit code 0, scores that are lost, and a `resume` that calls the run finished."""
    monkeypatch.setattr(distill_core.cli, "_registry", lambda: more)
    runs = tmp_path / "runs"
    arguments = ["run", str(tiny_recipe), "--runs", str(runs), "--quiet", "--set", "train.checkpoint.every=2"]
    with monkeypatch.context() as patch:
        no_room(patch, errno.ENOSPC, 1)
        with pytest.raises(SystemExit) as end:
            distill_core.cli.main(arguments)
    assert end.value.code == 2
    seen = capsys.readouterr()
    assert "Traceback" not in seen.err
    last = seen.err.splitlines()[-1]
    assert "step-00000004.pt: cannot be written: No space left on device" in last
    assert "the last checkpoint is of step 2. Make room, then: distill resume" in last
    assert "retrieval" in seen.out, "the scores are shown"
    assert json.loads((runs / "tiny" / "report.json").read_text())["scores"]
    distill_core.cli.main(["resume", str(runs / "tiny"), "--quiet"])
    assert Checkpoints(runs / "tiny").steps() == [2, 4]
    assert [row["step"] for row in training(RunFolder(runs / "tiny"))] == [1, 2, 3, 4]


def test_a_signal_whose_save_fails(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches "saved at step 2" where nothing is."""
    stop_after(2, monkeypatch)
    no_room(monkeypatch, errno.ENOSPC, 0)
    folder = run()
    error = capsys.readouterr().err
    assert "Step 2 is not saved; there is no checkpoint yet" in error
    assert "saved at step" not in error
    assert Checkpoints(folder.path).steps() == []


@pytest.mark.slow
def test_a_best_score_that_was_not_saved_does_not_count(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the scores 3, 9, 5 the 9 meets a full disk: catches a best.pt that stays at 3."""
    Scripted.calls = 0
    no_room(monkeypatch, errno.ENOSPC, 1)
    folder = run(
        *PLAIN[:3],
        "train.steps=7",
        "train.checkpoint={every: null, best: student/scripted/M}",
        "evaluate={every: 2, tasks: [{name: scripted, scores: [3.0, 9.0, 5.0, 0.0, 0.0]}]}",
    )
    assert Checkpoints(folder.path).read("best")["step"] == 6
    assert Checkpoints(folder.path).read()["best"] == 5.0


@pytest.mark.slow
def test_a_run_folder_that_is_removed(
    run: Run, more: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, a warning for each step, and work that is lost: the next save makes the folder again."""
    add = MetricsLog.add

    def removing(self: MetricsLog, *arguments: Any) -> None:
        if self.state.step == 3:
            shutil.rmtree(self.folder.path)
        add(self, *arguments)

    monkeypatch.setattr(MetricsLog, "add", removing)
    folder = run("train.steps=9", "train.checkpoint={every: 6, keep: 2}")
    error = capsys.readouterr().err
    assert error.count("warning") == 1
    assert f"{folder.metrics}: cannot be written: No such file or directory; training continues" in error
    assert [row["step"] for row in training(folder)] == [3, 4, 5, 6, 7, 8, 9]
    assert Checkpoints(folder.path).steps() == [6, 9]
    assert json.loads((folder.path / "report.json").read_text())["steps"] == 9
    assert run_recipe(folder.path, more).train.steps == 9


def test_a_report_that_cannot_be_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback at the end of a run, and an end that does not say how to get at its scores."""

    def refused(*arguments: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("distill_core.run.report.write_whole", refused)
    with pytest.raises(UserError, match=r"report\.json: cannot be written: Read-only file system\. The run is"):
        run("train.steps=2")
