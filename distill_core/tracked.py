"""What a run sends its recipe's tracker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_core.components import TrackerConfig
from distill_core.evaluate.run import Evaluated
from distill_core.media import Showcase
from distill_core.recipe import Recipe
from distill_core.tracking import TrackerThread


class TrackedRun:
    """Nothing is sent before `start`, on ranks that never call it, and where the recipe has no tracker."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.media, self.media_every = 0, 1
        self._tracker: TrackerThread | None = None
        self._showcase: Showcase | None = None

    def start(
        self, folder: Path, facts: Mapping[str, Any], shards: Sequence[str], resumed: bool, warn: Callable[[str], None]
    ) -> None:
        """Open the tracker, and tell it what the run is made with and what to find it by."""
        recipe = self.recipe
        if recipe.tracking is None:
            return
        self._tracker = TrackerThread(recipe.tracking.build(), warn)
        self._tracker.call("start", str(folder), folder.name, recipe.to_dict(), resumed)
        tags = [node.cls.name for node in recipe.components()]
        options = recipe.tracking.config
        if isinstance(options, TrackerConfig):
            tags += options.tags
            self.media, self.media_every = options.media, options.media_every
            if self.media:
                self._showcase = Showcase(recipe, shards, self.media)
        self._tracker.call("describe", facts, list(dict.fromkeys(tags)))

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """A training row of metrics.jsonl."""
        if self._tracker is None:
            return
        flat = {"loss": row["loss"], **{f"loss/{name}": value for name, value in row["terms"].items()}}
        flat |= {f"metric/{name}": value for name, value in row["metrics"].items()}
        flat |= {name: row[name] for name in ("lr", "grad_norm", "samples_per_s", "momentum") if name in row}
        self._tracker.call("log", step, flat, self._context("train"))

    def views(self, step: int, epoch: int) -> None:
        """Training views of a few samples, at the steps that are due, made and sent in the tracker's thread."""
        showcase = self._showcase
        if self._tracker is not None and showcase is not None and (step == 1 or step % self.media_every == 0):
            self._tracker.show(step, lambda: showcase.media(epoch), self._context("train"))

    def evaluated(self, step: int, split: str, found: Evaluated) -> None:
        """Scores, and what there is to see of them."""
        if self._tracker is None:
            return
        self._tracker.call("log", step, found.scores, self._context(split))
        self._tracker.show(step, lambda: found.media, self._context(split))
        if found.no_media is not None:
            self._tracker.no_media(found.no_media)

    def report(self, step: int, picture: Path, name: str) -> None:
        """The report's picture."""
        if self._tracker is not None:
            self._tracker.call("image", step, "report", str(picture), name, {})

    def finish(self, complete: bool) -> None:
        """Flush and close; quickly where the run is not complete, since somebody waits for the end."""
        if self._tracker is not None:
            self._tracker.finish(*() if complete else (5,))

    def _context(self, subset: str) -> dict[str, str]:
        return {**{name: str(value) for name, value in self.recipe.tags.items()}, "subset": subset}
