"""A rank of two or three that dies or fails: the others end within seconds, and one line names the first error.

The ranks are started without torchrun, which would end the others itself.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from distill_core.errors import OtherRankFailed
from distill_core.run.checkpoint import Checkpoints
from distill_core.system import peers as peers_module
from distill_core.system.peers import Peers

SCRIPT = Path(__file__).with_name("distributed_failures.py")
SECONDS = 100.0
"""For what takes some five on a machine that is not busy; ranks whose end nobody hears of take two minutes and more."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port: int = listener.getsockname()[1]
        return port


class Launch:
    """The ranks of a launch, each a process of its own with its standard error in a file."""

    def __init__(self, folder: Path, world: int, *arguments: str) -> None:
        self.logs = [folder / f"rank-{rank}.log" for rank in range(world)]
        common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
        self.processes = []
        for rank, log in enumerate(self.logs):
            with log.open("wb") as file:
                environment = {**os.environ, **common, "RANK": str(rank), "OMP_NUM_THREADS": "1"}
                command = [sys.executable, str(SCRIPT), *arguments]
                self.processes.append(subprocess.Popen(command, stdout=file, stderr=file, env=environment))

    def end(self, seconds: float = 400.0) -> tuple[list[int], float, list[str]]:
        """Exit codes; the seconds from the first rank's end to the last's; what each rank said."""
        ends: dict[int, float] = {}
        start = time.monotonic()
        try:
            while len(ends) < len(self.processes):
                assert time.monotonic() - start < seconds, "hangs:\n" + "\n".join(log.read_text() for log in self.logs)
                for rank, process in enumerate(self.processes):
                    if rank not in ends and process.poll() is not None:
                        ends[rank] = time.monotonic()
                time.sleep(0.05)
        finally:
            for process in self.processes:
                process.kill()
        codes = [process.returncode for process in self.processes]
        return codes, max(ends.values()) - min(ends.values()), [log.read_text() for log in self.logs]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed(tmp_path: Path, tiny_recipe: Path, victim: int) -> None:
    """As by the system where memory runs out; rank 0 holds the launch's store. Catches ranks that wait for it, a
    traceback of gloo, an error that names nobody, and one that all ranks repeat."""
    launch = Launch(tmp_path, 3, str(tiny_recipe), str(tmp_path / "runs"), "killed", "3", str(victim))
    codes, seconds, said = launch.end()
    assert codes[victim] == -9, said
    others = [rank for rank in range(3) if rank != victim]
    assert [codes[rank] for rank in others] == [OtherRankFailed.exit_code] * 2, said
    assert seconds < SECONDS
    text = "\n".join(said)
    assert "Traceback" not in text
    if victim:
        who = rf"rank 1 \(\S+, pid {launch.processes[1].pid}\) has ended without a word: killed"
        assert len(re.findall(rf"^rank [02]: {who}", text, re.MULTILINE)) == 1, text
    else:
        assert "rank 0, or torchrun, has ended" in text
    assert Checkpoints(tmp_path / "runs" / "tiny").steps() == [2]


@pytest.mark.slow
def test_a_rank_that_fails_in_a_step(tmp_path: Path, tiny_recipe: Path) -> None:
    """Catches a wait of the failed rank for others that cannot answer, gloo's words for the error's, and a checkpoint
    of a step that one rank has not made."""
    launch = Launch(tmp_path, 2, str(tiny_recipe), str(tmp_path / "runs"), "step", "3")
    codes, seconds, said = launch.end()
    assert codes == [OtherRankFailed.exit_code, 1], said
    assert seconds < SECONDS
    line = r"ZeroDivisionError: a slip of the plugin \(distributed_failures.py:\d+, in forward\)"
    assert re.search(rf"^rank 1: {line}$", said[1], re.MULTILINE)
    assert "Traceback" in said[1], "a bug has its traceback, on the rank that has the bug"
    assert re.search(rf"^rank 0: rank 1 \(.*\) failed first: {line}\. All ranks end", said[0], re.MULTILINE)
    assert "Traceback" not in said[0]
    assert "gloo" not in said[0]
    assert (
        "step 3 is not saved: the other ranks are in the middle of a step; the last checkpoint is of step 2" in said[1]
    )
    assert Checkpoints(tmp_path / "runs" / "tiny").steps() == [2]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["term", "term_all"])
def test_sigterm_of_one_rank_or_of_all(tmp_path: Path, tiny_recipe: Path, where: str) -> None:
    """Catches ranks that stop at different steps, a checkpoint of each, and a rank that goes on alone."""
    launch = Launch(tmp_path, 2, str(tiny_recipe), str(tmp_path / "runs"), where, "2")
    codes, _, said = launch.end()
    assert codes == [128 + signal.SIGTERM] * 2, said
    folder = tmp_path / "runs" / "tiny"
    step = int(re.search(rf"SIGTERM: saved at step (\d)\. Continue with: distill resume {folder}", said[0])[1])  # type: ignore[index]
    assert step in (3, 4, 5), "the step in which it came, or one of the two after it: ranks hear of it a step late"
    assert Checkpoints(folder).steps() == [*range(2, step, 2), step][-2:], "two are kept"
    assert "\n".join(said).count("saved at step") == 1
    assert len(Checkpoints(folder).read()["ranks"]) == 2


@pytest.mark.slow
def test_a_rank_that_stalls(tmp_path: Path, tiny_recipe: Path) -> None:
    """Catches a line of each rank that only waits for the one that stalls, and none of that one."""
    runs = tmp_path / "runs"
    launch = Launch(tmp_path, 2, str(tiny_recipe), str(runs), "stalls", "3")
    stack = runs / "tiny" / "stalls" / "rank-1.txt"
    end = time.monotonic() + 400
    while time.monotonic() < end and not (stack.exists() and "in stall" in stack.read_text()):
        time.sleep(0.1)
    time.sleep(6)  # in which the other rank would speak
    (runs / "go").touch()
    codes, _, said = launch.end()
    assert codes == [0, 0], said
    where = r"it is in stall \(\S+distributed_failures\.py:\d+\)\. Its stack: \S+rank-1\.txt"
    assert re.search(
        rf"rank 1 \(\S+, pid {launch.processes[1].pid}\): no step for \d+ s after step 3: {where}", said[1]
    )
    assert "after step 3" not in said[0]
    assert "after step 3" in (runs / "tiny" / "stalls" / "rank-0.txt").read_text()


Pair = Callable[[], tuple[Peers, Peers]]


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Pair:
    """Two ranks in this process, with a store that the first holds."""
    monkeypatch.setattr(peers_module, "BEAT", 0.05)
    monkeypatch.setattr(peers_module, "SILENT", 2.0)

    def make() -> tuple[Peers, Peers]:
        port = free_port()
        store = dist.TCPStore("localhost", port, 2, is_master=True, wait_for_workers=False)
        return Peers(store, 0, 2, 4), Peers(store.clone(), 1, 2, 4)

    return make


def test_who_failed_first(pair: Pair) -> None:
    """Would catch a later error that takes the first one's place, and a rank that blames one that lives."""
    one, other = pair()
    assert one.culprit() is None
    other.fail("no such file")
    one.fail("the collective failed")
    first = one.culprit()
    assert first is not None
    assert first.ranks == (1,)
    assert str(first) == f"rank 1 ({socket.gethostname()}, pid {os.getpid()}) failed first: no such file"
    assert [one.is_first("a"), other.is_first("a"), one.is_first("b")] == [True, False, True]
    other.publish("stack", "here")
    assert one.published("stack") == {0: None, 1: "here"}
    one.close(), other.close()


def test_who_has_ended(pair: Pair) -> None:
    """One that left in good order has not failed; one whose signs of life stop has."""
    one, other = pair()
    other._closed.set()  # its thread ends, and it has not said why
    other._thread.join()
    first = one.culprit()
    assert first is not None
    assert first.line is None
    assert str(first).startswith("rank 1 (")
    assert "has ended without a word" in str(first)
    one.close()
    one, other = pair()
    other.close()
    assert one.culprit() is None
    one.close()


def test_a_rank_that_does_not_end_is_ended(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one that waits in a collective of NCCL for a rank that has gone. Would catch one that waits for ever."""
    monkeypatch.setattr(peers_module, "GRACE", 0.2)
    codes: list[int] = []
    monkeypatch.setattr(peers_module.os, "_exit", codes.append)
    one, other = pair()
    other.fail("out of memory")
    end = time.monotonic() + 200
    while not codes:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert codes[0] == 4
    assert "failed first: out of memory; this rank did not end by itself" in capsys.readouterr().err
    one.close(), other.close()
