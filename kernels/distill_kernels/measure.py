"""Time and memory of calls: interleaved in one process, medians, and the peak of what PyTorch allocates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile


class Seconds(NamedTuple):
    """Medians over rounds. On a shared machine `process` (CPU time of this process) is the steadier one."""

    wall: float
    process: float


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    device: torch.device,
    least_seconds: float = 0.1,
) -> dict[str, Seconds]:
    """Median seconds of each call, all of them in turn each round, so that a slow minute is shared by all.

    A call's turn repeats it for about `least_seconds`, so that a short call is not timed with the caches and
    freed pages that a long one left it. On a GPU the device is waited for before and after each turn.
    """
    taken: dict[str, list[Seconds]] = {name: [] for name in calls}
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, round(least_seconds / max(_turn(call, 1, device).wall, 1e-6)))
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(_turn(call, repeats[name], device))
    return {
        name: Seconds(statistics.median(t.wall for t in times), statistics.median(t.process for t in times))
        for name, times in taken.items()
    }


def _turn(call: Callable[[], object], repeats: int, device: torch.device) -> Seconds:
    _wait(device)
    wall, process = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    _wait(device)
    return Seconds((time.perf_counter() - wall) / repeats, (time.process_time() - process) / repeats)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that `call` has allocated at once beyond what was allocated before it.

    On CPU from the profiler's record of PyTorch's allocator, which does not see the scratch space of
    libraries; on a GPU from the caching allocator's statistics.
    """
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    assert record.profiler is not None
    results = record.profiler.kineto_results
    assert results is not None
    events = [e for e in results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
