"""Scores of a run's own models: on the validation split while it trains, on the test split at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from distill_core.contracts.source import DataSource
from distill_core.errors import counted, did_you_mean
from distill_core.evaluate.run import EvaluationResult, evaluate
from distill_core.evaluate.score import by_address, headlines
from distill_core.recipe.build import models_of
from distill_core.run.display import Display, Scoring
from distill_core.run.folder import RunFolder
from distill_core.run.state import RunState
from distill_core.run.tracking import TrackedRun
from distill_core.system import distributed
from distill_core.system.sharded import whole


class Validation:
    """Every rank calls the methods: a task may share its work among them."""

    def __init__(
        self, state: RunState, source: DataSource, folder: RunFolder, tracked: TrackedRun, display: Display
    ) -> None:
        self.state, self.source, self.folder = state, source, folder
        self.tracked, self.display = tracked, display
        self._warned: set[str] = set()
        self._failed: Sequence[str] = ()
        """Tasks that failed the last time: a repeated failure is reported once."""
        self._first = True

    def validate(self) -> None:
        """Score the validation split; `state` notes the score where it is the best so far."""
        state, recipe = self.state, self.state.recipe
        split, best = recipe.evaluate.validation, recipe.train.checkpoint.best
        evaluated = self._evaluate(split, Scoring(quiet=True), self.display.doing)
        scores = by_address(evaluated.scores)
        for line in evaluated.failed:
            if line not in self._failed:
                self.display.warn(f"step {state.step}: not validated: {line}")
        self._failed = evaluated.failed
        if self._first and best is not None and best not in scores:
            self.display.warn(
                f"train.checkpoint.best: no score {best!r}, so no best checkpoint is kept"
                f"{did_you_mean(best, list(scores))}"
            )
        elif self._first and best is not None and scores[best].higher_is_better is None:
            self.display.warn(
                f"train.checkpoint.best: {best!r} is better neither higher nor lower, so no best checkpoint is kept"
            )
        self._first = False
        if line := ", ".join(f"{score.address} {score.text}" for score in headlines(evaluated.scores)):
            self.display.say(f"step {state.step}, {split}: {line}")
        if best is None:
            return
        # ranks may round a score differently, and rank 0 is the one to keep the checkpoint
        score = distributed.gather_objects(scores.get(best))[0]
        if score is not None and score.improves_on(state.best):
            state.best, state.best_step = score.value, state.step

    def test(self) -> EvaluationResult:
        """Score the final split, with its own progress bar: that of training is closed."""
        scoring = Scoring(quiet=self.display.quiet)
        return self._evaluate(self.state.recipe.evaluate.split, scoring, scoring.doing)

    def _evaluate(self, split: str, scoring: Scoring, doing: Callable[[str], None]) -> EvaluationResult:
        state, display = self.state, self.display
        models = models_of(state.recipe, state.objective, state.device)
        with scoring, whole(state.objective):
            evaluated = evaluate(
                state.recipe, models, self.source, split, doing, self.tracked.media, watch=scoring.watch
            )
        display.doing("")
        if distributed.rank() > 0:
            return evaluated
        for line in evaluated.warnings:
            if line not in self._warned:
                self._warned.add(line)
                display.warn(line)
        if evaluated.skipped:
            first = evaluated.skipped[0]
            display.warn(
                f"{split}: not scored, since unreadable: {counted(len(evaluated.skipped), 'item')}; the first: "
                f"{first.key!r} of {first.url}: {first.reason}"
            )
            self.folder.skip(state.step, evaluated.skipped, split)
        if evaluated.scores:
            self.folder.log({"step": state.step, "split": split, "scores": evaluated.values})
            self.tracked.evaluated(state.step, split, evaluated)
        return evaluated
