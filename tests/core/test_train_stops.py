"""What ends the loop, and what is saved then: errors of data and components, workers that die, signals."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

import distill_core.cli
from distill_core.batch import Sample, View
from distill_core.contracts.task import Task, TaskConfig
from distill_core.errors import DataError, TrainingStopped, UserError
from distill_core.evaluate.score import Score
from distill_core.interfaces import Loss, LossConfig
from distill_core.outputs import Outputs, Progress
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Entry, Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_core.system.process import Interrupt
from distill_core.teachers.copies import Ema, EmaConfig
from distill_core.train import Result, Trainer
from distill_vl.captions import CaptionAugmentation, CaptionConfig

PLAIN = ("fusion=null", "teacher=null", "evaluate=null", "train.checkpoint.every=null", "train.steps=6")


class ActsConfig(LossConfig):
    at: int
    what: Literal["fails", "breaks_off", "kills_workers", "is_not_finite"] = "fails"


class Acts(Loss):
    """Does something at step `at`, but for runs of which `armed` is False."""

    name = "acts"
    Config = ActsConfig
    armed: ClassVar[bool] = True

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        value = outputs.student["image"].pooled.mean() * torch.rand(())
        if self.armed and outputs.progress.step >= self.config.at:
            if self.config.what == "fails":
                raise ZeroDivisionError("a slip of the plugin")
            if self.config.what == "is_not_finite":
                value = value + torch.nan
            if self.config.what == "kills_workers":
                for worker in multiprocessing.active_children():
                    os.kill(worker.pid or 0, signal.SIGKILL)
                time.sleep(0.5)  # SIGCHLD comes in the middle of the step
        return {"acts": value}, {}

    def after_step(self, outputs: Outputs, progress: Progress) -> None:
        if self.config.what == "breaks_off" and progress.step == self.config.at:
            raise ZeroDivisionError("between the optimiser and the teacher")


class SlipsLateConfig(EmaConfig):
    at: int


class SlipsLate(Ema):
    """Cannot say its metrics of step `at` (from 0), unless it is not `armed`."""

    name = "slips_late"
    Config = SlipsLateConfig
    armed: ClassVar[bool] = True

    def metrics(self, progress: Progress) -> Mapping[str, float]:
        if self.armed and progress.step == self.config.at:
            raise ZeroDivisionError("a slip of the plugin")
        return super().metrics(progress)


class FullConfig(CaptionConfig):
    after: int


class FillsSharedMemory(CaptionAugmentation):
    """After some samples its process may make no file of any size, as where /dev/shm is full."""

    name = "fills_shared_memory"
    Config = FullConfig
    made: ClassVar[int] = 0

    @classmethod
    def roles(cls, config: CaptionConfig) -> tuple[str, ...]:
        return ("global",)

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        FillsSharedMemory.made += 1
        if FillsSharedMemory.made == self.config.after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (16, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return [View("a bird")]


class SlipsConfig(CaptionConfig):
    on: str


class Slips(FillsSharedMemory):
    """Cannot read one sample, unless it is not `armed`."""

    name = "slips"
    Config = SlipsConfig
    armed: ClassVar[bool] = True

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        if self.armed and sample["__key__"] == self.config.on:
            raise ZeroDivisionError("a slip of the plugin")
        return [View("a bird")]


class FailingConfig(TaskConfig):
    calls: tuple[str | None, ...]


class Failing(Task):
    """At each call fails as scripted, or does not."""

    name = "failing"
    Config = FailingConfig
    count: ClassVar[int] = 0

    def run(self, model: Any, sets: Any) -> list[Score]:
        Failing.count += 1
        problem = self.config.calls[Failing.count - 1]
        if problem is not None:
            raise UserError(problem)
        return [Score(None, "M", 1.0)]


@pytest.fixture(autouse=True)
def _deadline() -> Iterator[None]:
    """A hang fails, rather than hang the tests."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(400)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def more(registry: Registry) -> Registry:
    Acts.armed = Slips.armed = SlipsLate.armed = True
    Failing.count = FillsSharedMemory.made = 0
    mine = [Entry(cls, "mine", "mine") for cls in (Acts, FillsSharedMemory, Slips, SlipsLate, Failing)]
    return Registry([*registry.entries.values(), *mine])


Start = Callable[..., Trainer]


@pytest.fixture
def start(tiny_recipe: Path, more: Registry, tmp_path: Path) -> Start:
    """A trainer of the tiny recipe with these overrides, or of the run that began with them."""

    def make(*overrides: str, resume: Path | None = None) -> Trainer:
        recipe = load_recipe(tiny_recipe, registry=more, overrides=overrides)
        folder = RunFolder(resume) if resume is not None else RunFolder.create(tmp_path / "runs", recipe)
        return Trainer(recipe, folder, resume="last" if resume is not None else None, quiet=True)

    return make


def assert_same_end(one: Path, other: Path, *, without_row: int | None = None) -> None:
    """`without_row`: the step whose row was lost in one of them."""
    a, b = Checkpoints(one).read(), Checkpoints(other).read()
    assert a["step"] == b["step"]
    assert all(torch.equal(a["objective"][key], b["objective"][key]) for key in b["objective"])
    assert a["ranks"][0]["data"] == b["ranks"][0]["data"]
    assert torch.equal(a["ranks"][0]["random"]["torch"], b["ranks"][0]["random"]["torch"])
    terms = [
        [row["terms"] for row in RunFolder(path).rows() if "terms" in row and row["step"] != without_row]
        for path in (one, other)
    ]
    assert terms[0] == terms[1]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_component(start: Start, capsys: pytest.CaptureFixture[str], workers: int) -> None:
    """Catches steps that are thrown away, and a state of the batch or the random numbers that the error met: resumed
    with the error gone, the run is the one that never met it."""
    overrides = (*PLAIN, f"data.workers={workers}", "loss=[{name: contrastive}, {name: acts, at: 3}]")
    trainer = start(*overrides)
    with pytest.raises(ZeroDivisionError, match="a slip of the plugin"):
        trainer.run()
    run = trainer.folder.path
    assert Checkpoints(run).steps() == [3]
    assert f"saved at step 3, before the error below. Continue with: distill resume {run}" in capsys.readouterr().err
    Acts.armed = False
    start(*overrides, resume=run).run()
    assert_same_end(run, start(*overrides).run().folder)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_data(start: Start, capsys: pytest.CaptureFixture[str], workers: int) -> None:
    """As above, for a batch that cannot be made: other workers are some batches ahead then."""
    overrides = (
        *PLAIN,
        f"data.workers={workers}",
        "train.steps=12",
        "data.batch_size=2",
        "data.shuffle=1",
        "loss=[{name: contrastive}]",
        "augment.text={name: slips, on: train-2-3}",
    )
    trainer = start(*overrides)
    with pytest.raises(DataError, match=r"sample 'train-2-3': augment\.text \(slips\) failed: ZeroDivisionError"):
        trainer.run()
    run = trainer.folder.path
    (step,) = Checkpoints(run).steps()
    assert 1 <= step < 12
    assert f"saved at step {step}, before the error below" in capsys.readouterr().err
    Slips.armed = False
    start(*overrides, resume=run).run()
    assert_same_end(run, start(*overrides).run().folder)


def test_an_update_that_broke_off_is_not_saved(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a checkpoint of weights that have moved without their teacher, under the number of the step before."""
    trainer = start(
        *PLAIN, "train.checkpoint.every=2", "loss=[{name: contrastive}, {name: acts, at: 3, what: breaks_off}]"
    )
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert Checkpoints(trainer.folder.path).steps() == [2]
    said = capsys.readouterr().err
    assert "not saved: step 4 was interrupted while it changed the weights; the last checkpoint is of step 2" in said


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 5])
def test_an_error_in_a_row_that_is_written_a_step_late(start: Start, at: int) -> None:
    """Of step 3, when step 4 has changed the weights; of the last. Catches a checkpoint of the weights of one step
    under the number of the step before, with its place in the data: resumed, the run is the one that never met it."""
    overrides = (*PLAIN, "loss=[{name: contrastive}]", f"teacher={{name: slips_late, at: {at}, momentum: 0.5}}")
    trainer = start(*overrides)
    with pytest.raises(ZeroDivisionError, match="a slip of the plugin"):
        trainer.run()
    run = trainer.folder.path
    assert Checkpoints(run).steps() == [min(at + 2, 6)]
    steps = [row["step"] for row in RunFolder(run).rows()]
    assert steps == [step for step in range(1, min(at + 2, 6) + 1) if step != at + 1]
    SlipsLate.armed = False
    start(*overrides, resume=run).run()
    assert_same_end(run, start(*overrides).run().folder, without_row=at + 1)


def test_an_error_where_nothing_is_new(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a checkpoint of a run that has not made a step, and the same step written twice."""
    trainer = start(*PLAIN, "loss=[{name: contrastive}, {name: acts, at: 0}]")
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert Checkpoints(trainer.folder.path).steps() == []
    trainer = start(*PLAIN, "train.checkpoint.every=1", "loss=[{name: contrastive}, {name: acts, at: 1}]")
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert "before the error below" not in capsys.readouterr().err


def test_workers_that_are_killed(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    """As by the system when memory runs out, in the middle of a step. Catches torch's traceback, an error that breaks
    off whatever the trainer does just then, a wait for ever, and steps that are lost."""
    trainer = start(*PLAIN, "data.workers=2", "data.prefetch=1", "loss=[{name: acts, at: 1, what: kills_workers}]")
    with pytest.raises(DataError) as caught:
        trainer.run()
    line = str(caught.value)
    assert line.startswith("data worker ")
    assert "was killed (SIGKILL), most likely because memory ran out. Lower data.workers" in line
    assert "\n" not in line
    (step,) = Checkpoints(trainer.folder.path).steps()
    assert step >= 2, "the step in which they were killed is complete"
    assert f"saved at step {step}" in capsys.readouterr().err


def test_shared_memory_that_is_full(start: Start) -> None:
    """Catches a batch that is lost in its worker's queue, while the trainer waits for it."""
    trainer = start(
        *PLAIN, "data.workers=1", "data.batch_size=2", "augment.text={name: fills_shared_memory, after: 6}",
        "loss=[{name: contrastive}]",
    )  # fmt: skip
    with pytest.raises(DataError) as caught:
        trainer.run()
    line = str(caught.value)
    assert line.startswith("a batch does not fit into shared memory")
    assert "Lower data.workers, data.prefetch or data.batch_size" in line
    assert len(line.splitlines()) == 1
    assert Checkpoints(trainer.folder.path).steps()[-1] >= 1


def test_a_signal_while_a_checkpoint_is_written(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a second signal that cuts the save off."""
    save = Checkpoints.save
    trainer = start(*PLAIN, "train.checkpoint.every=2", "loss=[{name: contrastive}]")

    heard: list[str] = []
    say = trainer.interrupt.say
    trainer.interrupt.say = lambda line: (heard.append(line), say(line))[1]

    signals = [signal.SIGTERM, signal.SIGINT]

    def slow(self: Checkpoints, step: int, *arguments: Any, **options: Any) -> Any:
        while signals:  # at the first save alone, and not again where the run ends with the same step
            number = signals.pop(0)
            os.kill(os.getpid(), number)
            until = time.monotonic() + 60
            while time.monotonic() < until and not any(signal.Signals(number).name in line for line in heard):
                time.sleep(0.01)  # which the main thread, busy with the next step, is told between two of its lines
        return save(self, step, *arguments, **options)

    monkeypatch.setattr(Checkpoints, "save", slow)
    result: Result = trainer.run()
    assert result.signal == signal.SIGTERM
    assert Checkpoints(result.folder).steps()[0] == 2
    said = capsys.readouterr().err
    assert "SIGTERM: saving after this step" in said
    assert "SIGINT: a checkpoint is being written; the run ends after it" in said


def test_sighup_is_left_ignored() -> None:
    """Catches a run that was started by nohup and ends with its terminal all the same; without nohup it saves."""
    interrupt = Interrupt(lambda line: None)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupt.listening():
            signal.raise_signal(signal.SIGHUP)
        assert interrupt.signal is None
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with interrupt.listening():
            signal.raise_signal(signal.SIGHUP)
        assert interrupt.signal == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_many_skipped_steps_in_a_row(start: Start, more: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that skips to its end, and one that stops though it had recovered."""
    skip = ("train.nonfinite=skip", "train.max_nonfinite=3", "train.steps=9")
    trainer = start(*PLAIN, *skip, "loss=[{name: contrastive}, {name: acts, at: 2, what: is_not_finite}]")
    with pytest.raises(TrainingStopped, match=r"That is 3 steps in a row \(train\.max_nonfinite\)\.\nThe weights"):
        trainer.run()
    assert Checkpoints(trainer.folder.path).read()["step"] == 4
    Acts.armed = False
    start(*PLAIN, *skip, "loss=[{name: contrastive}, {name: acts, at: 2, what: is_not_finite}]").run()
    forward = Acts.forward

    def now_and_then(self: Acts, outputs: Outputs) -> Any:
        Acts.armed = outputs.progress.step % 3 > 0  # two of three
        return forward(self, outputs)

    monkeypatch.setattr(Acts, "forward", now_and_then)
    result = start(*PLAIN, *skip, "loss=[{name: contrastive}, {name: acts, at: 0, what: is_not_finite}]").run()
    assert Checkpoints(result.folder).read()["skipped_steps"] == 6


@pytest.mark.slow
def test_a_restart_of_one_process(
    tiny_recipe: Path,
    more: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As torchrun restarts it. Catches another launch's run that is continued, and rows of an attempt without a
    checkpoint that stay."""
    monkeypatch.setattr(distill_core.cli, "_registry", lambda: more)

    settings = (*PLAIN, "train.steps=2", "loss=[{name: contrastive}, {name: acts, at: 0}]")
    options = [part for setting in settings for part in ("--set", setting)]
    runs = tmp_path / "runs"

    def attempt(launch: str, restarts: int) -> list[str]:
        """The run folders that there are then."""
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        distill_core.cli.main(["run", str(tiny_recipe), "--runs", str(runs), *options])
        return sorted(path.name for path in runs.iterdir())

    Acts.armed = False
    killed = RunFolder.create(runs, load_recipe(tiny_recipe, registry=more, overrides=settings), "one")
    killed.log({"step": 1, "terms": {"of": "an attempt that was killed"}})
    assert attempt("one", 1) == ["tiny"]
    assert [row["step"] for row in RunFolder(runs / "tiny").rows()] == [1, 2]
    assert attempt("one", 2) == ["tiny"]
    assert "finished at step 2" in capsys.readouterr().err
    assert attempt("two", 1) == ["tiny", "tiny-2"]
    assert attempt("one", 0) == ["tiny", "tiny-2", "tiny-3"]
    options += ["--set", "seed=1"]
    assert len(attempt("one", 1)) == 4, "another recipe"


def test_validations_that_fail_are_told(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches silence about all but the first, and a line at each of hundreds that fail alike."""
    calls = "[null, it is full, it is full, null, it is full, null]"
    start(
        "fusion=null",
        "teacher=null",
        "loss=[{name: contrastive}]",
        "train.steps=5",
        f"evaluate={{every: 1, tasks: [{{name: failing, calls: {calls}}}]}}",
    ).run()
    said = [line for line in capsys.readouterr().err.splitlines() if "not validated" in line]
    assert said == [f"warning: step {i}: not validated: evaluate.tasks.0 (failing): it is full" for i in (2, 5)]
