"""How much of the device a step uses: FLOPs against the fastest product that was measured on it, and memory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from distill_core.batch import Batch
from distill_core.outputs import Progress
from distill_core.recipe.build import build_objective
from distill_core.recipe.sections import Recipe
from distill_core.system import distributed
from distill_core.system.files import cache_folder, write_whole
from distill_core.system.flops import flop_counter
from distill_core.system.process import get_random, set_random
from distill_core.system.without_values import WithoutValues

AFTER = 30.0
"""Seconds of training before FLOPs are counted: that takes a second or more, which a short run would feel."""


class Utilization:
    """The share of the device's peak that steps reach (MFU): FLOPs of the model, so without what is computed again.

    FLOPs are counted once, of a step without values with the shapes of one batch; the peak is measured once a device.
    """

    def __init__(self, recipe: Recipe, device: torch.device, warn: Callable[[str], None]) -> None:
        self.recipe, self.device, self.warn = recipe, device, warn
        self.flops: int | None = None
        """Of a step on this device."""
        self._peak: float | None = None
        self._looked = False

    def look(self, batch: Batch, seconds: float) -> None:
        """Count and measure, once, when the run has trained for `AFTER` seconds. `batch` is on the host."""
        if self._looked or seconds < AFTER:
            return
        self._looked = True
        if distributed.rank() > 0:
            return
        try:
            self.flops = step_flops(self.recipe, batch, self.device)
        except Exception as error:  # a component may do what tensors without values cannot: that ends no run
            self.warn(f"metrics.jsonl has no mfu: a step without values is not possible here ({error})")
            return
        self._peak = matmul_peak(self.device, self.recipe.train.precision)

    def share(self, step_s: float) -> float | None:
        """Of the peak, at so many seconds a step; None before it is known."""
        return self.flops / step_s / self._peak if self.flops and self._peak and step_s else None


def step_flops(recipe: Recipe, batch: Batch, device: torch.device) -> int:
    """FLOPs of forward and backward pass of such a batch; of other ranks' rows, which losses compare with, none."""
    state, without = get_random(device), WithoutValues()
    try:
        with distributed.alone():
            objective = without.build(lambda: build_objective(recipe))
            objective.freeze(recipe.freeze)
            views = {name: group.map(without.convert) for name, group in batch.views.items()}
            shapes = replace(batch, views=views)
            bf16 = torch.autocast("cpu", torch.bfloat16, enabled=recipe.train.precision == "bf16")
            with flop_counter() as counter, without:
                with bf16:
                    total = objective.losses(objective.represent(shapes, Progress(0, 1))).total
                total.backward()  # type: ignore[no-untyped-call]
    finally:
        set_random(state, device)
    return int(counter.get_total_flops())


def matmul_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of a large product on this device, with the process's threads; measured once, then read from the cache."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.get_num_threads()} threads"
    tf32 = cuda and dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    key = f"{name}, {precision}{' by tf32' if tf32 else ''}, torch {torch.__version__}"
    path = cache_folder() / "matmul_peaks.json"
    known = _read(path)
    if key not in known:
        known = known | {key: _measured_peak(device, dtype, 8192 if cuda else 1024)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(known, indent=2))
    return known[key]


def _read(path: Path) -> dict[str, float]:
    """{} where there is no such file, or a damaged one: it only saves time."""
    try:
        return {str(key): float(value) for key, value in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


@torch.no_grad()
def _measured_peak(device: torch.device, dtype: torch.dtype, n: int, seconds: float = 0.5) -> float:
    a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
    out, best = torch.empty_like(a), float("inf")
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or best == float("inf"):
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int | None:
    """Bytes at their highest: of the allocator since the last call on a GPU, else of the process. None where the system
    does not say."""
    if device.type == "cuda":
        highest = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return highest
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
