"""Starts one run of a study in a separate process, on this machine or through SLURM.

A run is identified by its paths: STUDY/recipes/NAME.yaml is its recipe, STUDY/NAME its run folder, STUDY/logs/NAME.log
its output. Whether it starts or continues is decided on the machine that runs it, so that a requeued job continues.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal, Protocol

from distill_core import UserError
from distill_core.tools import Checkpoints, Process, RunFolder, Slurm, Task, read_report

State = Literal["new", "half", "done"]


def not_scored(folder: Path) -> list[str]:
    """A line for each evaluation task of a finished run that failed."""
    return list((read_report(folder) or {}).get("failed", ()))


def read_memory(path: Path) -> dict[str, Any]:
    """A JSON file that a study wrote for its next start; {} if there is none. Raises `UserError`."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is no JSON ({error}); remove it") from error
    return content


def state(folder: Path) -> State:
    """Whether a run is finished (done), has a checkpoint to continue from (half), or neither (new)."""
    if read_report(folder) is not None:
        return "done"
    return "half" if Checkpoints(folder).steps() else "new"


def in_use(folder: Path) -> bool:
    """Whether a process trains in this run folder now."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return False
    try:
        with (folder / ".lock").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


class Job(Protocol):
    """A run that was started."""

    def poll(self) -> int | None:
        """The exit code; None while it runs."""

    def stop(self, number: int) -> None:
        """Ask it to save and stop, with a signal's number."""


class Launcher(Protocol):
    """A way to start runs."""

    def start(self, study: Path, name: str) -> Job:
        """Start or continue the run `name` of the study folder."""


class Local:
    """Starts runs on this machine."""

    def start(self, study: Path, name: str) -> Process:
        """Start the run in a separate process, which saves and ends if the study is killed."""
        folder = study / name
        if state(folder) != "new":
            arguments = ["resume", str(folder)]
        else:
            _clear(folder)
            arguments = ["run", str(study / "recipes" / f"{name}.yaml"), "--runs", str(study)]
        return Process(arguments, study / "logs" / f"{name}.log")


def _clear(folder: Path) -> None:
    """Remove a run that was stopped before its first checkpoint: there is nothing to continue from.

    Raises `UserError` for what is no run, and for one that another process trains (a job that was submitted twice).
    """
    if not folder.exists():
        return
    if not (folder / "recipe.yaml").is_file() and any(folder.iterdir()):
        raise UserError(f"{folder}: is in the way of a run, and is no run folder; move it")
    run = RunFolder(folder)
    run.lock()
    try:
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != ".lock":  # held open, which some network file systems cannot remove
                path.unlink()
    finally:
        run.unlock()
    shutil.rmtree(folder)


class SlurmJobs:
    """Starts runs through SLURM."""

    def __init__(self, slurm: Slurm) -> None:
        self.slurm = slurm

    def start(self, study: Path, name: str) -> SlurmJob:
        """Submit the run as a job."""
        return SlurmJob(self.slurm.submit(StudyTask(study.absolute(), name)), study / "logs" / f"{name}.log")


class StudyTask(Task):
    """One run of a study, in a job."""

    def __init__(self, study: Path, name: str) -> None:
        self.study, self.name = study, name

    def start(self) -> Process | None:
        if state(self.study / self.name) == "done":  # by another job, while this one was in the queue
            return None
        return Local().start(self.study, self.name)


class SlurmJob:
    """A run in a submitted SLURM job."""

    def __init__(self, job: Any, log: Path) -> None:
        self.job, self.log = job, log
        self.stopped = 0

    def poll(self) -> int | None:
        """As `Job.poll`. What went wrong outside the run itself is added to its log."""
        if not self.job.done():
            return None
        if self.stopped:
            return 128 + self.stopped
        try:
            return int(self.job.result())
        except Exception as error:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"\nSLURM job {self.job.job_id}: {type(error).__name__}: {error}\n")
            return 1

    def stop(self, number: int) -> None:
        """Cancel the job; SLURM sends it SIGTERM, and the run saves."""
        self.stopped = number
        self.job.cancel(check=False)
