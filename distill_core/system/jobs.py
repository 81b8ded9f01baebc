"""`distill` commands as processes of their own, on this machine or in the jobs of SLURM (by submitit)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from distill_core.errors import UserError
from distill_core.system.extras import install
from distill_core.system.process import end_with_parent

REQUEUES = 1000
"""How often a job whose time was up is queued again: a run's steps end it, not its jobs."""


class Process:
    """A `distill` command in a child process, which ends if this process is killed (on Linux; a run saves first)."""

    def __init__(
        self, arguments: Sequence[str], log: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        """Starts it, in a session of its own: Ctrl-C reaches only this process. `log`: its output is added there."""
        output = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            output = log.open("ab")
        # -P: the folder that this was started in must not hide an installed package
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "distill_core.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
            preexec_fn=partial(_begin_child, os.getpid(), _requeue_signal()),  # there are no threads yet
        )
        if output is not None:
            output.close()

    def poll(self) -> int | None:
        """The exit code; -n when signal n killed it, None while it runs."""
        return self._process.poll()

    def stop(self, number: int) -> None:
        """Send it the signal, on which a run saves and stops."""
        self._process.send_signal(number)


def _begin_child(parent: int, ignored: int | None) -> None:
    if ignored is not None:
        signal.signal(ignored, signal.SIG_IGN)
    end_with_parent(parent, signal.SIGTERM)


def _requeue_signal() -> int | None:
    """The signal before a job's time is up, inside one. SLURM sends it to all processes, and it would kill those that
    have no handler for it: a run, and its data workers."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return None
    from submitit import JobEnvironment

    return int(getattr(signal, f"SIG{JobEnvironment.USR_SIG}"))


class Task(ABC):
    """The function of a job's task: starts a run, or continues it when the job is queued again."""

    process: Process | None = None

    @abstractmethod
    def start(self) -> Process | None:
        """Start or continue it; None if there is nothing left to do."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "process": None}

    def __call__(self) -> int:
        """The run's exit code; called by submitit on the machine that SLURM gives."""
        self.process = self.start()
        try:
            return self._wait()
        except KeyboardInterrupt:
            return self._save()

    def checkpoint(self) -> Any:
        """Called by submitit, in the first task, before the job's time is up or another takes its place."""
        from submitit.helpers import DelayedSubmission

        self._save()
        return DelayedSubmission(self)

    def _save(self) -> int:
        if self.process is not None and self.process.poll() is None:
            self.process.stop(signal.SIGTERM)
        return self._wait()

    def _wait(self) -> int:
        if self.process is None:
            return 0
        # not Popen.wait: it holds a lock that `checkpoint`, called in a signal's handler, would wait for
        while (code := self.process.poll()) is None:
            time.sleep(0.1)
        return code


class RankTask(Task):
    """`distill ARGUMENTS`, of which each task of the job is a rank; the output goes to the task's own files."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = list(arguments)

    def start(self) -> Process:
        return Process(self.arguments, environment=_rank_environment())

    def __call__(self) -> int:
        """Raises `SystemExit` where the run failed, so that SLURM calls the job failed. One that a signal ended has
        not, and a task that fails may end the first one, which is to queue the job again."""
        code = super().__call__()
        if code not in (0, 128 + signal.SIGINT, 128 + signal.SIGTERM):
            raise SystemExit(code if code > 0 else 128 - code)
        return code


def _rank_environment() -> dict[str, str]:
    """What `torchrun` would say to a rank, from what submitit says to a task."""
    from submitit import JobEnvironment

    job = JobEnvironment()
    if job.num_tasks == 1:
        return {}
    return {
        "RANK": str(job.global_rank),
        "WORLD_SIZE": str(job.num_tasks),
        "LOCAL_RANK": str(job.local_rank),
        "LOCAL_WORLD_SIZE": str(job.num_tasks // job.num_nodes),
        "MASTER_ADDR": job.hostnames[0] if job.num_nodes > 1 else "localhost",
        # below the ports that systems give out themselves; neighbours in the queue differ
        "MASTER_PORT": str(10_000 + int(job.raw_job_id) % 20_000),
    }


class Slurm:
    """Submits tasks. `parameters`: those of `submitit.AutoExecutor`, and `cluster` (slurm, or local)."""

    def __init__(self, folder: Path, parameters: Mapping[str, Any]) -> None:
        """`folder`: for submitit's files, on a disk that all machines share. Raises `UserError`."""
        try:
            import submitit
        except ImportError:
            raise UserError(f"--slurm needs submitit: {install('slurm')}") from None
        options = dict(parameters)
        cluster = str(options.pop("cluster", "slurm"))
        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise UserError("--slurm: no sbatch on this machine; start this on a machine that can submit jobs")
        try:
            self.executor = submitit.AutoExecutor(folder=folder, cluster=cluster, slurm_max_num_timeout=REQUEUES)
            self.executor.update_parameters(**options)
        except (NameError, ValueError, TypeError, AssertionError, RuntimeError) as error:
            raise UserError(f"--slurm: {' '.join(str(error).split())}") from error

    def submit(self, task: Task) -> Any:
        """submitit's job, of as many tasks as `parameters` say."""
        return self.executor.submit(task)
