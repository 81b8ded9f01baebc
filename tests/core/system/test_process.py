"""What a process keeps, and how many threads read for it."""

import gc
import subprocess
import sys
from typing import Any

import pytest
import torch

from distill_core.recipe.sections import TrainConfig
from distill_core.system.process import (
    COLLECT_EVERY,
    arithmetic,
    garbage_at_fixed_steps,
    reading_threads,
    set_matmul_precision,
)

PROGRAM = """
import torch
from pathlib import Path
from distill_core.system.process import keep_freed_memory
{}
def resident():  # MiB
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
x = torch.ones(200 * 2**18)  # 200 MiB
y = torch.ones(200 * 2**18)
before = resident()
del x, y
print(before - resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_freed_memory_stays() -> None:
    """Two tensors of 200 MiB: without it they go back to the system, with it they do not."""
    given_back = []
    for line in ("", "keep_freed_memory()"):
        done = subprocess.run([sys.executable, "-c", PROGRAM.format(line)], capture_output=True, text=True, check=True)
        given_back.append(float(done.stdout))
    assert given_back[0] > 350
    assert given_back[1] < 50


def test_matmul_precision() -> None:
    """CUDA's products of fp32 tensors and no others; by the interface after which both of torch's can be read."""
    matmul = torch.backends.cuda.matmul
    cpu = torch.backends.mkldnn.matmul.fp32_precision
    for name, tf32, words in (("high", True, "in TF32"), ("highest", False, "in fp32")):
        set_matmul_precision(name)
        assert matmul.allow_tf32 is tf32
        assert (matmul.fp32_precision == "tf32") is tf32
        assert torch.backends.mkldnn.matmul.fp32_precision == cpu
        cuda = torch.device("cuda", 1)
        assert arithmetic("bf16", name, cuda) == f"bf16 on cuda:1, fp32 products {words}"
        assert arithmetic("bf16", name, torch.device("cpu")) == "bf16 on cpu"
    assert TrainConfig.model_fields["matmul_precision"].default == "high"


def test_threads_that_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """None where the model computes on the same cores; the ranks of a machine share its cores."""
    assert reading_threads(torch.device("cpu")) == 0
    monkeypatch.setattr("distill_core.system.process.cores", lambda: 24)
    assert reading_threads(torch.device("cuda")) == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert reading_threads(torch.device("cuda")) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert reading_threads(torch.device("cuda")) == 1


def test_garbage_is_collected_at_fixed_steps() -> None:
    """Would catch ranks that pause at steps of their own, garbage that is never collected, and a collector left off."""
    collected: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            collected.append(info["generation"])

    gc.callbacks.append(note)
    try:
        with garbage_at_fixed_steps() as garbage:
            collected.clear()
            for step in range(1, 2 * COLLECT_EVERY + 1):
                cycles: list[Any] = [[] for _ in range(100)]
                for cycle in cycles:
                    cycle.append(cycle)
                garbage.collect(step)
            assert collected == [2, 2]
            with garbage.automatic():
                cycles = [[] for _ in range(100_000)]
                del cycles
                assert len(collected) > 2
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() == 0
    finally:
        gc.callbacks.remove(note)
