"""Terminal output of a run: progress, messages, and the scores at its end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from distill_core.evaluate.score import TaskScore, means

SECONDS = 30.0
"""Between two lines of progress, where there is no terminal."""


class Display:
    """A progress bar on a terminal, lines elsewhere. `quiet` shows only warnings.

    With several ranks only rank 0 prints, except for `warn_here`.
    """

    def __init__(self, steps: int, *, quiet: bool, rank: int) -> None:
        self.console = Console(stderr=True, emoji=False)  # a signal may print while rich imports them
        self.rank = rank
        self.quiet = quiet = quiet or rank > 0
        self.steps = steps
        self._last = 0.0
        self._progress = Progress(
            TextColumn("[bold]{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[rate]}", table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("eta", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(elapsed_when_finished=False, table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[losses]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=3)),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
            refresh_per_second=4,
            expand=True,
        )
        self._task = self._progress.add_task("train", total=steps, rate="", losses="")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def step(self, step: int, rate: float | None, losses: Mapping[str, float]) -> None:
        """Show that `step` steps are done, with samples per second and losses."""
        text = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        speed = per_second(rate) if rate is not None else ""
        self._progress.update(self._task, completed=step, rate=speed, losses=text)
        due = time.monotonic() - self._last >= SECONDS
        if losses and due and not self.quiet and not self.console.is_terminal:
            self._last = time.monotonic()
            self.say(f"step {step}/{self.steps}  {speed}  {text}")

    def doing(self, what: str) -> None:
        """Name other work than training (an evaluation); an empty name ends it."""
        self._progress.update(self._task, description=what or "train")

    def say(self, message: str) -> None:
        """Print a line, unless `quiet`."""
        if not self.quiet:
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        """Print a warning that concerns all ranks, once; `quiet` does not hide it."""
        if self.rank == 0:
            self.warn_here(message)

    def warn_here(self, message: str) -> None:
        """Print a warning that concerns this rank only."""
        self.console.print(f"warning: {message}", style="yellow", highlight=False, markup=False, soft_wrap=True)


class Remaining(TimeRemainingColumn):
    """The remaining time, if known."""

    def render(self, task: Task) -> Text:
        """Empty while the total is unknown."""
        return Text.assemble("eta ", super().render(task)) if task.total else Text("")


class Scoring:
    """A progress bar of the encoded samples on a terminal; elsewhere a line as each task begins."""

    def __init__(self, *, quiet: bool = False) -> None:
        console = Console(stderr=True)
        self._console = None if quiet or console.is_terminal else console
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(),
            TextColumn("{task.fields[count]}", markup=False),
            TimeElapsedColumn(),
            Remaining(),
            console=console,
            disable=quiet or not console.is_terminal,
            transient=True,
        )
        self._counts: dict[int, int] = {}  # by id of the samples: how many there were
        self._task_name = ""
        self._row = self._progress.add_task("", total=None, count="")

    def __enter__(self) -> Scoring:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def doing(self, what: str) -> None:
        """Name the task that is scored."""
        if self._console is not None:
            self._console.print(f"scoring {what}", highlight=False, markup=False, soft_wrap=True)
        self._task_name = what
        self._begin("", None)

    def watch(self, samples: Iterable[Any], what: str) -> Iterator[Any]:
        """The samples (or steps of other work), counted as they are consumed."""
        total = len(samples) if isinstance(samples, Sized) else self._counts.get(id(samples))
        self._begin(what, total)
        done = 0
        for done, sample in enumerate(samples, 1):
            yield sample
            count = f"{done}/{total}" if total else str(done)
            self._progress.update(self._row, completed=done, count=f"{count} {what}")
        self._counts[id(samples)] = done

    def _begin(self, what: str, total: int | None) -> None:
        self._progress.remove_task(self._row)  # `reset` would keep the total
        self._row = self._progress.add_task(self._task_name, total=total, count=what)


def mean_table(scores: Sequence[TaskScore], title: str) -> Table:
    """A row for each task's means over sets, a column for each side."""
    sides = list(dict.fromkeys(score.side for score in means(scores)))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for score in means(scores):
        rows.setdefault((score.task, score.name), {})[score.side] = score.text
    table = Table(title=title, title_justify="left")
    for head in ("task", "score"):
        table.add_column(head)
    for side in sides:
        table.add_column(side, justify="right")
    previous = None
    for (task, name), texts in rows.items():
        if previous is not None and task != previous:
            table.add_section()
        table.add_row(task if task != previous else "", name, *(texts.get(side, "") for side in sides))
        previous = task
    return table


def score_table(scores: Sequence[TaskScore], title: str) -> Table:
    """A row for each side and task score, a column for each set and for the mean over sets."""
    rows: dict[tuple[str, str], dict[str, dict[str | None, str]]] = {}
    for score in scores:
        rows.setdefault((score.side, score.task), {}).setdefault(score.name, {})[score.set] = score.text
    columns = sorted(dict.fromkeys(score.set for score in scores), key=lambda name: name is None)
    table = Table(title=title, title_justify="left")
    for head in ("model", "task", "score"):
        table.add_column(head)
    for column in columns:
        table.add_column("mean" if column is None else column, justify="right")
    for (side, task), names in rows.items():
        if table.row_count:
            table.add_section()
        origin = side, task
        for name, texts in names.items():
            table.add_row(*origin, name, *(texts.get(column, "") for column in columns))
            origin = "", ""
    return table


def print_scores(
    scores: Sequence[TaskScore],
    title: str,
    lines: Sequence[str] = (),
    *,
    notes: Mapping[str, str] | None = None,
    file: str = "",
    full: bool = False,
) -> None:
    """Print the summary on standard output: the means over sets or, with `full`, every score of every set.

    Below it: the tasks' `notes`, `lines`, and the `file` that holds every score, including tasks without means.
    """
    console = Console()
    short = bool(means(scores)) and not full
    if scores:
        console.print(mean_table(scores, title) if short else score_table(scores, title))
    captions: dict[str, list[str]] = {}  # caption -> tasks: those of one kind share a line
    with_means = {score.task for score in means(scores)}
    for task in dict.fromkeys(score.task for score in scores):
        missing = short and task not in with_means
        caption = "no means over sets; its scores are in the file below" if missing else (notes or {}).get(task)
        if caption:
            captions.setdefault(caption, []).append(task)
    for caption, tasks in captions.items():
        console.print(f"{', '.join(tasks)}: {caption}", highlight=False, markup=False)
    if scores and file:
        lines = [*lines, f"every score: {file}"]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def per_second(rate: float) -> str:
    """`1,270 samples/s`, `8.4 samples/s`."""
    return f"{rate:,.0f} samples/s" if rate >= 10 else f"{rate:.2g} samples/s"
