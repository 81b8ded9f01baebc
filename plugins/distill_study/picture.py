"""study.png: a bar with its interval for each variant and score, and the curves of the training loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from distill_core.tools import RunFolder
from distill_study.statistics import interval
from distill_study.table import Group, StudyTable

COLUMNS = 3


def draw(table: StudyTable, path: Path) -> None:
    """Write the picture of a table to `path`."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    is_few = len(table.groups) <= 10
    places = range(len(table.groups))
    colours = colormaps["tab10" if is_few else "turbo"]([i if is_few else i / (len(table.groups) - 1) for i in places])
    panels = len(table.scores) + 1
    columns = min(COLUMNS, panels)
    rows = math.ceil(panels / columns)
    height = max(3.6, 0.34 * len(table.groups) + 1.4)
    figure = Figure(figsize=(5.0 * columns, height * rows), layout="constrained")
    grid = figure.add_gridspec(rows, columns)
    axes = [figure.add_subplot(grid[divmod(i, columns)]) for i in range(panels - 1)]
    axes.append(figure.add_subplot(grid[rows - 1, (panels - 1) % columns :]))  # the curves take what is left
    dots_note = "; interval over seeds; a dot a seed" if any(len(group.runs) > 1 for group in table.groups) else ""
    for axis, score in zip(axes, table.scores, strict=False):
        for i, group in enumerate(table.groups):
            cell = table.cells[group.name][score]
            if cell.summary is None:
                continue
            values = list(cell.values.values())
            axis.barh(i, cell.summary.mean, 0.7, color=colours[i], alpha=0.75)
            ends = interval(values)
            if ends is not None:
                # not below 0: where seeds tie, the rounding of the mean may lie outside of its interval
                reach = [[max(0.0, cell.summary.mean - ends[0])], [max(0.0, ends[1] - cell.summary.mean)]]
                axis.errorbar(cell.summary.mean, i, xerr=reach, color="0.15", capsize=3, linewidth=1.2)
            if dots_note:
                axis.plot(values, [i] * len(values), ".", color="0.15", markersize=5)
        axis.set_yticks(range(len(table.groups)), [group.label for group in table.groups], fontsize=8)
        axis.invert_yaxis()
        axis.set(title=score, xlabel=axis_label(table, score) + dots_note)
    curves = axes[len(table.scores)]
    for i, group in enumerate(table.groups):
        steps, low, mean, high = _loss(group)
        curves.plot(
            steps, mean, color=colours[i], label=group.label, linewidth=1.4, marker="o" if len(steps) < 5 else None
        )
        if len(group.runs) > 1:
            curves.fill_between(steps, low, high, color=colours[i], alpha=0.15, linewidth=0)
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    curves.set(xlabel="optimiser step", ylabel="total loss (nats)", title="training loss: each variant's own losses")
    if any(group.runs for group in table.groups):
        curves.legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    figure.suptitle(table.title)
    figure.savefig(path, dpi=120)


def axis_label(table: StudyTable, address: str) -> str:
    """As `percent`, or `nats (lower is better)`; empty where no run has the score."""
    score = table.score(address)
    if score is None:
        return ""
    return f"{score.unit} (lower is better)" if score.higher_is_better is False else score.unit


def _loss(group: Group) -> tuple[list[int], list[float], list[float], list[float]]:
    """(steps, least, mean, greatest) over the seeds, at the steps that all of them logged."""
    curves: list[dict[int, float]] = []
    for run in group.runs:
        rows: Sequence[dict[str, float]] = RunFolder(Path(run.folder)).rows()
        curves.append({int(row["step"]): row["loss"] for row in rows if row.get("loss") is not None})
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    values = [[curve[step] for curve in curves] for step in steps]
    return steps, [min(v) for v in values], [sum(v) / len(v) for v in values], [max(v) for v in values]
