"""The training loop. It knows no method: views, towers, losses and evaluations all come from the recipe."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill_core.batch import Batch
from distill_core.data.loader import Loader
from distill_core.data.shards import check, check_any
from distill_core.data.stream import unseen
from distill_core.errors import OtherRankFailed, RecipeErrors, TrainingStopped, UserError, counted, did_you_mean
from distill_core.evaluate.run import Evaluated, evaluate
from distill_core.evaluate.score import TaskScore, by_address, headlines
from distill_core.outputs import Progress
from distill_core.recipe.build import build_objective
from distill_core.recipe.sections import Recipe, changes
from distill_core.run.checkpoint import Checkpoint, Checkpoints, load_into
from distill_core.run.display import Display, Scoring
from distill_core.run.environment import environment
from distill_core.run.folder import RunFolder
from distill_core.run.load import models_of
from distill_core.run.report import Report, write_report
from distill_core.run.tracking import TrackedRun
from distill_core.step import Step, Update
from distill_core.system import distributed
from distill_core.system.files import cannot_write
from distill_core.system.process import (
    Interrupt,
    arithmetic,
    cores,
    get_random,
    keep_freed_memory,
    resolve_device,
    seed_all,
    set_matmul_precision,
    set_random,
    set_threads,
)

ENOUGH = 64
"""Samples whose measures tell what the data holds."""
READY, WAITING, STOPPED, FAILED = range(4)
"""What a rank says of its next batch; all ranks do what the highest of them says."""
FIXED = {
    "seed": "the order of the samples would change within a pass",
    "data.batch_size": "its steps, schedule and passes are counted in batches of that size",
    "data.workers": "each has its own place in the data",
    "train.optimizer.name": "its state is not the other's",
    "train.lr_factors": "the optimiser's state is kept by groups of parameters",
    "freeze": "the optimiser's state is of the parameters that are trained",
    "weights": "weights to start from come too late",
}
"""Options that a run which has begun cannot change, and why."""
SECONDS_TO_ANSWER = 30.0
"""For the other ranks, when one has failed and would save what all have done."""


@dataclass
class Result:
    """How a run ended: `signal` is None when it came to its end; `failed` names tasks that could not be scored."""

    folder: Path
    scores: list[TaskScore] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    signal: int | None = None
    unsaved: str | None = None
    """Why its last step is in no checkpoint."""


class Trainer:
    """One run: build, loop, evaluate, report."""

    def __init__(self, recipe: Recipe, folder: RunFolder, *, resume: str | None = None, quiet: bool = False) -> None:
        self.recipe, self.folder = recipe, folder
        train, data = recipe.train, recipe.data
        self.device = distributed.start(resolve_device(train.device))
        self.rank, self.world = distributed.rank(), distributed.world_size()
        set_matmul_precision(train.matmul_precision)
        if self.rank == 0:
            folder.lock()
        set_threads(train.threads, data.workers, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.source = recipe.source.build()
        self.source.prepare()
        self.shards = [shard for shards in self.source.sets("train").values() for shard in shards]
        (check if resume is None else check_any)(self.shards)
        self.evaluation_source = recipe.evaluate_source.build() if recipe.evaluate_source else self.source
        if recipe.evaluate_source is not None:
            self.evaluation_source.prepare()
        self.size = self.source.size("train")
        self.batch = data.batch_size * self.world
        self.steps = self._count_steps()

        seed_all(recipe.seed)
        self.objective = build_objective(recipe)
        self.loaded = [node.build().apply(self.objective) for node in recipe.weights] if resume is None else []
        if self.loaded and self.objective.teacher is not None:
            given = {name for loaded in self.loaded for name in loaded.names}
            self.objective.teacher.start_from_student(
                {n.removeprefix("teacher.") for n in given if n.startswith("teacher.")}
            )
        self.objective.to(self.device)
        distributed.broadcast(self.objective)
        self.update = Update(recipe, self.objective, self.device)
        self.loader = Loader(recipe, self.shards, rank=self.rank, world=self.world, pin=self.device.type == "cuda")
        self.checkpoints = Checkpoints(folder.path, train.checkpoint.keep)
        self.display = Display(self.steps, quiet=quiet or self.rank > 0)
        folder.warn = self.display.warn
        self.interrupt = Interrupt(self._warn)
        self.tracked = TrackedRun(recipe)
        self.facts: dict[str, Any] = {}
        self.resumed = resume is not None
        self.step = 0
        self.saved: int | None = None
        """The step of the last checkpoint that this process wrote or began with."""
        self.skipped_samples = 0
        self.skipped_steps = 0
        self.nonfinite_in_a_row = 0
        self.best: float | None = None
        self._warned: set[str] = set()
        self.seconds = 0.0
        seed_all(recipe.seed + 1 + self.rank)
        if resume is not None:
            self._resume(resume)

    def _count_steps(self) -> int:
        train = self.recipe.train
        if train.steps is not None:
            return train.steps
        assert train.epochs is not None
        if self.size is None:
            raise UserError(
                "train.epochs: the data source does not say how many samples it has; give `data.source.samples`, "
                "or train.steps"
            )
        return max(1, int(train.epochs * self.size) // self.batch)

    def _resume(self, checkpoint: str) -> None:
        """Take everything from a checkpoint: weights, optimiser, data, random state, counts."""
        loaded = distributed.raise_on_all_ranks(lambda: self.checkpoints.load(checkpoint, self._warn))
        if len(set(distributed.gather_objects(loaded.digest))) > 1:
            raise UserError(f"{loaded.path}: is not the same file on all ranks; run folders must be shared")
        state = loaded.state
        if len(state["ranks"]) != self.world:
            raise UserError(f"the run was saved by {len(state['ranks'])} processes; resume it with as many")
        if "recipe" in state:
            self.changes = self._changed_since(state)
        else:
            self._warn("the checkpoint does not tell its recipe: saved before distill kept it; changes are not noticed")
        load_into(self.objective, state["objective"], str(self.folder.path))
        options = state.get("recipe", self.recipe.to_dict())["train"]["optimizer"]
        self.update.load_state_dict(state["optimizer"], options)
        self.step, self.best = state["step"], state["best"]
        if "train.checkpoint.best" in self.changes:
            self.best = None  # it was another score's
        self.saved = self.step
        self.skipped_steps, self.seconds = state["skipped_steps"], state["seconds"]
        self.skipped_samples = state["ranks"][self.rank]["skipped_samples"]
        self.loader.load_state_dict(state["ranks"][self.rank]["data"])
        self._random = state["ranks"][self.rank]["random"]
        # no rank may add to a file before it is rewound
        distributed.raise_on_all_ranks(lambda: self._rewind(loaded))
        self.branch, self.best = distributed.gather_objects((self.branch, self.best))[0]
        self._best_saved = self.best

    def _changed_since(self, state: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """How the recipe differs from the one that the checkpoint was saved under. Raises `RecipeErrors` for options
        that a run which has begun cannot change."""
        found = changes(state["recipe"], self.recipe.to_dict())
        anew = f"Set it back, or start a new run: weights: [{{name: state_dict, source: {self.folder.path}}}]"
        errors = [
            f"{self.folder.path / 'recipe.yaml'}: {path} is {now}, and was {before} in the checkpoint: {why}. {anew}"
            for path, (before, now) in found.items()
            for fixed, why in FIXED.items()
            if path == fixed or path.startswith(f"{fixed}.")
        ]
        if errors:
            raise RecipeErrors(errors)
        return found

    changes: Mapping[str, tuple[Any, Any]] = {}

    def _rewind(self, loaded: Checkpoint) -> None:
        """Leave no later checkpoint and no row in the way of those that are going to be written."""
        if self.rank > 0:
            return
        if later := self.checkpoints.later(self.step):
            aside = self.folder.set_aside(later)
            self.checkpoints.restart_from(loaded)
            self.branch = {"step": self.step, "set_aside": str(aside)}
            if self.checkpoints.best in later:
                self.best = None  # the next score is the best of this branch: its own was written over
            names = ", ".join(path.name for path in later)
            self._warn(f"going back to step {self.step}: {names} and what belongs to them are set aside in {aside}")
        self.folder.rewind(self.step, self.steps)

    branch: dict[str, Any] | None = None
    """Of a run that has gone back: the `step`, and the folder of what was `set_aside`."""

    _random: dict[str, Any] | None = None

    def run(self) -> Result:
        """Train to the end (or to an interrupt), evaluate, report."""
        self.loader.start()  # workers fork here, before any thread starts
        if self._random is not None:
            set_random(self._random, self.device)
        self.display.step(self.step, None, {})
        complete = False
        try:
            with self.display, self.interrupt.listening():
                self._greet()
                self._train()
                if distributed.any_rank(self.interrupt.signal is not None):
                    number = self.interrupt.signal or signal.SIGTERM
                    name = signal.Signals(number).name
                    if self.unsaved is None:
                        self._warn(f"{name}: saved at step {self.step}. Go on with: distill resume {self.folder.path}")
                    return Result(self.folder.path, signal=number)
                self.loader.close()
            try:
                evaluated = self._evaluate(self.recipe.evaluate.split, last=True)
            except KeyboardInterrupt:
                done = "trained and saved" if self.unsaved is None else "trained"
                self._warn(f"{done}, but not evaluated. Evaluate with: distill resume {self.folder.path}")
                return Result(self.folder.path, signal=signal.SIGINT)
            for line in evaluated.failed:
                self._warn(f"not evaluated: {line}")
            skipped = sum(distributed.gather_objects(self.skipped_samples))
            if self.rank == 0:
                self._finish(evaluated, skipped)
            complete = True
            return Result(self.folder.path, evaluated.scores, evaluated.failed, unsaved=self.unsaved)
        finally:
            self.loader.close()
            for line in self.folder.write_waiting():
                self._warn(line)
            self.tracked.finish(complete)
            self.folder.unlock()

    def _train(self) -> None:
        """To the last step or a signal, and save; after an error too, where all ranks stand between two steps."""
        self._note_state()
        try:
            self._loop()
            self._save()
        except Exception as error:
            self._save_after(error)
            raise

    def _warn(self, line: str) -> None:
        """What every rank has to say alike is said once."""
        if self.rank == 0:
            self.display.warn(line)

    def _greet(self) -> None:
        recipe, say = self.recipe, self.display.say
        for loaded in self.loaded:
            say(f"weights: {loaded.line}")
        self._measures = None if self.resumed else []
        count = sum(p.numel() for p in self.update.parameters)
        start = f"resumed at step {self.step} of " if self.resumed else ""
        train = recipe.train
        computed = arithmetic(train.precision, train.matmul_precision, self.device)
        say(
            f"{self.folder.path}: {start}{counted(self.steps, 'step')} of {counted(self.batch, 'sample')}, "
            f"{count / 1e6:.1f} M trained parameters, {computed}"
        )
        if self.changes:
            parts = ", ".join(f"{path} {before} -> {now}" for path, (before, now) in self.changes.items())
            self._warn(f"the recipe has changed since step {self.step} was saved, and applies as it is now: {parts}")
        if self.size is not None and self.batch > self.size:
            self._warn(
                f"a step takes {self.batch} samples and there are only {self.size} to train on: a sample comes more "
                "than once in a batch, where a contrastive loss pushes it away from itself. Lower data.batch_size."
            )
        workers = recipe.data.workers
        if workers > cores():
            self._warn(
                f"data.workers is {workers}, but this process may use only {cores()} cores: "
                f"--set data.workers={cores() - 1} leaves one to train"
            )
        streams = self.world * max(workers, 1)
        if not self.resumed and (share := unseen(len(self.shards), streams)) > 0:
            self._warn(
                f"{counted(len(self.shards), 'shard')} cannot be dealt evenly to {streams} streams (data.workers times "
                f"ranks): after as many samples as there are, about {share:.0%} of them have not been seen and others "
                "twice; which ones changes from pass to pass. A number of shards that the streams divide avoids it."
            )
        if self.rank == 0:
            self.facts = environment(self.device, [node.package for node in recipe.components()])
            if self.branch is not None:
                self.facts["branch"] = self.branch
            goes_on = self.resumed and self.branch is None
            self.tracked.start(self.folder.path, self.facts, self.shards, goes_on, self.display.warn)

    def _loop(self) -> None:
        recipe, train = self.recipe, self.recipe.train
        clock, since = time.perf_counter(), self.step
        while self.step < self.steps and (batch := self._next_batch()) is not None:
            self._note_skipped(batch)
            self._note_repeats(batch)
            self._note_measures(batch)
            progress = Progress(self.step, self.steps, self.step * self.batch / self.size if self.size else 0.0)
            made = self.update(batch.to(self.device), progress)
            self.nonfinite_in_a_row = 0 if made.finite else self.nonfinite_in_a_row + 1
            if not made.finite:
                self._not_finite(batch, made)
            self.step += 1
            self._note_state()
            rate = None
            if self.step % train.log_every == 0 or self.step == self.steps:
                elapsed = time.perf_counter() - clock
                rate = (self.step - since) * self.batch / elapsed
                self.seconds += elapsed
                self._log(made, progress, rate)
                clock, since = time.perf_counter(), self.step
            self.tracked.views(self.step, int(progress.epoch))
            self.display.step(self.step, rate if rate is not None else self._rate, made.terms)
            self._rate = rate if rate is not None else self._rate
            every, last = train.checkpoint.every, self.step == self.steps
            pause = time.perf_counter()
            better = False
            if recipe.evaluate.every and self.step % recipe.evaluate.every == 0 and not last:
                better = self._validate()
                self._note_state()
            if not last and (better or (every and self.step % every == 0)):
                self._save(best=better)
            clock += time.perf_counter() - pause
        if recipe.evaluate.every and self.step == self.steps:
            self._final_better = self._validate()
            self._note_state()

    def _next_batch(self) -> Batch | None:
        """This rank's next batch, once every rank has its own; None where one of them got a signal.

        Ranks meet here at least once a second while one of them waits for its batch, so that none is out of reach of
        a signal or another's error in the middle of a step.
        """
        begun, warn_after = time.monotonic(), self.recipe.data.stall_warning
        batch: Batch | None = None
        while True:
            stopped = self.interrupt.signal is not None
            if batch is None and not stopped:
                batch = self.loader.wait(min(1.0, warn_after))
            state = distributed.highest(STOPPED if stopped else WAITING if batch is None else READY)
            if state == READY:
                return batch
            if state == STOPPED:
                self.interrupt.signal = self.interrupt.signal or signal.SIGTERM
                return None
            if state == FAILED:
                raise OtherRankFailed("stopped, for another rank has failed: its own message says why")
            if batch is None and time.monotonic() - begun >= warn_after:
                rank = f"rank {self.rank}: " if self.world > 1 else ""
                self.display.warn(f"{rank}no batch for {warn_after:g} s: {self.loader.waiting_for()}")
                warn_after *= 2

    def _note_state(self) -> None:
        """Remember what of this rank's state a batch or a step changes before it is complete."""
        self._state = {
            "data": self.loader.state_dict(),
            "random": get_random(self.device),
            "skipped_samples": self.skipped_samples,
        }

    def _save_after(self, error: Exception) -> None:
        """Save the last complete step before an error ends the run, if there is anything new, and say so."""
        last = f"the last checkpoint is of step {self.saved}" if self.saved is not None else "there is no checkpoint"
        try:
            if not isinstance(error, OtherRankFailed):
                distributed.highest(FAILED, SECONDS_TO_ANSWER)
        except distributed.RanksApart as apart:
            self.display.warn(f"rank {self.rank}: step {self.step} is not saved: {apart}; {last}")
            return
        places = distributed.gather_objects((self.step, self.update.whole))
        if self.saved == self.step or (self.saved is None and self.step == 0):
            return
        if places != [(self.step, True)] * self.world:
            self._warn(f"not saved: step {self.step + 1} broke off while it changed the weights; {last}")
            return
        try:
            saved = self._save()  # which says why not
        except Exception as second:
            self._warn(f"step {self.step} could not be saved either: {type(second).__name__}: {second}; {last}")
            return
        if saved:
            self._warn(
                f"saved at step {self.step}, before the error below. Go on with: distill resume {self.folder.path}"
            )

    _rate: float | None = None
    _final_better = False

    def _not_finite(self, batch: Batch, made: Step) -> None:
        terms = ", ".join(f"{name} = {value:.6g}" for name, value in made.terms.items())
        if not math.isfinite(made.loss):
            what = "the loss is not finite"
        elif self.world > 1 and not math.isinf(made.norm):
            what = "the loss or the gradient of another rank is not finite"
        else:
            what = f"the gradient's norm is {made.norm}"
        keys = [key for keys in distributed.gather_objects(batch.keys) for key in keys]
        more = f", ... ({len(keys)} in all)" if len(keys) > 8 else ""
        line = f"step {self.step + 1}: {what}: {terms}; samples {', '.join(keys[:8])}{more}"
        self.skipped_steps += 1
        if self.rank == 0:
            self.folder.log({"step": self.step + 1, "not_finite": what, "keys": keys})
        train = self.recipe.train
        if train.nonfinite == "skip" and self.nonfinite_in_a_row < train.max_nonfinite:
            self._warn(f"{line}; the step is skipped")
            return
        self.update.optimizer.zero_grad(set_to_none=True)
        self._note_state()
        resume = f"distill resume {self.folder.path} continues after this batch"
        in_fp32 = ", in fp32" if train.precision != "fp32" else ""
        if train.nonfinite == "stop":
            weights = "The weights from before this step are saved"
            hint = f"Or start again with a lower learning rate{in_fp32}, or with train.nonfinite=skip."
        else:
            line += f".\nThat is {counted(self.nonfinite_in_a_row, 'step')} in a row (train.max_nonfinite)"
            weights = "The weights from before them are saved"
            hint = f"It may only meet more of them: rather start again with a lower learning rate{in_fp32}."
        saved = f"{weights}; {resume}" if self._save() else self.unsaved
        raise TrainingStopped(f"{line}.\n{saved}. {hint}")

    def _note_repeats(self, batch: Batch) -> None:
        """Where nobody says how many samples there are: a batch that is longer than a pass of the worker that made it.

        Each worker's first batch begins with a pass, so that a sample comes twice in it only then. A later one may hold
        a sample at the end of one pass and again at the beginning of the next, which is no mistake.
        """
        first = self.step < max(1, self.recipe.data.workers)
        if self.size is None and first and not self._repeated and len(set(batch.keys)) < len(batch.keys):
            self._repeated = True
            key = next(key for key in batch.keys if batch.keys.count(key) > 1)
            self._warn(
                f"step {self.step + 1}: sample {key!r} comes more than once in a batch of {len(batch.keys)}, where a "
                "contrastive loss pushes it away from itself: a loader worker has fewer samples. Lower "
                "data.batch_size or data.workers, unless shards share keys."
            )

    _repeated = False

    def _note_measures(self, batch: Batch) -> None:
        """Once there are enough, or the last: what the data holds, by its augmentations' measures."""
        if self._measures is None:
            return
        self._measures += batch.measures
        if len(self._measures) < ENOUGH and self.step + 1 < self.steps:
            return
        for modality, node in self.recipe.augment.items():
            measured = [one[modality] for one in self._measures if modality in one]
            if not measured:
                continue
            means = {name: sum(one[name] for one in measured) / len(measured) for name in measured[0]}
            line, warning = node.cls.remarks(node.config, means)  # type: ignore[attr-defined]
            self.display.say(f"data: {modality}: {line} (of {counted(len(measured), 'sample')})")
            if warning is not None:
                self._warn(f"augment.{modality}: {warning}")
        self._measures = None

    _measures: list[dict[str, Mapping[str, float]]] | None = None

    def _note_skipped(self, batch: Batch) -> None:
        if batch.skipped:
            if self.skipped_samples < 5:
                self.display.warn(f"skipped {batch.skipped[0]}")
            self.skipped_samples += len(batch.skipped)
            self.folder.skip(self.step + 1, batch.skipped)

    def _log(self, made: Step, progress: Progress, rate: float) -> None:
        """A row of metrics.jsonl. A rank's losses are those of its own samples: the means of all ranks are logged."""
        metrics = {name: value.item() for name, value in made.losses.metrics.items()}
        means = iter(distributed.mean([made.loss, *made.terms.values(), *metrics.values()]))
        if self.rank > 0:
            return
        teacher = self.objective.teacher
        row = {
            "step": self.step,
            "epoch": round(self.step * self.batch / self.size, 4) if self.size else None,
            "loss": next(means),
            "terms": {name: next(means) for name in made.terms},
            "metrics": {name: next(means) for name in metrics},
            "lr": self.update.optimizer.param_groups[0]["lr"],
            "grad_norm": made.norm,
            "samples_per_s": round(rate, 2),
            "seconds": round(self.seconds, 3),
        }
        if teacher is not None:
            row["momentum"] = teacher.momentum(progress)
        self.folder.log(row)
        self.tracked.log(self.step, row)

    def _evaluate(self, split: str, *, last: bool = False) -> Evaluated:
        """Behind training (`last`) with a display of its own, before that in training's."""
        models = models_of(self.recipe, self.objective, self.device)
        scoring = Scoring(quiet=self.display.quiet or not last)
        with scoring:
            evaluated = evaluate(
                self.recipe,
                models,
                self.evaluation_source,
                split,
                scoring.doing if last else self.display.doing,
                self.tracked.media,
                watch=scoring.watch,
            )
        self.display.doing("")
        if self.rank > 0:
            return evaluated
        for line in evaluated.warnings:
            if line not in self._warned:
                self._warned.add(line)
                self.display.warn(line)
        if evaluated.skipped:
            first = evaluated.skipped[0]
            self.display.warn(
                f"{split}: not scored, for it cannot be read: {counted(len(evaluated.skipped), 'item')}; the first: "
                f"{first.key!r} of {first.url}: {first.reason}"
            )
            self.folder.skip(self.step, evaluated.skipped, split)
        if evaluated.scores:
            self.folder.log({"step": self.step, "split": split, "scores": evaluated.values})
            self.tracked.evaluated(self.step, split, evaluated)
        return evaluated

    def _validate(self) -> bool:
        """Evaluate on the validation split; whether this is the best so far."""
        evaluated = self._evaluate(self.recipe.evaluate.validation)
        scores, name = by_address(evaluated.scores), self.recipe.train.checkpoint.best
        for line in evaluated.failed:
            if line not in self._not_validated:  # what fails again and again is said once
                self._warn(f"step {self.step}: not validated: {line}")
        self._not_validated = evaluated.failed
        if not self._validated:
            self._validated = True
            if name is not None and name not in scores:
                self._warn(
                    f"train.checkpoint.best: no score {name!r}, so no best checkpoint is kept"
                    f"{did_you_mean(name, list(scores))}"
                )
            elif name is not None and scores[name].higher_is_better is None:
                self._warn(f"train.checkpoint.best: no value of {name!r} is better than another; no best is kept")
        if line := ", ".join(f"{score.address} {score.text}" for score in headlines(evaluated.scores)):
            self.display.say(f"step {self.step}, {self.recipe.evaluate.validation}: {line}")
        if name is None:
            return False
        # ranks may round a score differently, and rank 0 is the one to keep the checkpoint
        score = distributed.gather_objects(scores.get(name))[0]
        if score is None or not score.improves_on(self.best):
            return False
        self.best = score.value
        return True

    _validated = False
    _not_validated: Sequence[str] = ()

    def _save(self, best: bool = False) -> bool:
        """Write a checkpoint; whether that could be done, alike on all ranks. The next time it may be."""
        ranks = distributed.gather_objects(self._state)
        best = best or (self._final_better and self.step == self.steps)
        problem = None
        if self.rank == 0:
            try:
                self.folder.restore(self.recipe)
                with self.interrupt.finishing():
                    self.checkpoints.save(
                        self.step,
                        {
                            "recipe": self.recipe.to_dict(),
                            "objective": self.objective.state_dict(),
                            "optimizer": self.update.optimizer.state_dict(),
                            "ranks": ranks,
                            "best": self.best,
                            "skipped_steps": self.skipped_steps,
                            "seconds": self.seconds,
                        },
                        best=best,
                    )
            except UserError as error:
                steps = self.checkpoints.steps()
                last = f"the last checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint yet"
                problem = f"{error}. Step {self.step} is not saved; {last}"
                self._warn(problem)
        self.unsaved = distributed.gather_objects(problem)[0]
        if self.unsaved is None:
            self.saved = self.step
        if best and self.unsaved is None:
            self._best_saved = self.best
        elif best:
            self.best = self._best_saved
        return self.unsaved is None

    unsaved: str | None = None
    _best_saved: float | None = None

    def _finish(self, evaluated: Evaluated, skipped: int) -> None:
        skipped_samples, skipped_shards = self.folder.skipped_in_training()
        report = Report(
            name=self.folder.path.name,
            steps=self.step,
            samples=self.step * self.batch,
            seconds=self.seconds,
            scores=evaluated.scores,
            split=self.recipe.evaluate.split,
            skipped_samples=skipped_samples,
            skipped_shards=skipped_shards,
            skipped_reads=skipped,
            skipped_steps=self.skipped_steps,
            parameters=sum(p.numel() for p in self.update.parameters),
            notes=evaluated.notes,
            failed=evaluated.failed,
        )
        try:
            picture = write_report(self.folder, report, self.facts)
        except OSError as error:
            saved = " and saved" if self.unsaved is None else ""
            raise UserError(
                f"{cannot_write(self.folder.path / 'report.json', error)}. The run is trained{saved}, and has no "
                f"report. Make room, then: distill resume {self.folder.path}"
            ) from error
        self.tracked.report(self.step, picture, self.folder.path.name)
