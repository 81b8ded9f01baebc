"""Caches of teachers: written before a run (`distill teach`), and compared with the run that reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill_core.batch import WHOLE_SHARD
from distill_core.contracts.slot import Slot
from distill_core.contracts.teacher import Teacher
from distill_core.data.batches import Visits
from distill_core.data.loader import Loader, digest
from distill_core.data.order import stable_hash
from distill_core.errors import DataError, UserError, counted
from distill_core.objective import Objective
from distill_core.outputs import Features
from distill_core.recipe.build import build_objective
from distill_core.recipe.changes import changes
from distill_core.recipe.sections import Recipe
from distill_core.run.assembly import make_loader, prepare_process
from distill_core.run.state import Length
from distill_core.system import distributed
from distill_core.system.files import cannot_write, in_words, remove_temporaries, size_of, write_bytes, write_whole
from distill_core.system.process import seed_all
from distill_core.system.progress import progress_bar
from distill_core.teachers.cached import Index, chunk_file, index_file, packed, read_index

ROWS, ROWS_WITH_TOKENS = 1024, 64
"""Positions of a chunk, which is held in memory while it is made."""
ORDER = ("weights", "batches", "streams", "shuffle", "optional", "fields")
"""Options of `data` that say which sample stands at a position, and what is read of it."""


def check_caches(recipe: Recipe, loader: Loader, positions: int) -> None:
    """Raises `UserError` where a teacher's cache does not fit a run over so many positions, in any of its stages."""
    for stage in range(len(recipe.stages) + 1):
        own = recipe.of_stage(stage)
        for name, slot in own.all_teachers.items():
            if slot.config.cache is None:
                continue
            index = read_index(slot.config.cache, name)
            _check_fits(index, own, name, loader)
            if index.positions < positions:
                passes = -(-positions // loader.samples)
                raise UserError(
                    f"{slot.config.cache}: the teacher {name!r} has seen {index.positions} of the {positions} samples "
                    f"of this run. Go on writing: distill teach RECIPE --passes {passes}; or train fewer steps"
                )


def _check_fits(index: Index, recipe: Recipe, name: str, loader: Loader) -> None:
    made_with = _made_with(recipe, name, loader)
    lines = [f"{path} is {new}, and was {old}" for path, (old, new) in changes(index.made_with, made_with).items()]
    lines += [
        f"tokens of {m!r} are read of the views {views}, and were written of {index.tokens.get(m, [])}"
        for m, views in _tokens(recipe, name).items()
        if not set(views) <= set(index.tokens.get(m, []))
    ]
    if lines:
        folder = recipe.all_teachers[name].config.cache
        raise UserError(
            f"{folder}: the cache of the teacher {name!r} was written for another run: {'; '.join(lines)}. Set it "
            "back, or write another: `cache` with another folder, then distill teach RECIPE"
        )


def _made_with(recipe: Recipe, name: str, loader: Loader) -> dict[str, Any]:
    """All that the features of every position depend on but the values of the weights."""
    options = recipe.to_dict()
    data = {option: options["data"][option] for option in ORDER}
    if data["batches"] == "one_set":
        data["samples_of_a_step"] = loader.batch_size
    lengths = loader.lengths.samples
    data["shards"] = {
        "count": len(lengths),
        "names": digest([shard.name for shard in loader.shards]),
        "samples": sum(lengths),
        "lengths": stable_hash(*lengths),
    }
    teacher = recipe.all_teachers[name].dump()
    teacher.pop("cache")
    return {
        "seed": options["seed"],
        "data": data,
        "augment": options["augment"],
        "teacher": teacher,
        "precision": recipe.train.precision,
    }


def _tokens(recipe: Recipe, name: str) -> dict[str, list[int]]:
    """Modality -> the views whose tokens the losses read, numbered among the teacher's."""
    views_of = recipe.plan.teachers[name].views
    views: dict[str, set[int]] = {}
    for _, needs in recipe.needs():
        for m, own in needs.teacher.get(name, {}).items():
            views.setdefault(m, set()).update(views_of[m].index(view) for view in own)
    return {m: sorted(own) for m, own in views.items() if own}


def write(recipe: Recipe, passes: int | None, *, quiet: bool) -> list[str]:
    """Write the cache of each teacher that names one, as far as it is not there; lines for the user.

    Every rank calls it, and writes every R-th chunk. `passes` None: as many as the recipe trains. Raises `UserError`.
    """
    names = [name for name, slot in recipe.all_teachers.items() if slot.config.cache is not None]
    if not names:
        raise UserError(
            f"{recipe.name}: no teacher of this recipe has a `cache`: name a folder: --set teachers.NAME.cache=FOLDER"
        )
    live = _uncached(recipe)
    device = prepare_process(recipe)
    source = recipe.data.source.build()
    source.prepare()
    loader = make_loader(live, source, device, resuming=False, quiet=quiet)
    if loader.lengths.unopened:
        number, reason = next(iter(loader.lengths.unopened.items()))
        raise DataError(f"{loader.shards[number].name}: {reason}; a teacher's cache needs all shards")
    if passes is None:
        length = Length.of(recipe.train, loader.batch_size, loader.samples)
        positions = length.steps * length.batch_size
    else:
        positions = passes * loader.samples
    seed_all(recipe.seed)
    objective = build_objective(live)
    lines = list[str]()
    for name in names:
        lines += objective.teachers[name].prepare()
        writer = _Writer(recipe, live, objective.to(device).eval(), name, loader, device)
        lines.append(writer.write(positions, quiet=quiet))
    return lines


def _uncached(recipe: Recipe) -> Recipe:
    """The recipe with teachers that encode."""

    def encoding(slot: Slot[Teacher]) -> Slot[Teacher]:
        return Slot(slot.cls, slot.config.model_copy(update={"cache": None}), slot.id, slot.package, slot.place)

    teacher = None if recipe.teacher is None else encoding(recipe.teacher)
    teachers = {name: encoding(slot) for name, slot in recipe.teachers.items()}
    return recipe.model_copy(update={"teacher": teacher, "teachers": teachers})


class _Writer:
    """Of one teacher's cache; on every rank."""

    def __init__(
        self, recipe: Recipe, live: Recipe, objective: Objective, name: str, loader: Loader, device: torch.device
    ) -> None:
        self.recipe, self.objective, self.name, self.loader, self.device = recipe, objective, name, loader, device
        self.folder = Path(recipe.all_teachers[name].config.cache).expanduser()
        self.tokens = _tokens(recipe, name)
        self.rows = ROWS_WITH_TOKENS if self.tokens else ROWS
        self.bf16 = live.train.precision == "bf16"

    def write(self, positions: int, *, quiet: bool) -> str:
        """Up to at least so many positions; a line for the user."""
        chunks = -(-positions // self.rows)
        index = distributed.on_first_rank(self._begin)
        own = range(distributed.rank(), chunks, distributed.world_size())
        missing = [chunk for chunk in own if not chunk_file(self.folder, chunk).exists()]

        def encode() -> None:
            title = f"chunks of {self.name} are written"
            with progress_bar(len(missing), title, quiet=quiet or distributed.rank() > 0) as advance:
                for chunk, data in self._chunks(missing):
                    _write(chunk_file(self.folder, chunk), data)
                    advance()

        distributed.raise_on_all_ranks(encode)
        written = max(index.positions, chunks * self.rows)
        distributed.on_first_rank(lambda: self._save(index.model_copy(update={"positions": written})))
        new, size = sum(distributed.gather_objects(len(missing))), in_words(size_of(self.folder))
        return (
            f"{self.folder}: {counted(written, 'position')} of the teacher {self.name!r} "
            f"({counted(new, 'chunk')} written, {counted(chunks - new, 'chunk')} already there), {size}"
        )

    def _begin(self) -> Index:
        """The index that is there, if it fits, or a new one."""
        weights = self.objective.teachers[self.name].digest() or ""
        index = Index(
            positions=0, rows=self.rows, weights=weights, tokens=self.tokens,
            made_with=_made_with(self.recipe, self.name, self.loader),
        )  # fmt: skip
        if not index_file(self.folder).exists():
            self._save(index)
            return index
        remove_temporaries(self.folder)
        there = read_index(self.folder, self.name)
        _check_fits(there, self.recipe, self.name, self.loader)
        if there.weights != weights:
            raise UserError(
                f"{self.folder}: the cache of the teacher {self.name!r} was written with other weights: their digest "
                f"is {weights[:12]}, and was {there.weights[:12]}. Give it the same, or write another: `cache` with "
                "another folder"
            )
        if there.tokens != self.tokens or there.rows != self.rows:
            raise UserError(
                f"{self.folder}: the cache of the teacher {self.name!r} has tokens of {there.tokens}, and this recipe "
                f"reads {self.tokens}: write another: `cache` with another folder"
            )
        return there

    def _save(self, index: Index) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(index_file(self.folder), json.dumps(index.model_dump(), indent=1) + "\n")
        except OSError as error:
            raise UserError(cannot_write(index_file(self.folder), error)) from error

    def _chunks(self, numbers: list[int]) -> Iterator[tuple[int, bytes]]:
        """(number, file) of each."""
        size, starts = self.recipe.data.batch_size, range(0, self.rows, self.recipe.data.batch_size)
        ranges = [
            range(chunk * self.rows + start, chunk * self.rows + min(start + size, self.rows))
            for chunk in numbers
            for start in starts
        ]
        batches = self.loader.visits(ranges)
        for chunk in numbers:
            features: dict[str, list[Features]] = {m: [] for m in self.recipe.plan.teachers[self.name].views}
            present: dict[str, list[Any]] = {m: [] for m in features}
            seeds, passed = [], []
            for _ in starts:
                visits = next(batches)
                seeds.append(visits.seeds)
                passed.append(visits.passed)
                for m, encoded in self._encode(visits).items():
                    has = visits.batch.presence.get(m, np.ones(len(visits.batch), bool))
                    present[m].append(has)
                    if has.any():  # else it is of a filler
                        features[m].append(encoded)
            there = {m: np.concatenate(x) for m, x in present.items()}
            yield chunk, packed(features, there, np.concatenate(seeds), np.concatenate(passed))

    @torch.no_grad()
    def _encode(self, visits: Visits) -> dict[str, Features]:
        """Raises `DataError` for a shard that cannot be read: a run that can would see other samples."""
        for skipped in visits.batch.skipped:
            if skipped.key == WHOLE_SHARD:
                raise DataError(
                    f"{skipped}; a teacher's cache needs all shards. Make it readable, and run the same command again"
                )
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            batch = self.objective.on_device(visits.batch.to(self.device))
            features = self.objective.teachers[self.name].encode(batch, self.tokens)
        for modality, encoded in features.items():
            encoded.tokens = {view: encoded.tokens[view] for view in self.tokens.get(modality, [])}
        return features


def _write(file: Path, data: bytes) -> None:
    try:
        write_bytes(file, data)
    except OSError as error:
        raise UserError(cannot_write(file, error, len(data))) from error
