"""Sends a run's metrics and pictures to its recipe's tracker."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill_core.contracts.media import Media, Picture
from distill_core.contracts.tracker import Tracker, TrackerConfig
from distill_core.data.shard import Shard
from distill_core.evaluate.run import EvaluationResult
from distill_core.recipe.sections import Recipe
from distill_core.run.showcase import Showcase

SECONDS_TO_FINISH, SECONDS_IF_INTERRUPTED = 60.0, 5.0
"""For a tracker, to send what is queued."""


class TrackedRun:
    """The tracker of a run.

    Nothing is sent before `start`, on ranks that never call it, and where the recipe has no tracker.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.media, self.media_every = 0, 1
        self._tracker: TrackerThread | None = None
        self._showcase: Showcase | None = None

    def start(
        self,
        folder: Path,
        facts: Mapping[str, Any],
        shards: Sequence[Shard],
        resumed: bool,
        warn: Callable[[str], None],
    ) -> None:
        """Open the tracker; send the recipe, the environment and the tags."""
        recipe = self.recipe
        if recipe.tracking is None:
            return
        self._tracker = TrackerThread(recipe.tracking.build(), warn)
        self._tracker.call("start", str(folder), folder.name, recipe.to_dict(), resumed)
        tags = [slot.cls.name for slot in recipe.slots() if slot is not recipe.tracking]
        options = recipe.tracking.config
        if isinstance(options, TrackerConfig):
            tags += options.tags
            self.media, self.media_every = options.media, options.media_every
            if self.media:
                self._showcase = Showcase(recipe, shards, self.media)
        self._tracker.call("describe", facts, list(dict.fromkeys(tags)))

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Send a training row of metrics.jsonl."""
        if self._tracker is None:
            return
        flat = {"loss": row["loss"], **{f"loss/{name}": value for name, value in row["terms"].items()}}
        flat |= {f"metric/{name}": value for name, value in row["metrics"].items()}
        flat |= {name: row[name] for name in ("lr", "grad_norm", "samples_per_s", "momentum") if name in row}
        flat |= {f"timing/{name}": value for name, value in row.get("timing", {}).items()}
        flat |= {f"schedule/{path}": value for path, value in row.get("schedules", {}).items()}
        self._tracker.call("log", step, flat, self._context("train"))

    def views(self, step: int, epoch: int) -> None:
        """Send training views of a few samples at the steps that are due; the tracker's thread computes them."""
        showcase = self._showcase
        if self._tracker is not None and showcase is not None and (step == 1 or step % self.media_every == 0):
            self._tracker.show(step, lambda: showcase.media(epoch), self._context("train"))

    def evaluated(self, step: int, split: str, result: EvaluationResult) -> None:
        """Send the scores of a split, and the tasks' pictures."""
        if self._tracker is None:
            return
        self._tracker.call("log", step, result.values, self._context(split))
        self._tracker.show(step, lambda: result.media, self._context(split))
        if result.no_media is not None:
            self._tracker.no_media(result.no_media)

    def report(self, step: int, picture: Path, name: str) -> None:
        """Send the report's picture."""
        if self._tracker is not None:
            self._tracker.call("image", step, "report", str(picture), name, {})

    def settle(self) -> None:
        """Wait until all has been sent, for a minute at most."""
        if self._tracker is not None:
            self._tracker.settle()

    def finish(self, complete: bool) -> None:
        """Flush and close; with a short timeout where the run was interrupted, since somebody waits for it to end."""
        if self._tracker is not None:
            self._tracker.finish(SECONDS_TO_FINISH if complete else SECONDS_IF_INTERRUPTED)

    def _context(self, subset: str) -> dict[str, str]:
        return {**{name: str(value) for name, value in self.recipe.tags.items()}, "subset": subset}


class TrackerThread:
    """Calls a tracker from a thread of its own: it never blocks training, and its first failure is its last call.

    `warn` is called once, with a line, when the tracker fails, or is so slow that rows had to be dropped.
    """

    def __init__(self, tracker: Tracker, warn: Callable[[str], None], size: int = 1000) -> None:
        self.tracker = tracker
        self._warn = warn
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(size)
        self._warned = False
        self._failed = False
        self._no_media = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{tracker.name}", daemon=True)
        self._thread.start()

    def warn_once(self, message: str) -> None:
        """Warn, unless there was a warning before."""
        if not self._warned:
            self._warned = True
            self._warn(message)

    def call(self, method: str, *arguments: Any) -> None:
        """Queue `tracker.method(*arguments)`; returns at once."""
        self._put(lambda: getattr(self.tracker, method)(*arguments))

    def _put(self, job: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            self.warn_once(f"tracker {self.tracker.name!r} is too slow: rows are dropped (metrics.jsonl has them all)")

    def show(self, step: int, make: Callable[[], Iterable[Media]], context: Mapping[str, str]) -> None:
        """Have pictures and distributions made and sent, both in the tracker's thread; returns at once.

        Where making them fails, that is reported once, and the tracker continues with numbers alone.
        """

        def job() -> None:
            if self._no_media:
                return
            try:
                media = list(make())
            except Exception as error:
                self.no_media(error)
                return
            for item in media:
                full_context = {**context, **item.context}
                if isinstance(item, Picture):
                    self.tracker.image(step, item.name, item.picture, item.caption, full_context)
                else:
                    self.tracker.distribution(step, item.name, item.values, full_context)

        self._put(job)

    def no_media(self, error: Exception) -> None:
        """Warn once that pictures cannot be made, and why; make no more."""
        if not self._no_media:
            self._no_media = True
            self._warn(
                f"no pictures for tracker {self.tracker.name!r} from here on ({type(error).__name__}: {error}); "
                "numbers continue. Turn them off with --set tracking.media=0"
            )

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._failed:
                continue
            try:
                job()
            except Exception as error:
                self._failed = True
                self.warn_once(
                    f"tracker {self.tracker.name!r} failed ({type(error).__name__}: {error}); training continues "
                    "without it (metrics.jsonl has every row)"
                )

    def settle(self, timeout: float = SECONDS_TO_FINISH) -> None:
        """Wait until what was queued is done, `timeout` seconds at most; not for a tracker that has failed."""
        done, end = threading.Event(), time.monotonic() + timeout
        with suppress(queue.Full):
            self._queue.put(done.set, timeout=timeout)
        while not (done.wait(0.05) or self._failed or time.monotonic() > end):
            pass

    def finish(self, timeout: float = SECONDS_TO_FINISH) -> None:
        """Flush and close; give up after `timeout` seconds."""
        end = time.monotonic() + timeout
        with suppress(queue.Full):  # reported below
            for job in (self.tracker.finish, None):  # unlike rows, worth waiting for room in the queue
                self._queue.put(job, timeout=max(0.0, end - time.monotonic()))
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            self.warn_once(f"tracker {self.tracker.name!r} did not finish within {timeout:.0f} s and is abandoned")
