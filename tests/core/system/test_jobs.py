"""`distill run --slurm`: submitit's local cluster is processes of this machine, with SLURM's life of a job."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distill_core.cli import main
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder, read_report
from distill_core.run.lockstep import LOOK_AHEAD
from distill_core.system import jobs
from distill_core.system.process import Interrupt

GATE = Path(__file__).parents[2] / "end_to_end" / "gate"
CHANGES = ("loss.1=null", "fusion=null", "teacher=null", "loss.2=gate", "evaluate.tasks=[]")
SETTINGS = [part for change in CHANGES for part in ("--set", change)]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["fast"], "--slurm fast: write it as key=value, as timeout_min=60 or slurm_partition=gpu"),
        (["timeout_min=5"], "--slurm: no sbatch on this machine; start this on a machine that can submit jobs"),
        (["cluster=local", "speed=1"], "--slurm: "),
        (["cluster=local", "nodes=2"], "--slurm: LocalExecutor can use only one node"),
    ],
)
def test_a_mistake_leaves_no_run(
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    options: list[str],
    line: str,
) -> None:
    """Catches the folder of a run that no job will start."""
    pytest.importorskip("submitit")
    monkeypatch.setattr("shutil.which", lambda name: None)
    slurm = [part for option in options for part in ("--slurm", option)]
    with pytest.raises(SystemExit) as end:
        main(["run", str(tiny_recipe), "--runs", str(tmp_path / "runs"), *slurm])
    assert end.value.code == 2
    err = capfd.readouterr().err
    assert err.startswith(line)
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.glob("runs/*"))


def test_sigterm_of_a_scheduler_and_of_a_launcher_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM sends it to all processes of a job, torchrun and submitit's task pass theirs on. Would catch a run that
    therefore ends without saving; one that comes later, or another signal, still ends it at once."""
    seconds = [100.0]
    monkeypatch.setattr("distill_core.system.process.time.monotonic", lambda: seconds[0])
    said: list[str] = []
    interrupt = Interrupt(said.append)
    with interrupt.listening():
        signal.raise_signal(signal.SIGTERM)
        seconds[0] += 2
        signal.raise_signal(signal.SIGTERM)
        assert len(said) == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        seconds[0] += 4
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_ranks_of_several_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """By SLURM's environment of the sixth of eight tasks on two machines. Would catch ranks that number themselves by
    machine, and a first machine that is each one's own."""
    pytest.importorskip("submitit")
    slurm = {"SLURM_JOB_ID": "4242017", "SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1"}
    slurm |= {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "gpu[07-08]"}
    for name, value in {**slurm, "SUBMITIT_EXECUTOR": "slurm"}.items():
        monkeypatch.setenv(name, value)
    expected = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert jobs._rank_environment() == {**expected, "MASTER_ADDR": "gpu07", "MASTER_PORT": "12017"}


@pytest.mark.parametrize(("code", "ends"), [(0, None), (143, None), (2, 2), (4, 4), (-9, 137)])
def test_slurm_hears_of_a_run_that_failed(monkeypatch: pytest.MonkeyPatch, code: int, ends: int | None) -> None:
    """And of none that was stopped: where a task that fails ends the job, the first could not queue it again."""

    class Ended:
        def poll(self) -> int:
            return code

    monkeypatch.setattr(jobs.RankTask, "start", lambda self: Ended())
    task = jobs.RankTask(["resume", "x"])
    if ends is None:
        assert task() == code
        return
    with pytest.raises(SystemExit) as end:
        task()
    assert end.value.code == ends


def wait_for(there: Callable[[], object], folder: Path) -> None:
    end = time.monotonic() + 600
    while not there():
        assert time.monotonic() < end, "\n".join(log.read_text() for log in folder.glob("*_log.*"))
        time.sleep(0.05)


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*children, *(other for child in children for other in descendants(child))]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the job's processes in /proc")
def test_a_requeued_job_of_two_ranks(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The signal before the time is up goes to all processes, as SLURM sends it. Catches one that it kills, ranks that
    do not find one another, a save for each of them, and a requeued job that begins another run."""
    submitit = pytest.importorskip("submitit")
    environment = {"PYTHONPATH": str(GATE), "GATE": str(tmp_path), "GATE_STEP": "1", "OMP_NUM_THREADS": "1"}
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.syspath_prepend(str(GATE))
    options = ["--slurm", "cluster=local", "--slurm", "timeout_min=10", "--nproc", "2"]
    changes = [*SETTINGS, "--set", "data.workers=1", "--set", "train.steps=8"]
    main(["run", str(tiny_recipe), "--runs", str(tmp_path / "runs"), *options, *changes])
    run = tmp_path / "runs" / "tiny"
    files = run / "slurm"
    job = re.search(rf"^job (\d+): {run}; its output: {files}/\1_\*_log", capfd.readouterr().err, re.MULTILINE)
    assert job is not None
    wait_for((tmp_path / "reached").exists, files)
    for pid in descendants(int(job[1])):
        os.kill(pid, submitit.JobEnvironment._usr_sig())

    def output() -> str:
        return "".join(log.read_text() for log in files.glob("*_log.*"))

    wait_for(lambda: "SIGTERM: saving after this step" in output(), files)
    (tmp_path / "go").touch()
    wait_for(lambda: read_report(run) is not None, files)
    saved = re.findall(r"SIGTERM: saved at step (\d+)", output())
    assert len(saved) == 1, output()
    assert 2 <= int(saved[0]) <= 2 + LOOK_AHEAD
    assert f"resumed at step {saved[0]} of 8" in output()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny"]
    assert [row["step"] for row in RunFolder(run).rows() if "terms" in row] == list(range(1, 9))
    assert len(Checkpoints(run).read()["ranks"]) == 2
