"""What a recipe trains, put together: the objective, its step, the loader, and the state that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distill_core.contracts.source import DataSource
from distill_core.contracts.weights import LoadReport
from distill_core.data.lengths import Lengths, measure
from distill_core.data.loader import Loader, patience_of
from distill_core.data.shard import Shard
from distill_core.parallel import prepare
from distill_core.recipe.build import build_objective, load_weights, prepare_teachers
from distill_core.recipe.sections import Recipe
from distill_core.run.state import Length, RunState
from distill_core.system import distributed
from distill_core.system.process import (
    keep_freed_memory,
    resolve_device,
    seed_all,
    set_matmul_precision,
    set_threads,
)
from distill_core.system.progress import progress_bar


@dataclass
class Assembly:
    """`state` is that of a run before its first step."""

    state: RunState
    shards: list[Shard]
    load_reports: list[LoadReport]
    """Of the weights that it starts from, none where it is resumed; and of what its teachers load in each process."""


def prepare_process(recipe: Recipe, *, workers: int | None = None) -> torch.device:
    """Join the other ranks, and set torch up as the recipe asks; returns this rank's device.

    `workers`: the loader's, each of which takes a core; None: as many as the recipe says.
    """
    train = recipe.train
    device = distributed.start(resolve_device(train.device))
    set_matmul_precision(train.matmul_precision)
    set_threads(train.threads, recipe.data.workers if workers is None else workers, device)
    keep_freed_memory()  # for the loader's workers too, which are forked from here
    return device


def assemble(recipe: Recipe, source: DataSource, device: torch.device, *, resuming: bool, quiet: bool) -> Assembly:
    """Every rank calls it, with a `source` that is prepared; random numbers are then those of a run's first step."""
    loader = make_loader(recipe, source, device, resuming=resuming, quiet=quiet)
    seed_all(recipe.seed)
    objective = build_objective(recipe)
    reports = [] if resuming else load_weights(recipe, objective)
    reports += [LoadReport(line, frozenset()) for line in prepare_teachers(objective)]
    train_step = prepare(recipe, objective, device)
    length = Length.of(recipe.train, loader.batch_size, loader.samples)
    state = RunState(recipe, length, objective, train_step, loader, device)
    seed_all(recipe.seed + 1 + distributed.rank())
    return Assembly(state, loader.shards, reports)


def make_loader(recipe: Recipe, source: DataSource, device: torch.device, *, resuming: bool, quiet: bool) -> Loader:
    """Of this rank, at the run's start; every rank calls it, with a `source` that is prepared. Raises `DataError`."""
    rank, world = distributed.rank(), distributed.world_size()
    sets = source.sets("train")
    shards = [shard for of_set in sets.values() for shard in of_set]
    lengths = _measure(shards, recipe, resuming=resuming, quiet=quiet)
    names = [name for name, of_set in sets.items() for _ in of_set]
    return Loader(recipe, shards, lengths, names, rank=rank, world=world, pin=device.type == "cuda")


def _measure(shards: Sequence[Shard], recipe: Recipe, *, resuming: bool, quiet: bool) -> Lengths:
    """How many samples each shard has: the first rank asks, then the others, from its cache."""

    def measured() -> Lengths:
        with progress_bar(len(shards), "shards are indexed", quiet=quiet) as advance:
            return measure(shards, patience_of(recipe), resuming=resuming, progress=advance)

    first = distributed.raise_on_all_ranks(lambda: measured() if distributed.rank() == 0 else None)
    return distributed.raise_on_all_ranks(lambda: first or measured())
