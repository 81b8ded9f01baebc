"""report.json and report.png: how a run went, to read and to look at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distill_core.run.folder import RunFolder
from distill_core.system.files import write_whole


@dataclass(frozen=True)
class Report:
    """The end of a run. `seconds` is the time of the training steps alone; scores are `SIDE/TASK/...`.

    `skipped_samples` counts different samples, `skipped_shards` different shards of which all or the rest could not be
    read, `skipped_reads` how often, over all passes, one of either was passed over.
    """

    name: str
    steps: int
    samples: int
    seconds: float
    scores: Mapping[str, float]
    split: str
    skipped_samples: int
    skipped_reads: int
    skipped_steps: int
    parameters: int
    notes: Mapping[str, str] = field(default_factory=dict)
    """Task -> what to know to read its means."""
    failed: Sequence[str] = ()
    """A line for each evaluation task that could not be scored."""
    skipped_shards: int = 0


def write_report(folder: RunFolder, report: Report, facts: Mapping[str, Any]) -> Path:
    """Writes both files; returns the picture's path. `facts` are the run's `environment`."""
    rows = folder.rows()
    document = asdict(report) | {
        "samples_per_s": report.samples / report.seconds if report.seconds else None,
        "validation": [row for row in rows if "scores" in row and row["split"] != report.split],
        **facts,
    }
    write_whole(folder.path / "report.json", json.dumps(document, indent=1))
    return _picture(folder.path / "report.png", rows, report)


def _picture(path: Path, rows: list[dict[str, Any]], report: Report) -> Path:
    from matplotlib.figure import Figure

    training = [row for row in rows if "terms" in row]
    bars = headline(report.scores)
    figure = Figure(figsize=(12, 4.6) if bars else (6.5, 4.6), layout="constrained")
    curves, *scores = figure.subplots(1, 2 if bars else 1, width_ratios=[1.2, 1] if bars else None, squeeze=False)[0]
    steps = [row["step"] for row in training]
    marker = "o" if len(steps) < 5 else None
    for name in training[-1]["terms"] if training else ():
        values = [row["terms"].get(name) for row in training]
        curves.plot(steps, values, label=name, linewidth=1.6, marker=marker)
    if training and len(training[-1]["terms"]) > 1:
        total = [row["loss"] for row in training]
        curves.plot(steps, total, label="total", color="0.6", linewidth=1.2, linestyle="--", marker=marker)
    curves.set(xlabel="optimiser step", ylabel="loss (nats)", title=f"{report.name}: losses")
    curves.set_xlim(0, 1.02 * max(report.steps, 1))
    if training:
        curves.legend(frameon=False)
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.grid(alpha=0.25)
    for axes in scores:
        _bars(axes, bars, report.split)
    for axes in (curves, *scores):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return path


def _bars(axes: Any, bars: Mapping[tuple[str, str], float], split: str) -> None:
    """A group of bars for each score, a bar for each side."""
    sides = sorted({side for side, _ in bars}, key=lambda side: side != "student")
    names = list(dict.fromkeys(name for _, name in bars))
    height = 0.8 / len(sides)
    for i, side in enumerate(sides):
        places = [j + i * height for j in range(len(names))]
        values = [bars.get((side, name), 0.0) for name in names]
        drawn = axes.barh(places, values, height, label=side)
        axes.bar_label(drawn, fmt="%.1f", padding=3, fontsize=8)
    axes.set_yticks([j + height * (len(sides) - 1) / 2 for j in range(len(names))], names, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="percent", title=f"scores on {split}")
    axes.legend(frameon=False)


def headline(scores: Mapping[str, float]) -> dict[tuple[str, str], float]:
    """(side, task and score) -> value of the scores that are means over sets: `SIDE/TASK/SCORE`."""
    result = {}
    for key, value in scores.items():
        side, *rest = key.split("/")
        if len(rest) == 2:
            result[side, " ".join(rest)] = value
    return result
