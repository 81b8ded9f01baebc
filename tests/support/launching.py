"""Scripts and commands as the ranks of a launch on this machine, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def launched(
    ranks: int, *command: str | Path, succeeds: bool = True, timeout: float = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python COMMAND`, by torchrun where there are several ranks, with the modules that tests import. Asserts that it
    `succeeds`, if it should."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, *torchrun, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **own, **environment},
        check=False,
    )
    assert done.returncode == 0 or not succeeds, done.stderr
    return done


def of_ranks(ranks: int, script: Path, folder: Path) -> list[dict[str, Any]]:
    """What each rank of `script FOLDER` has written as FOLDER/rank-R.pt."""
    launched(ranks, script, folder)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(ranks)]
