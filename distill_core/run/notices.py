"""Messages about a run's recipe and data: at its start, and as batches arrive, each once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distill_core.batch import Batch
from distill_core.contracts.weights import LoadReport
from distill_core.errors import counted
from distill_core.run.display import Display
from distill_core.run.folder import RunFolder
from distill_core.run.state import RunState
from distill_core.system.process import arithmetic, cores

ENOUGH = 64
"""Number of samples that the summary of the data is computed from."""
SHOWN = 5
"""Skipped samples that are shown on each rank; skipped.jsonl names them all."""


class Notices:
    """Prints the messages; call `start` once and `batch` with each batch."""

    def __init__(self, state: RunState, folder: RunFolder, display: Display) -> None:
        self.state, self.folder, self.display = state, folder, display
        self._measures: list[Mapping[str, Mapping[str, float]]] | None = [] if state.resumed is None else None
        """Of the first samples; None once their summary is printed."""

    def start(self, reports: Sequence[LoadReport]) -> None:
        """Print what is trained and on what data, and warn of likely mistakes."""
        state, recipe, display = self.state, self.state.recipe, self.display
        for report in reports:
            display.say(f"weights: {report.line}")
        count = sum(p.numel() for p in state.train_step.parameters)
        start = f"resumed at step {state.step} of " if state.resumed is not None else ""
        computed = arithmetic(recipe.train.precision, recipe.train.matmul_precision, state.device)
        display.say(
            f"{self.folder.path}: {start}{counted(self.state.length.steps, 'step')} of "
            f"{counted(self.state.length.batch_size, 'sample')}, {count / 1e6:.1f} M trained parameters, {computed}"
        )
        if state.resumed is not None and state.resumed.changes:
            parts = ", ".join(f"{path} {old} -> {new}" for path, (old, new) in state.resumed.changes.items())
            display.warn(f"the recipe has changed since step {state.step} was saved; the new values apply: {parts}")
        self._batch_size()
        self._workers()
        for number, reason in state.loader.lengths.unopened.items():
            display.warn(
                f"{reason or state.loader.shards[number].name}: its number of samples is assumed, and they are skipped "
                "until it can be read"
            )

    def batch(self, batch: Batch) -> None:
        """Call before a batch's step: reports skipped samples and a summary of the data."""
        self._skipped(batch)
        self._measured(batch)

    def _batch_size(self) -> None:
        batch_size, samples = self.state.length.batch_size, self.state.length.samples
        if batch_size > samples:
            self.display.warn(
                f"a step takes {batch_size} samples and there are only {samples} to train on: a sample comes more "
                "than once in a batch, where a contrastive loss pushes it away from itself. Lower data.batch_size."
            )

    def _workers(self) -> None:
        workers = self.state.recipe.data.workers
        if workers > cores():
            self.display.warn(
                f"data.workers is {workers}, but this process may use only {cores()} cores: "
                f"--set data.workers={cores() - 1} leaves one to train"
            )

    def _skipped(self, batch: Batch) -> None:
        if batch.skipped:
            if self.state.skipped_samples < SHOWN:
                self.display.warn_here(f"skipped {batch.skipped[0]}")
            self.folder.skip(self.state.step + 1, batch.skipped)

    def _measured(self, batch: Batch) -> None:
        """Print a summary of the data from the augmentations' measures, once there are enough of them."""
        if self._measures is None:
            return
        self._measures += batch.measures
        if len(self._measures) < ENOUGH and self.state.step + 1 < self.state.length.steps:
            return
        for modality, node in self.state.recipe.augment.items():
            measures = [sample[modality] for sample in self._measures if modality in sample]
            if not measures:
                continue
            means = {name: sum(sample[name] for sample in measures) / len(measures) for name in measures[0]}
            line, warning = node.cls.remarks(node.config, means)
            self.display.say(f"data: {modality}: {line} (of {counted(len(measures), 'sample')})")
            if warning is not None:
                self.display.warn(f"augment.{modality}: {warning}")
        self._measures = None
