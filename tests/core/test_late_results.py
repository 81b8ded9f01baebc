"""The host waits for the device once a step, a step late; and what a step that is not finite leaves alone."""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from host_reads import HostReads
from torch import Tensor

from distill_core.batch import Batch
from distill_core.data.example import example_batch
from distill_core.interfaces import Loss, LossConfig
from distill_core.outputs import Outputs, Progress
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Entry, Registry
from distill_core.run.folder import RunFolder
from distill_core.step import StepResult, TrainStep
from distill_core.system import transfer
from distill_core.train import Trainer

QUIET = ("evaluate=null", "train.checkpoint.every=null", "train.steps=6", "train.log_every=1")


def test_the_counter_sees_reads() -> None:
    """Each way to read a tensor, of what is computed from a marked one. Would catch a counter that counts nothing."""
    ways: list[Callable[[Tensor], Any]] = [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
    ]
    for way in ways:
        with HostReads() as reads:
            x, other = torch.randn(3), torch.randn(3)
            reads.mark(x)
            way(other)
            assert reads.lines == []
            way(2 * x)
        assert len(reads.lines) == 1, reads.lines


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_the_host_reads_the_device_once_a_step_and_a_step_late(
    tiny_recipe: Path, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A whole run with COSMOS, every step logged. Would catch lengths that the text tower reads, a norm or a loss read
    before the next step is launched, and a metric read by itself."""
    recipe = load_recipe(tiny_recipe, registry=registry, overrides=[*QUIET, f"train.precision={name}"])
    trainer = Trainer(recipe, RunFolder.create(tmp_path / "runs", recipe), quiet=True)
    reads = HostReads()
    counts: list[int] = []  # reads so far, when each step had been launched
    late: list[int] = []  # of what was read, the step; and how many had been launched by then
    launched = 0
    step, upload, numbers = TrainStep.__call__, transfer.Uploads.__call__, StepResult.numbers.func

    def uploading(self: transfer.Uploads, batch: Batch) -> Batch:
        moved = upload(self, batch)
        moved._map(lambda x: (reads.mark(x), x)[1])
        return moved

    def stepping(self: TrainStep, batch: Batch, progress: Progress, **options: Any) -> StepResult:
        nonlocal launched
        result = step(self, batch, progress, **options)
        result.number = launched = launched + 1  # type: ignore[attr-defined]
        counts.append(len(reads.lines))
        return result

    def reading(self: StepResult) -> Any:
        late.append(launched - self.number)  # type: ignore[attr-defined]
        return numbers(self)

    monkeypatch.setattr(transfer.Uploads, "__call__", uploading)
    monkeypatch.setattr(TrainStep, "__call__", stepping)
    monkeypatch.setattr(StepResult.numbers, "func", reading)
    with reads:
        reads.mark(*trainer.objective.parameters(), *trainer.objective.buffers(), trainer.train_step.not_finite)
        trainer.run()
    assert late == [1] * 5 + [0]  # the last has none after it
    assert counts == [0, 0, 1, 2, 3, 4], reads.lines
    assert len(reads.lines) == 6, reads.lines
    assert all("transfer.py" in line for line in reads.lines)


class Counts(Loss):
    """State of every kind, moved after each step; not finite at the steps `at`."""

    name = "counts"
    Config = LossConfig
    at: ClassVar[tuple[int, ...]] = ()
    wide: ClassVar[bool] = False

    def __init__(self, config: Any, plan: Any) -> None:
        super().__init__(config, plan)
        self.register_buffer("centre", torch.zeros(3))
        self.scale = torch.nn.Parameter(torch.zeros(()))
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        value = outputs.student["image"].pooled.square().mean() + self.scale.square() + self.weight.square().sum()
        return {"counts": value * (torch.nan if outputs.progress.step in self.at else 1.0)}, {}

    @torch.no_grad()
    def after_step(self, outputs: Outputs, progress: Progress) -> None:
        self.centre.add_(1)
        self.scale.add_(1)
        if self.wide:
            self.weight.add_(1)


@contextmanager
def counting(*at: int, wide: bool = False) -> Any:
    before = Counts.at, Counts.wide
    Counts.at, Counts.wide = at, wide
    yield
    Counts.at, Counts.wide = before


def made(tiny_recipe: Path, registry: Registry, *overrides: str) -> tuple[TrainStep, Batch]:
    mine = Registry([*registry.entries.values(), Entry(Counts, "mine", "mine")])
    recipe = load_recipe(
        tiny_recipe, registry=mine, overrides=["loss=[{name: counts}]", "fusion=null", "evaluate=null", *overrides]
    )
    torch.manual_seed(0)
    return TrainStep(recipe, build_objective(recipe), torch.device("cpu")), example_batch(recipe, 4)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("update", ["before_optimizer", "after_optimizer"])
def test_a_step_that_is_not_finite_changes_nothing(
    tiny_recipe: Path, registry: Registry, optimizer: str, update: str
) -> None:
    """Student, teacher, optimiser and the losses' own state, by an optimiser that skips on the device and by one that
    cannot. Would catch a teacher that moves, a centre that is NaN for ever, a decayed weight."""
    step, batch = made(tiny_recipe, registry, f"teacher={{momentum: 0.5, update: {update}}}", "train.nonfinite=skip")
    if optimizer == "sgd":
        step.optimizer = torch.optim.SGD(step.parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
        step.built = [{"lr": 0.1}]

    def state() -> dict[str, Tensor]:
        own = {name: x.clone() for name, x in step.objective.state_dict().items()}
        for i, of_parameter in enumerate(step.optimizer.state.values()):
            own |= {f"{i}.{name}": x.clone() for name, x in of_parameter.items() if isinstance(x, Tensor)}
        return own

    with counting(1, 2):
        assert step(batch, Progress(0, 9)).finite
        before = state()
        assert [step(batch, Progress(i, 9)).not_finite for i in (1, 2)] == [1, 2]
        after = state()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert before.keys() == after.keys()
        assert step(batch, Progress(3, 9)).not_finite == 0
    moved = {name for name, x in state().items() if not torch.equal(x, after[name])}
    assert {"loss.counts.centre", "loss.counts.scale"} <= moved
    assert any(name.startswith("teacher.default.backbone.image") for name in moved)


def test_nothing_moves_after_the_last_step_that_is_allowed(tiny_recipe: Path, registry: Registry) -> None:
    """`nonfinite: stop` saves the weights from before the step, though one more was launched by then."""
    step, batch = made(tiny_recipe, registry)
    with counting(0):
        step(batch, Progress(0, 9))
        before = {name: x.clone() for name, x in step.objective.state_dict().items()}
        assert step(batch, Progress(1, 9)).not_finite == 2  # finite by itself
    assert all(torch.equal(x, before[name]) for name, x in step.objective.state_dict().items())


def test_larger_parameters_are_not_for_after_step(tiny_recipe: Path, registry: Registry) -> None:
    """Of them no copy is made, so that a step that is not finite could not be undone."""
    step, batch = made(tiny_recipe, registry)
    with counting(wide=True), pytest.raises(Exception, match=r"'counts'.* the parameter 'weight'.*buffer"):
        step(batch, Progress(0, 9))


def test_an_error_in_the_step_after_one_that_is_logged(
    tiny_recipe: Path, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a row that is lost: the step is saved, so that a resumed run will not write it."""
    recipe = load_recipe(tiny_recipe, registry=registry, overrides=QUIET)
    folder = RunFolder.create(tmp_path / "runs", recipe)
    trainer = Trainer(recipe, folder, quiet=True)
    step = TrainStep.__call__

    def failing(self: TrainStep, batch: Batch, progress: Progress, **options: Any) -> StepResult:
        if progress.step == 3:
            raise ZeroDivisionError("a slip of the plugin")
        return step(self, batch, progress, **options)

    monkeypatch.setattr(TrainStep, "__call__", failing)
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert [row["step"] for row in folder.rows()] == [1, 2, 3]
    assert trainer.saver.saved == 3


class FakeStream:
    """A CUDA stream that notes what happens."""

    log: ClassVar[list[str]] = []

    def __init__(self, name: str) -> None:
        self.name = name

    def wait_stream(self, other: "FakeStream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def test_batches_are_copied_on_a_stream_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, of which only the streams are pretended. Would catch a copy on the stream that computes, one that it
    does not wait for, and memory that is used again while it computes."""
    FakeStream.log.clear()
    computes = FakeStream("compute")

    @contextmanager
    def on(stream: FakeStream) -> Any:
        FakeStream.log.append(f"on {stream.name}")
        yield
        FakeStream.log.append("off")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream("copy"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computes)
    monkeypatch.setattr(Batch, "to", lambda self, where: (FakeStream.log.append("copied"), self)[1])
    monkeypatch.setattr(Batch, "record_stream", lambda self, stream: FakeStream.log.append(f"kept for {stream.name}"))
    batch = Batch({}, ["a"])
    assert transfer.Uploads(torch.device("cuda"))(batch) is batch
    assert FakeStream.log == ["on copy", "copied", "off", "compute waits for copy", "kept for compute"]
