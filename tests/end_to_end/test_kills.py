"""Random kills of ranks, of two and of four: `torchrun --max-restarts` continues from the last checkpoint.

`DISTILL_KILLS=15` makes thirty of them, in a quarter of an hour; the default is three of two ranks. Which rank, at
which step and how far into it is drawn from the attempt's number (`killed_ranks.py`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launched

from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("killed_ranks.py")
KILLS = int(os.environ.get("DISTILL_KILLS", "3"))
STEPS, EVERY = max(24, 4 * KILLS), 3
OVERRIDES = (
    "loss=[{name: contrastive}, {name: cross_modal_distillation}, {name: deadly}]",
    "evaluate=null",
    "data.batch_size=2",
    "data.workers=1",
    f"train.steps={STEPS}",
    f"train.checkpoint.every={EVERY}",
    "train.clip_grad=0.5",
)


def launch(recipe: Path, runs: Path, ranks: int, kills: int) -> tuple[RunFolder, str]:
    runs.mkdir()
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--monitor-interval", "0.1")
    command = [
        *("-m", "torch.distributed.run", *rendezvous, "--nproc-per-node", str(ranks), "--max-restarts", str(kills)),
        *(str(SCRIPT), str(recipe), str(runs), str(kills), *OVERRIDES),
    ]
    done = launched(1, *command, timeout=3000)
    assert [path.name for path in runs.iterdir() if path.is_dir()] == ["tiny"]
    return RunFolder(runs / "tiny"), done.stderr


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("ranks", [2, 4] if "DISTILL_KILLS" in os.environ else [2])
def test_kills_of_ranks(tiny_recipe: Path, tmp_path: Path, ranks: int) -> None:
    """Catches an attempt that hangs for another's rank, one that starts anew or from an older checkpoint than the last,
    a checkpoint that a kill has left half-written, rows that are missing or written twice, and any state that a resume
    loses: the end is that of a run that nobody killed, bit for bit."""
    whole, _ = launch(tiny_recipe, tmp_path / "whole", ranks, 0)
    killed, said = launch(tiny_recipe, tmp_path / "killed", ranks, KILLS)
    rows = [json.loads(line) for line in (tmp_path / "killed" / "kills.jsonl").read_text().splitlines()]
    starts = {row["attempt"]: row["step"] for row in rows if row["what"] == "starts"}
    kills = {row["attempt"]: row for row in rows if row["what"] == "killed"}
    assert list(kills) == list(range(KILLS))
    assert KILLS < 15 or len({row["rank"] for row in kills.values()}) > 1, "the draw has several ranks"
    for attempt, kill in kills.items():
        assert starts[attempt + 1] >= kill["saved"], f"attempt {attempt + 1} did not start from the last checkpoint"
        assert starts[attempt + 1] % EVERY == 0
    assert said.count("has ended without a word") == KILLS, said
    assert [row["step"] for row in killed.rows()] == list(range(1, STEPS + 1))
    assert [row["terms"] for row in killed.rows()] == [row["terms"] for row in whole.rows()]
    end, other = Checkpoints(killed.path).read(), Checkpoints(whole.path).read()
    assert end["step"] == other["step"] == STEPS
    for part in ("objective", "optimizer", "ranks", "skipped_steps"):
        assert same(end[part], other[part]), part
    lost = [max(0, kill["step"] - starts[attempt + 1]) for attempt, kill in kills.items()]
    print(f"{ranks} ranks: {KILLS} kills, {sum(lost)} steps lost, {max(lost)} at most at once")
