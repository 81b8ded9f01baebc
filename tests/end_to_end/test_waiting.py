"""A run whose batch does not come says what it waits for, and a signal saves and ends it.

A shard is a `pipe:` command that stalls as a server does: after some samples no more bytes come, and no end.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from distill_core.data.shard import PATIENCE
from distill_core.data.tar_shards import TarShard
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder

pytestmark = pytest.mark.slow

SECONDS = 400  # for what takes a few on a machine that is not busy
STEPS = 6
RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@dataclass
class Stall:
    """A recipe whose second shard stalls while it is fetched, as long as the file `open` is not there."""

    recipe: Path
    shard: str
    open: Path
    runs: Path

    def arguments(self, *overrides: str) -> list[str]:
        """`distill run` of it."""
        settings = [part for override in overrides for part in ("--set", override)]
        return ["-m", "distill_core.cli", "run", str(self.recipe), "--runs", str(self.runs), *settings]


@pytest.fixture
def stall(
    tiny_recipe: Path, tmp_path: Path, write_shards: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch
) -> Stall:
    """The first shard holds 6 samples. The second was indexed by an earlier run, whose copy of it has gone since."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    (ready,) = write_shards(tmp_path / "ready", 1, 6, prefix="ready")
    (whole,) = write_shards(tmp_path / "stalling", 1, 2 * STEPS + 2)
    with tarfile.open(whole) as tar:
        cut = tar.getmembers()[18].offset  # after 9 samples of two members
    data = whole.read_bytes()
    head, tail, gate = (tmp_path / "stalling" / name for name in ("head", "tail", "open"))
    head.write_bytes(data[:cut])
    tail.write_bytes(data[cut:])
    shard = f"pipe:cat {head}; test -e {gate} || sleep 3600; cat {tail}"
    gate.touch()
    TarShard(shard).prepare(PATIENCE)
    gate.unlink()
    for copy in (tmp_path / "cache" / "shards").glob("*.tar"):
        copy.unlink()
    text = tiny_recipe.read_text()
    changes = {
        f'"{tmp_path}/shards/train-*.tar"': f'["{ready}", "{shard}"]',
        "batch_size: 4": "batch_size: 2",
        "shuffle: 4": "shuffle: 0\n  stall_warning: 1",
        "steps: 4": f"steps: {STEPS}\n  checkpoint: {{every: null}}",
    }
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    recipe = tmp_path / "stall.yaml"
    recipe.write_text(text)
    return Stall(recipe, shard, gate, tmp_path / "runs")


@dataclass
class Running:
    """A process in a group of its own, and what it says."""

    process: subprocess.Popen[bytes]
    log: Path

    def until(self, *patterns: str) -> str:
        """What it has said, once that holds all of these."""
        end = time.monotonic() + SECONDS
        while not all(re.search(pattern, text := self.log.read_text()) for pattern in patterns):
            assert self.process.poll() is None, text
            assert time.monotonic() < end, text
            time.sleep(0.05)
        return text

    def end(self) -> tuple[int, str]:
        """Exit code and all that it said, once it has ended."""
        code = self.process.wait(SECONDS)
        return code, self.log.read_text()


@contextmanager
def running(log: Path, command: Sequence[str], **environment: str) -> Iterator[Running]:
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=file,
            stderr=file,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
    try:
        yield Running(process, log)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the shards' commands too
        process.wait(SECONDS)


@pytest.mark.parametrize(
    ("workers", "kind"), [(0, signal.SIGTERM), (1, signal.SIGHUP), (2, signal.SIGINT)], ids=["0", "1", "2"]
)
def test_a_signal_while_a_batch_is_waited_for(stall: Stall, tmp_path: Path, workers: int, kind: signal.Signals) -> None:
    """Catches a wait that no signal ends, an end that waits for the shard, state of a batch that never came, and a
    wait that says nothing."""
    if signal.getsignal(kind) is signal.SIG_IGN:
        pytest.skip("the tests run under nohup, as the run then does")
    log = tmp_path / "log"
    arguments = stall.arguments(f"data.workers={workers}")
    with running(log, arguments) as run:
        who = r"data worker \d \(pid \d+\)" if workers else "the reader"
        run.until(rf"warning: no batch for \d+ s: {who} is reading {re.escape(stall.shard)}")
        run.process.send_signal(kind)
        code, said = run.end()  # long before the shard
    assert code == 128 + kind, said
    assert "Traceback" not in said
    folder = stall.runs / "stall"
    step = int(re.search(rf"{kind.name}: saved at step (\d+)\. Continue with: distill resume {folder}", said)[1])  # type: ignore[index]
    assert Checkpoints(folder).steps() == [step]
    assert 1 <= step < STEPS

    stall.open.touch()
    for command in (["-m", "distill_core.cli", "resume", str(folder)], arguments):
        with running(log, command) as run:
            code, said = run.end()
        assert code == 0, said
    resumed, whole = (Checkpoints(stall.runs / name).read()["objective"] for name in ("stall", "stall-2"))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    rows, others = (
        [row for row in RunFolder(stall.runs / name).rows() if "terms" in row] for name in ("stall", "stall-2")
    )
    assert [row["terms"] for row in rows] == [row["terms"] for row in others]


def test_two_ranks_of_which_one_waits(stall: Stall, tmp_path: Path) -> None:
    """The other has its batch, of the last two samples of the first shard. Catches one that is stuck in a collective,
    where no signal reaches it, and a checkpoint without the waiting rank's state."""
    log = tmp_path / "log"
    with running(log, [*RANKS, *stall.arguments()]) as run:
        run.until(rf"rank \d: no batch for \d+ s: (data worker .*|the reader) is reading {re.escape(stall.shard)}")
        run.process.send_signal(signal.SIGTERM)
        run.end()
    folder = stall.runs / "stall"
    saved = Checkpoints(folder).read()
    assert len(saved["ranks"]) == 2
    assert f"SIGTERM: saved at step {saved['step']}" in log.read_text()


def test_a_killed_trainer_frees_its_folder_at_once(stall: Stall, tmp_path: Path) -> None:
    """Catches loader workers that hold the lock, or live on: one that is stuck in a read does not see its end."""
    with running(tmp_path / "log", stall.arguments("data.workers=2")) as run:
        line = rf"no batch for \d+ s: data worker \d \(pid (\d+)\) is reading {re.escape(stall.shard)}"
        worker = int(re.search(line, run.until(line))[1])  # type: ignore[index]
        assert Path(f"/proc/{worker}").exists()
        run.process.kill()
        run.process.wait(SECONDS)
        RunFolder(stall.runs / "stall").lock()
        end = time.monotonic() + SECONDS
        while _lives(worker):
            assert time.monotonic() < end, "a worker of a killed trainer lives on"
            time.sleep(0.05)


def _lives(pid: int) -> bool:
    """Whether it is there, and no zombie that waits for whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
