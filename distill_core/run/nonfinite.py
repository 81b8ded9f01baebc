"""Steps whose loss or gradient is not finite: they are skipped, or end the run (`train.nonfinite`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from distill_core.errors import TrainingStopped, counted
from distill_core.run.capture import Capture, number, plain_random, write_capture
from distill_core.run.display import Display
from distill_core.run.folder import RunFolder
from distill_core.run.saving import Saver
from distill_core.run.state import RunState
from distill_core.step import StepResult
from distill_core.system import distributed
from distill_core.system.files import cannot_write


class NonfiniteSteps:
    """Counts them. Weights, optimiser and teacher are as they were before such a step."""

    def __init__(self, state: RunState, folder: RunFolder, saver: Saver, display: Display) -> None:
        self.state, self.folder, self.saver, self.display = state, folder, saver, display

    def check(self, keys: Sequence[str], result: StepResult) -> None:
        """Call for each step, as the last that `state` counts.

        Raises `TrainingStopped`, with the weights from before it saved, and the step not counted.
        """
        if result.finite:
            return
        state, train = self.state, self.state.recipe.train
        state.skipped_steps += 1
        problem = _problem(result)
        of_ranks = distributed.gather_objects((keys, _noted(result), plain_random(state.before["random"])))
        keys = [key for of_rank, _, _ in of_ranks for key in of_rank]
        if distributed.rank() == 0:
            self._capture(problem, keys, result, of_ranks)
            self.folder.log({"step": state.step, "not_finite": problem, "keys": keys})
        terms = ", ".join(f"{name} = {value:.6g}" for name, value in result.terms.items())
        ellipsis = f", ... ({len(keys)} in all)" if len(keys) > 8 else ""
        line = f"step {state.step}: {problem}: {terms}; samples {', '.join(keys[:8])}{ellipsis}"
        look = f"distill replay {self.folder.path} --step {state.step} runs it again and says what was not finite"
        if result.not_finite < state.train_step.allowed:
            self.display.warn(f"{line}; the step is skipped. {look}")
            return
        state.step -= 1
        in_fp32 = ", in fp32" if train.precision != "fp32" else ""
        if train.nonfinite == "stop":
            weights = "The weights from before this step are saved"
            hint = f"Or start again with a lower learning rate{in_fp32}, or with train.nonfinite=skip."
        else:
            line += f".\nThat is {counted(result.not_finite, 'step')} in a row (train.max_nonfinite)"
            weights = "The weights from before them are saved"
            hint = f"More of them are likely to follow: better start again with a lower learning rate{in_fp32}."
        saved = f"{weights}; distill resume {self.folder.path} continues after this batch"
        raise TrainingStopped(f"{line}.\n{saved if self.saver.save() else self.saver.unsaved}. {hint}\n{look}.")

    def _capture(
        self, problem: str, keys: list[str], result: StepResult, of_ranks: Sequence[tuple[Any, Any, Any]]
    ) -> None:
        state = self.state
        capture = Capture(
            step=state.step,
            problem=problem,
            seed=state.recipe.seed,
            position=state.before["data"]["position"],
            keys=keys,
            lr=result.lr,
            grad_norm=number(result.norm),
            ranks=[noted for _, noted, _ in of_ranks],
            random=[random for _, _, random in of_ranks],
        )
        try:
            write_capture(self.folder.path, capture)
        except OSError as error:
            self.display.warn(cannot_write(self.folder.path, error))


def _noted(result: StepResult) -> dict[str, Any]:
    """Of this rank."""
    parts = {"terms": result.terms, "metrics": result.metrics}
    numbers = {part: {name: number(value) for name, value in values.items()} for part, values in parts.items()}
    return {"loss": number(result.loss), **numbers}


def _problem(result: StepResult) -> str:
    if not math.isfinite(result.loss):
        return "the loss is not finite"
    if distributed.world_size() > 1 and not math.isinf(result.norm):
        return "the loss or the gradient of some rank is not finite"
    return f"the gradient's norm is {result.norm}"
