"""`distill run --nproc`: what is checked before ranks start, how they end, and what is said of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.multiprocessing import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.launcher import api as launcher
from torch.distributed.launcher.api import LaunchConfig

from distill_core.cli import main
from distill_core.errors import UserError
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_core.run.lockstep import LOOK_AHEAD
from distill_core.system import ranks

GATE = Path(__file__).parents[2] / "end_to_end" / "gate"
LESS = ("loss.1=null", "fusion=null", "teacher=null", "loss.2=gate", "evaluate.tasks=[]")


def distill(*arguments: str | Path) -> object:
    """The exit code of a command in this process."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    return end.value.code


@pytest.mark.parametrize(
    ("arguments", "environment", "line"),
    [
        (["--nproc", "2", "--set", "loss.0.temperature=hot"], {}, "--set loss.0.temperature: must be"),
        (["--nproc", "0"], {}, "Error: Invalid value for '--nproc'"),
        (["--nproc", "2", "--set", "train.device=cuda"], {}, "--nproc 2: this machine has 0 GPUs"),
        (["--nproc", "2"], {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, "--nproc 2: the launcher (WORLD_SIZE is set)"),
    ],
)
def test_a_mistake_is_said_once_and_starts_no_rank(
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    environment: dict[str, str],
    line: str,
) -> None:
    """Catches a mistake that each rank repeats below torch's banners, and an option that a launch overrides unsaid."""
    monkeypatch.setattr(ranks, "start_ranks", lambda count, arguments: pytest.fail("starts ranks"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distill("run", tiny_recipe, "--runs", tmp_path / "runs", *arguments) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith(line)
    assert not (tmp_path / "runs").exists()


OF_A_RUN = [("resume",), ("eval",), ("replay", "--step", "3")]


@pytest.mark.parametrize(("command", "options"), [(command, options) for command, *options in OF_A_RUN])
def test_commands_of_a_run_check_it_first(
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    command: str,
    options: list[str],
) -> None:
    started: list[int] = []

    def start(count: int, arguments: tuple[str, ...]) -> int:
        started.append(count)
        return 143

    monkeypatch.setattr(ranks, "start_ranks", start)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert distill(command, tmp_path / "nowhere", *options, "--nproc", "2") == 2
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert started == []
    (tmp_path / "run").mkdir()
    tiny_recipe.rename(tmp_path / "run" / "recipe.yaml")
    assert distill(command, tmp_path / "run", *options, "--nproc", "2") == 143
    assert started == [2]


def test_ranks_get_the_command_line(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what stands before the command. Would catch an option that the ranks never see."""
    started: list[tuple[int, tuple[str, ...]]] = []

    def start(count: int, arguments: tuple[str, ...]) -> int:
        started.append((count, arguments))
        return 130

    monkeypatch.setattr(ranks, "start_ranks", start)
    line = ["--without", "aim", "run", str(tiny_recipe), "--nproc", "3", "--set", "name=x", "--runs", str(tmp_path)]
    assert distill(*line) == 130
    assert started == [(3, tuple(line))]


@pytest.mark.parametrize(
    ("device", "gpus", "error"),
    [
        ("auto", 0, None),
        ("cpu", 1, None),
        ("auto", 2, None),
        ("cuda", 1, "--nproc 2: this machine has 1 GPU, and each rank needs its own"),
        ("auto", 1, "--nproc 2: this machine has 1 GPU, and each rank needs its own"),
        ("cuda:1", 4, "--nproc 2: train.device: cuda:1 is one GPU, and each rank needs its own"),
    ],
)
def test_each_rank_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, device: str, gpus: int, error: str | None) -> None:
    """Two ranks on one GPU end in an error of NCCL's, or hang."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if error is None:
        ranks.require_devices(2, device)
        return
    with pytest.raises(UserError) as refused:
        ranks.require_devices(2, device)
    assert str(refused.value) == error


@pytest.mark.parametrize(
    ("codes", "code", "said"),
    [
        ([143, 2], 2, ""),  # torch ended the first by SIGTERM, because of the second's error
        ([4, 3], 3, ""),
        ([4, -9], 4, ""),  # a rank has named the killed one
        ([-9, 143], 137, "rank 0 (pid 100) was killed by SIGKILL\n"),
        ([143, 143], 143, ""),
    ],
)
def test_the_exit_code_is_that_of_what_went_wrong(
    codes: list[int], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not that of a rank which ended because of it."""
    failures = [ProcessFailure(rank, 100 + rank, number, "<N/A>") for rank, number in enumerate(codes)]
    assert ranks._exit_code(failures) == code
    assert capsys.readouterr().err == said


def test_torch_2_10_gives_ranks_the_time_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launcher has the option for signals, and none for how long ranks may take: 30 s, after which it kills them.
    Catches a large model's checkpoint that is cut off, and a rank that hangs for an hour after another has failed."""
    closed: list[tuple[int | None, int]] = []

    def close(self: Any, death_sig: int | None = None, timeout: int = 30) -> None:
        closed.append((death_sig, timeout))

    def launched(config: LaunchConfig, command: str) -> Any:
        assert set(config.signals_to_handle.split(",")) <= {"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"}

        def run(*arguments: str) -> None:
            try:
                raise SignalException("", signal.SIGTERM)
            except SignalException as end:  # as the agent does
                PContext.close(object(), end.sigval)  # type: ignore[arg-type]
                raise

        return run

    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "")  # so that it is taken away again after the test
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    monkeypatch.setattr(PContext, "close", close)
    monkeypatch.delattr(LaunchConfig, "shutdown_timeout", raising=False)
    monkeypatch.setattr(launcher, "elastic_launch", launched)
    assert ranks.start_ranks(2, ["run"]) == 143
    PContext.close(object())  # type: ignore[arg-type]
    assert closed == [(signal.SIGTERM, ranks.SECONDS_TO_SAVE), (None, 30)]


def start(tmp_path: Path, step: int, *arguments: str | Path) -> subprocess.Popen[str]:
    """A command in a process of its own, whose ranks wait in the middle of step `step` (from 0) for the file `go`."""
    for name in ("reached", "go"):
        (tmp_path / name).unlink(missing_ok=True)
    environment = {"PYTHONPATH": str(GATE), "GATE": str(tmp_path), "GATE_STEP": str(step), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "errors").open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "distill_core.cli", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            env={**os.environ, **environment},
        )


def ended(process: subprocess.Popen[str], folder: Path) -> tuple[str, str]:
    """What the process has said, and its errors, once it has ended."""
    out, _ = process.communicate(timeout=400)
    return out, (folder / "errors").read_text()


def signal_in_step(process: subprocess.Popen[str], folder: Path, number: int) -> str:
    """The process's errors, after a signal to it alone, as from a terminal, while its ranks are in a step."""

    def wait_for(there: Callable[[], bool]) -> None:
        end = time.monotonic() + 400
        while not there():
            assert process.poll() is None, ended(process, folder)
            assert time.monotonic() < end
            time.sleep(0.05)

    wait_for((folder / "reached").exists)
    process.send_signal(number)
    heard = f"{signal.Signals(number).name}: saving after this step"
    wait_for(lambda: heard in (folder / "errors").read_text())
    (folder / "go").touch()
    _, errors = ended(process, folder)
    assert process.returncode == 128 + number, errors
    return errors


@pytest.mark.slow
def test_stopped_twice_and_continued(tiny_recipe: Path, tmp_path: Path) -> None:
    """Ctrl-C, then SIGTERM. Catches ranks that a signal does not reach, or twice, that save several times or are killed
    while they save, a wrong exit code, and torch's banners around it."""
    run = tmp_path / "runs" / "tiny"
    settings = [part for setting in (*LESS, "train.log_every=1", "train.steps=12") for part in ("--set", setting)]
    command = ["run", tiny_recipe, "--runs", tmp_path / "runs", "--nproc", 2, *settings]
    process = start(tmp_path, 1, *command)
    errors = signal_in_step(process, tmp_path, signal.SIGINT)
    # ranks that hold their next batches are not asked before them
    saved = re.findall(r"SIGINT: saved at step (\d+)\. Continue with: distill resume", errors)
    assert len(saved) == 1, errors
    assert 2 <= int(saved[0]) <= 2 + LOOK_AHEAD
    for noise in ("Traceback", "torch", "****", "closing signal"):
        assert noise not in errors
    assert Checkpoints(run).steps() == [int(saved[0])]
    assert len(Checkpoints(run).read()["ranks"]) == 2

    process = start(tmp_path, 6, "resume", run, "--nproc", 2)
    errors = signal_in_step(process, tmp_path, signal.SIGTERM)
    saved = re.findall(r"SIGTERM: saved at step (\d+)", errors)
    assert len(saved) == 1, errors
    assert 7 <= int(saved[0]) <= 7 + LOOK_AHEAD
    process = start(tmp_path, 99, "resume", run, "--nproc", 2)
    out, errors = ended(process, tmp_path)
    assert process.returncode == 0, errors
    assert out.count("picture: ") == 1, "what is printed at the end, once"
    assert [row["step"] for row in RunFolder(run).rows() if "terms" in row] == list(range(1, 13))


@pytest.mark.slow
def test_an_error_of_the_ranks_is_not_drowned(tiny_recipe: Path, tmp_path: Path) -> None:
    """A file that is looked for when the model is built. Catches torch's report of it, with a traceback of its own."""
    weights = f"weights=[{{name: state_dict, source: {tmp_path}/nowhere.safetensors}}]"
    settings = [part for setting in (*LESS, weights) for part in ("--set", setting)]
    process = start(tmp_path, 99, "run", tiny_recipe, "--runs", tmp_path / "runs", "--nproc", 2, *settings)
    _, errors = ended(process, tmp_path)
    assert process.returncode == 2, errors
    assert f"{tmp_path}/nowhere.safetensors: no such file" in errors
    for noise in ("Traceback", "ChildFailedError", "FAILED", "exitcode"):
        assert noise not in errors
    assert not (tmp_path / "runs" / "tiny").exists()
