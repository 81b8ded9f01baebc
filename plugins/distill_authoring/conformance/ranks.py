"""Runs functions in two other processes, the ranks of a gloo group on this machine."""

from __future__ import annotations

import atexit
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from select import select
from typing import Any, BinaryIO

import torch

from distill_authoring.conformance.suite import CheckFailed, NotApplicable

PATIENCE = 120.0
"""Seconds that ranks wait for each other."""
TO_START = 600.0
"""Seconds in which they import torch and meet, on however busy a machine."""
_GRACE = 3.0
"""Seconds that the other rank has when one has raised an error."""

_RANK = "import sys; from distill_authoring.conformance.ranks import serve; serve(*sys.argv[1:])"


class _Ranks:
    """Two processes of a gloo group. They import torch once, and run one function after another.

    Their string hashes differ from each other and this process's, to find components that depend on them.
    """

    def __init__(self) -> None:
        self.stopped = False
        self.folder = tempfile.TemporaryDirectory()
        path = os.pathsep.join(filter(None, sys.path))
        store = str(Path(self.folder.name) / "store")
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", _RANK, str(rank), store, str(TO_START)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # gloo also reports here what is raised
                env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": str(rank + 1)},
            )
            for rank in (0, 1)
        ]
        self._answers(TO_START)  # that they have met

    def run(self, jobs: list[bytes]) -> list[Any]:
        """The results of both ranks. Raises what a rank raised."""
        for process, job in zip(self.processes, jobs, strict=True):
            assert process.stdin is not None
            pickle.dump(job, process.stdin)
            process.stdin.flush()
        return self._answers(PATIENCE)

    def _answers(self, patience: float) -> list[Any]:
        pending: dict[BinaryIO, int] = {_out(process): rank for rank, process in enumerate(self.processes)}
        results: dict[int, Any] = {}
        problems: list[Exception] = []
        while pending:
            ready = select(list(pending), [], [], _GRACE if problems else patience)[0]
            if not ready:
                self.stop()
                hang = CheckFailed("two ranks wait for each other: every rank must call the same collectives")
                raise problems[0] if problems else hang
            for end in ready:
                rank = pending.pop(end)
                try:
                    problem, results[rank] = pickle.load(end)
                except EOFError:
                    self.stop()
                    raise CheckFailed(f"the process of rank {rank} (of two) has ended") from None
                if problem is not None:
                    problems.append(problem)
        if problems:
            raise problems[0]
        return [results[0], results[1]]

    def stop(self) -> None:
        """Kill both: one of them may wait in a collective forever."""
        self.stopped = True
        for process in self.processes:
            process.kill()
            process.communicate()
        self.folder.cleanup()


def _out(process: subprocess.Popen[bytes]) -> BinaryIO:
    assert process.stdout is not None
    return process.stdout  # type: ignore[return-value]


_started: list[_Ranks] = []


@atexit.register
def stop() -> None:
    """End the ranks that were started."""
    while _started:
        if not (ranks := _started.pop()).stopped:
            ranks.stop()


def on_two_ranks(function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[Any]:
    """The results of a module-level function for the arguments of rank 0 and of rank 1.

    Raises `CheckFailed` if it raises on a rank, or the ranks wait for each other forever, and `NotApplicable` if the
    other processes cannot import what is in the arguments.
    """
    try:
        jobs = [pickle.dumps((function, values)) for values in arguments]
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise NotApplicable(f"other processes cannot import it by its name: {error}") from error
    if not _started or _started[0].stopped:
        _started[:] = [_Ranks()]
    return _started[0].run(jobs)


def serve(number: str, store: str, patience: str) -> None:
    """The main loop of a rank: runs functions from stdin until it closes."""
    rank = int(number)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a component's prints are no results
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=float(patience)),
    )
    pickle.dump((None, None), answers)
    answers.flush()
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(_answer(rank, job), answers)
        answers.flush()


def _answer(rank: int, job: bytes) -> tuple[Exception | None, Any]:
    try:
        function, arguments = pickle.loads(job)
    except (ImportError, AttributeError) as error:
        return NotApplicable(f"other processes cannot import it by its name: {error}"), None
    try:
        return None, function(*arguments)
    except Exception as error:
        return CheckFailed(f"rank {rank} of two raises {type(error).__name__}: {error}"), None
