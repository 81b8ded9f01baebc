"""report.json and report.png: the results of a run, as data and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distill_core.errors import UserError
from distill_core.evaluate.run import EvaluationResult
from distill_core.evaluate.score import TaskScore, means
from distill_core.run.folder import RunFolder
from distill_core.run.state import RunState
from distill_core.system.files import cannot_write, write_whole


@dataclass(frozen=True)
class Report:
    """The end of a run. `seconds` is the time of the training steps alone.

    `skipped_samples` counts different samples, `skipped_shards` different shards of which all or the rest could not be
    read, `skipped_reads` how often, over all passes, one of either was skipped.
    """

    name: str
    steps: int
    samples: int
    seconds: float
    scores: Sequence[TaskScore]
    split: str
    skipped_samples: int
    skipped_reads: int
    skipped_steps: int
    parameters: int
    notes: Mapping[str, str] = field(default_factory=dict)
    """Task id -> caption of its means."""
    failed: Sequence[str] = ()
    """A line for each evaluation task that could not be scored."""
    skipped_shards: int = 0
    samples_by_set: Mapping[str, int] = field(default_factory=dict)
    """Samples that were trained on, by the set of the data source."""
    absences: Mapping[str, int] = field(default_factory=dict)
    """Of these, those that lacked a modality that `data.optional` names, by modality."""
    epochs: float | None = None
    """`train.epochs`, where the number of steps comes from it."""


def report_run(
    state: RunState,
    folder: RunFolder,
    evaluated: EvaluationResult,
    facts: Mapping[str, Any],
    skipped_reads: int,
    samples_by_set: Mapping[str, int],
    absences: Mapping[str, int],
    *,
    saved: bool,
) -> Path:
    """Report a finished run; returns the picture's path. `skipped_reads` and what follows are of all ranks, `saved`
    says whether its last step is in a checkpoint. Raises `UserError` where the report cannot be written."""
    train = state.recipe.train
    skipped_samples, skipped_shards = folder.skipped_in_training()
    report = Report(
        name=folder.path.name,
        steps=state.step,
        samples=state.step * state.length.batch_size,
        seconds=state.seconds,
        scores=evaluated.scores,
        split=state.recipe.evaluate.split,
        skipped_samples=skipped_samples,
        skipped_shards=skipped_shards,
        skipped_reads=skipped_reads,
        skipped_steps=state.skipped_steps,
        parameters=sum(p.numel() for p in state.train_step.parameters),
        notes=evaluated.notes,
        failed=evaluated.failed,
        samples_by_set=dict(samples_by_set),  # a Counter does not survive dataclasses.asdict
        absences=dict(absences),
        epochs=train.epochs if train.steps is None else None,
    )
    try:
        return write_report(folder, report, facts)
    except OSError as error:
        raise UserError(
            f"{cannot_write(folder.path / 'report.json', error)}. The run is trained{' and saved' if saved else ''}, "
            f"and has no report. Make room, then: distill resume {folder.path}"
        ) from error


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
    panels = bars(report.scores)
    figure = Figure(figsize=(6.5 + 5.5 * len(panels), 4.6), layout="constrained")
    curves, *scores = figure.subplots(1, 1 + len(panels), width_ratios=[1.2] + [1] * len(panels), squeeze=False)[0]
    steps = [row["step"] for row in training]
    marker = "o" if len(steps) < 5 else None
    for name in training[-1]["terms"] if training else ():
        values = [row["terms"].get(name) for row in training]
        curves.plot(steps, values, label=name, linewidth=1.6, marker=marker)
    if training and len(training[-1]["terms"]) > 1:
        total = [row["loss"] for row in training]
        curves.plot(steps, total, label="total", color="0.6", linewidth=1.2, linestyle="--", marker=marker)
    curves.set(xlabel="optimiser step", ylabel="loss", title=f"{report.name}: losses")
    curves.set_xlim(0, 1.02 * max(report.steps, 1))
    if training:
        curves.legend(frameon=False)
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.grid(alpha=0.25)
    for axes, (unit, rows_of_unit) in zip(scores, panels.items(), strict=True):
        _draw_bars(axes, rows_of_unit, unit, report.split)
    for axes in (curves, *scores):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return path


def bars(scores: Sequence[TaskScore]) -> dict[str, dict[str, dict[str, float]]]:
    """unit -> task and score -> side -> value of the means over sets; an arrow marks a score that is better lower."""
    units: dict[str, dict[str, dict[str, float]]] = {}
    for score in means(scores):
        arrow = " \N{DOWNWARDS ARROW}" if score.higher_is_better is False else ""
        label = f"{score.task} {score.name}{arrow}"
        units.setdefault(score.unit, {}).setdefault(label, {})[score.side] = score.value
    return units


def _draw_bars(axes: Any, rows: Mapping[str, Mapping[str, float]], unit: str, split: str) -> None:
    """A group of bars for each score, a bar for each side that has it."""
    sides = sorted({side for values in rows.values() for side in values}, key=lambda side: side != "student")
    height = 0.8 / len(sides)
    for i, side in enumerate(sides):
        scored = {j + i * height: values[side] for j, values in enumerate(rows.values()) if side in values}
        drawn = axes.barh(list(scored), list(scored.values()), height, label=side)
        axes.bar_label(drawn, fmt="%.1f" if unit == "percent" else "%.4g", padding=3, fontsize=8)
    axes.set_yticks([j + height * (len(sides) - 1) / 2 for j in range(len(rows))], list(rows), fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel=unit, title=f"scores on {split}")
    axes.legend(frameon=False)
