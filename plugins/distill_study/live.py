"""Progress of a running study: a table on a terminal, elsewhere a line for each run that ends."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from distill_core import counted
from distill_study.plan import Run
from distill_study.table import RunResult, default_scores

TAIL = 65_536


class StudyDisplay:
    """Cells are `waiting`, a running run's step, a finished run's first score, `failed` or `stopped`.

    `update` draws it in the caller's thread, so that processes can be started safely.
    """

    def __init__(self, title: str, folder: Path, scores: Sequence[str], *, quiet: bool = False) -> None:
        self.console = Console(stderr=True)
        self.title, self.folder, self.scores, self.quiet = title, folder, tuple(scores), quiet
        self.runs: list[Run] = []
        self.cells: dict[str, str] = {}
        self._next = 0.0
        show = self.console.is_terminal and not quiet
        self._live = Live(console=self.console, auto_refresh=False, transient=True) if show else None

    def __enter__(self) -> StudyDisplay:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """Print a line, unless `quiet`."""
        if not self.quiet:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def warn(self, line: str) -> None:
        """Print a warning, which `quiet` does not hide."""
        self.console.print(f"warning: {line}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    def started(self, run: Run) -> None:
        """A run has started or continued: print a line if there is no table."""
        if self._live is None:
            self.say(f"{run.name}: started; its output: {self.folder / 'logs' / run.name}.log")

    def finished(self, run: Run, seconds: float | None = None) -> None:
        """A run is complete, `seconds` after it was started; None if it was complete before."""
        result = RunResult.read(self.folder / run.name, run.seed)
        assert result is not None
        scores = [score for score in self.scores or default_scores([result]) if score in result.scores]
        self.cells[run.name] = f"{result.scores[scores[0]].value:.2f}" if scores else "done"
        if seconds is not None:
            text = ", ".join(f"{score} {result.scores[score].value:.2f}" for score in scores)
            steps = f"{counted(result.steps, 'step')} in {result.seconds:.0f} s of training"
            self.say(f"{run.name}: {steps}, {seconds:.0f} s in all{': ' if text else ''}{text}")

    def update(self, running: Sequence[Run]) -> None:
        """Draw again, at most twice a second."""
        if self._live is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 0.5
        for run in running:
            self.cells[run.name] = f"{_step(self.folder / run.name)}/{run.recipe.train.steps or '?'}"
        seeds = list(dict.fromkeys(run.seed for run in self.runs))
        table = Table(title=self.title, title_justify="left")
        table.add_column("variant")
        for seed in seeds:
            table.add_column(f"seed {seed}", justify="right")
        for variant in dict.fromkeys(run.variant for run in self.runs):
            table.add_row(
                escape(variant.label), *(self.cells.get(f"{variant.name}-seed{seed}", "waiting") for seed in seeds)
            )
        self._live.update(table, refresh=True)


def _step(folder: Path) -> int:
    """The last step in a run's metrics.jsonl."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (json.JSONDecodeError, KeyError):
            continue  # the line is being written
    return 0
