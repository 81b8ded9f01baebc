"""A run's state, which a checkpoint holds, and its length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distill_core.data.loader import Loader
from distill_core.errors import UserError
from distill_core.objective import Objective
from distill_core.outputs import Progress
from distill_core.recipe.sections import Recipe, TrainConfig
from distill_core.run.checkpoint import load_into
from distill_core.run.parts import laid_out_like
from distill_core.step import TrainStep
from distill_core.system import distributed
from distill_core.system.process import get_random, set_random


@dataclass(frozen=True)
class Length:
    """How long a run is: its `steps`, the `batch_size` of each over all ranks, and the `samples` of a pass over the
    training data."""

    steps: int
    batch_size: int
    samples: int

    @classmethod
    def of(cls, train: TrainConfig, batch_size: int, samples: int) -> Length:
        """By `train.steps`, or else `train.epochs`."""
        if train.steps is not None:
            return cls(train.steps, batch_size, samples)
        assert train.epochs is not None
        return cls(max(1, int(train.epochs * samples) // batch_size), batch_size, samples)

    def epoch(self, step: int) -> float:
        """Passes over the data that `step` steps make."""
        return step * self.batch_size / self.samples

    def progress(self, step: int) -> Progress:
        """Of the step that follows `step` steps."""
        return Progress(step, self.steps, self.epoch(step))


@dataclass(frozen=True)
class Resumed:
    """How a run was resumed. `changes`: option -> (value in the checkpoint, value now). `branch`, of a run that goes
    back to an earlier step: that `step`, and the folder of what was `set_aside`."""

    changes: Mapping[str, tuple[Any, Any]]
    branch: Mapping[str, Any] | None


class RunState:
    """All that a resumed run restores: weights, optimiser, position in the data, random numbers and counts.

    A checkpoint describes the state between two steps. What changes during a step (this rank's position in the data,
    its random numbers) is saved as it was at the last `mark`.
    """

    def __init__(
        self,
        recipe: Recipe,
        length: Length,
        objective: Objective,
        train_step: TrainStep,
        loader: Loader,
        device: torch.device,
    ) -> None:
        self.recipe, self.length, self.device = recipe, length, device
        self.objective, self.train_step, self.loader = objective, train_step, loader
        self.step = 0
        """Steps done, including skipped ones."""
        self.stage = 0
        """The stage of the recipe that the objective, its step and the loader are of."""
        self.seconds = 0.0
        """Of training steps alone."""
        self.skipped_steps = 0
        self.skipped_samples = 0
        """On this rank, as the next."""
        self.samples_by_set: Counter[str] = Counter()
        self.absences: Counter[str] = Counter()
        """Samples that lacked an optional modality, by modality."""
        self.best: float | None = None
        """The best validation score so far, and the step that has it where that is one of this process's."""
        self.best_step: int | None = None
        self.resumed: Resumed | None = None
        """None for a new run."""
        self.before: dict[str, Any] = {}
        """This rank's data and random numbers, as they were before the last step."""
        self._between_steps: dict[str, Any] = {}
        self._marked: int | None = None  # the step of these
        self._random: dict[str, Any] | None = None

    def start(self) -> None:
        """Start the loader's workers, then restore the random numbers of a resumed run."""
        self.loader.start()  # workers fork here, before any thread starts
        if self._random is not None:
            set_random(self._random, self.device)

    def mark(self) -> None:
        """Call between two steps: records the state that a checkpoint holds until the next call."""
        if self._marked != self.step:
            self.before, self._marked = self._between_steps, self.step
        self._between_steps = {
            "data": self.loader.state_dict(),
            "random": get_random(self.device),
            "skipped_samples": self.skipped_samples,
            "samples_by_set": dict(self.samples_by_set),
            "absences": dict(self.absences),
        }

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint's content, except for `step`; every rank must call it."""
        return {
            "recipe": self.recipe.to_dict(),
            "stage": self.stage,
            "objective": self.objective.state_dict(),
            "teachers": self._teacher_digests(),
            "optimizer": self.train_step.optimizer_state(),
            "hooks": self.train_step.hook_states(),
            "ranks": distributed.gather_objects(self._between_steps),
            "best": self.best,
            "skipped_steps": self.skipped_steps,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any], source: str) -> None:
        """Call before `start`. Raises `UserError`, which begins with `source`, where the weights do not fit."""
        self._check_teachers(state.get("teachers", {}), source)
        own = self.objective.state_dict()
        weights = {name: laid_out_like(x, own[name]) if name in own else x for name, x in state["objective"].items()}
        load_into(self.objective, weights, source)
        self.train_step.load_optimizer_state(state["optimizer"])
        self.train_step.load_hooks(state.get("hooks", {}))
        self.step, self.best = state["step"], state["best"]
        self.skipped_steps, self.seconds = state["skipped_steps"], state["seconds"]
        ranks, rank = state["ranks"], distributed.rank()
        self.loader.load_state_dict(ranks[0]["data"])
        self.length = Length.of(self.recipe.train, self.loader.batch_size, self.loader.samples)
        if len(ranks) == distributed.world_size():
            of_rank = ranks[rank]
            self.skipped_samples, self._random = of_rank["skipped_samples"], of_rank["random"]
            self.samples_by_set = Counter(of_rank["samples_by_set"])
            self.absences = Counter(of_rank.get("absences", {}))
            self.loader.good, self.loader.bad = of_rank["data"]["good"], of_rank["data"]["bad"]
        elif rank == 0:  # other ranks than before: their random numbers begin anew, what they counted goes on here
            self.skipped_samples = sum(of_rank["skipped_samples"] for of_rank in ranks)
            self.samples_by_set = _total(of_rank["samples_by_set"] for of_rank in ranks)
            self.absences = _total(of_rank.get("absences", {}) for of_rank in ranks)

    def _teacher_digests(self) -> dict[str, str]:
        """Of those that a checkpoint only names."""
        digests = {name: teacher.digest() for name, teacher in self.objective.teachers.items()}
        return {name: digest for name, digest in digests.items() if digest is not None}

    def _check_teachers(self, saved: Mapping[str, str], source: str) -> None:
        """Raises `UserError` where a teacher that is not saved is not the one that the run has learned from."""
        for name, digest in self._teacher_digests().items():
            if name in saved and saved[name] != digest:
                raise UserError(
                    f"{source}: the teacher {name!r} is another than the run has learned from: its weights have the "
                    f"digest {digest[:12]}, and had {saved[name][:12]}. Give it the same weights, or start a new run"
                )

    def data_totals(self) -> tuple[int, Counter[str], Counter[str]]:
        """Of all ranks, every one of which must ask: how often a sample was skipped, the samples of each set, and those
        that lacked each optional modality."""
        counts = distributed.gather_objects((self.skipped_samples, self.samples_by_set, self.absences))
        skipped, by_set, absences = zip(*counts, strict=True)
        return sum(skipped), _total(by_set), _total(absences)


def _total(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return total
