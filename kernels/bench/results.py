"""Measure one case of an op and keep it in results.csv: one schema for all ops.

A case is an op, a shape, a dtype and whether gradients are asked for; a row is one implementation in a case. Times are
medians of calls that run interleaved in one process: CPU time of the process on a CPU, wall time on a GPU. `ratio` is
the baseline's time over the row's: above 1 is faster.
"""

from __future__ import annotations

import csv
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from distill_kernels.machine import device_name
from distill_kernels.measure import interleaved, peak_bytes

PATH = Path(__file__).with_name("results.csv")


class Result(NamedTuple):
    """A row. What an older measurement did not take is empty."""

    op: str
    backend: str  # or the baseline, in its own row
    baseline: str
    shape: str  # "V=8 B=32 L=77 D=512 H=8"; the script of the op says what the letters are
    dtype: str
    training: int  # 1: forward and backward
    auto: int | str  # 1: what `auto` takes here
    ours_ms: float
    baseline_ms: float
    ratio: float
    wall_ms: float
    peak_mib: float  # beyond what was allocated before the call
    memory_ratio: float | str  # the baseline's peak over this
    roofline: float | str  # share of the measured copy bandwidth that the bytes moved at least would need
    device: str
    torch: str
    python: str

    @property
    def case(self) -> tuple[str, ...]:
        """What a new measurement of replaces this row."""
        return (self.op, self.backend, self.baseline, self.shape, self.dtype, str(self.training), self.device)


def measure(
    op: str,
    shape: str,
    dtype: torch.dtype,
    calls: Mapping[str, Callable[[], object]],
    baseline: str,
    *,
    device: torch.device,
    rounds: int,
    auto: str,
    training: bool = True,
    least_bytes: int | None = None,
    bandwidth: float = 1.0,
) -> list[Result]:
    """A row for each call, in turn. `least_bytes` a second at `bandwidth` is the roofline."""
    seconds = interleaved(calls, rounds=rounds, device=device)
    ours = {name: 1e3 * (s.process if device.type == "cpu" else s.wall) for name, s in seconds.items()}
    peaks = {name: peak_bytes(call, device) / 2**20 for name, call in calls.items()}
    rows = []
    for name in calls:
        row = Result(
            op,
            name,
            baseline,
            shape,
            str(dtype).removeprefix("torch."),
            int(training),
            int(name == auto),
            round(ours[name], 3),
            round(ours[baseline], 3),
            round(ours[baseline] / ours[name], 3),
            round(1e3 * seconds[name].wall, 3),
            round(peaks[name], 2),
            round(peaks[baseline] / peaks[name], 2) if peaks[name] else "",
            round(1e3 * least_bytes / ours[name] / bandwidth, 3) if least_bytes is not None else "",
            device_name(device),
            torch.__version__,
            platform.python_version(),
        )
        print(*row[:13], flush=True)
        rows.append(row)
    return rows


def save(rows: Sequence[Result], path: Path = PATH) -> None:
    """Add rows to the file, in place of earlier ones of the same case and device."""
    new = {row.case for row in rows}
    others = [row for row in load(path) if row.case not in new] if path.exists() else []
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Result._fields)
        writer.writerows([*others, *rows])
    partial.replace(path)


def load(path: Path = PATH) -> list[Result]:
    """The rows of the file, as the strings that they are there."""
    with path.open(newline="", encoding="utf-8") as file:
        return [Result(**row) for row in csv.DictReader(file)]  # type: ignore[arg-type]
