"""The training loader: streams in worker processes, batches, exact state."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from distill_core.components import Collator
from distill_core.data.shards import check
from distill_core.data.stream import Failure, Item, SampleViews, ShardStream
from distill_core.errors import DataError
from distill_core.recipe import Recipe
from distill_core.types import Batch, Skipped


class Collate:
    """Items -> a batch, by each modality's collator. Picklable."""

    def __init__(self, collators: Mapping[str, Collator]) -> None:
        self.collators = dict(collators)

    def __call__(self, items: Sequence[Item | Failure]) -> Batch | Failure:
        """A failure in place of an item stands for the whole batch."""
        good: list[Item] = []
        skipped: list[Skipped] = []
        for item in items:
            if isinstance(item, Failure):
                return item
            good.append(item)
            skipped += item.skipped
        seeds = [item.seed for item in good]
        try:
            views = {
                name: collate([item.views[name] for item in good], seeds) for name, collate in self.collators.items()
            }
        except Exception as error:
            keys = ", ".join(item.key for item in good[:3])
            return Failure(f"a batch (samples {keys}, ...) cannot be collated: {type(error).__name__}: {error}")
        measures = [item.measures for item in good if item.measures]
        return Batch(views, [item.key for item in good], skipped, measures)


@contextmanager
def _without_torchs_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # torchdata still calls torch.set_vital, which torch has deprecated: nothing a user could act on
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
        # more workers than cores: the trainer says it, in a recipe's terms
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


class _LeaveSignals:
    """In each worker: Ctrl-C and a batch system's SIGTERM reach it too, but the trainer alone answers, and saves.

    A worker that died of one would take the trainer with it. When Python itself ends, it ends its workers by SIGTERM.
    """

    def __init__(self) -> None:
        self.ending = multiprocessing.RawValue("b", 0)
        atexit.register(self._end)

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._terminated)

    def _end(self) -> None:
        self.ending.value = 1

    def _terminated(self, number: int, frame: object) -> None:
        if self.ending.value:
            os._exit(0)


class Loader:
    """Endless batches. `state_dict` is taken after the batch that was last handed out, whatever is prefetched."""

    def __init__(
        self, recipe: Recipe, shards: Sequence[str], *, rank: int = 0, world: int = 1, pin: bool = False
    ) -> None:
        from torchdata.stateful_dataloader import StatefulDataLoader

        check(shards)
        augment = {name: node.build() for name, node in recipe.augment.items()}
        collators = {name: node.cls.collator(node.config) for name, node in recipe.backbone.items()}  # type: ignore[attr-defined]
        stream = ShardStream(
            shards,
            SampleViews(augment, recipe.seed),
            seed=recipe.seed,
            shuffle=recipe.data.shuffle,
            rank=rank,
            world=world,
        )
        workers = recipe.data.workers
        with _without_torchs_warnings():
            self._loader = StatefulDataLoader(
                stream,
                batch_size=recipe.data.batch_size,
                num_workers=workers,
                collate_fn=Collate(collators),
                prefetch_factor=recipe.data.prefetch if workers else None,
                pin_memory=pin,
                worker_init_fn=_LeaveSignals() if workers else None,
            )

    def __iter__(self) -> Iterator[Batch]:
        """Starts the workers at once. Raises `DataError` for what a worker met."""
        with _without_torchs_warnings():
            return self._checked(iter(self._loader))

    def _checked(self, batches: Iterator[Batch | Failure]) -> Iterator[Batch]:
        for batch in batches:
            if isinstance(batch, Failure):
                raise DataError(batch.message)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        state: dict[str, Any] = self._loader.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the first batch is asked for."""
        self._loader.load_state_dict(state)
