"""In a loader's worker: positions of the order to samples, views, and a collated batch."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from distill_core.batch import WHOLE_SHARD, Batch, Sample, Skipped, View, Views, with_extra
from distill_core.contracts.masker import Masker
from distill_core.contracts.teacher import TeacherReader, Visit
from distill_core.data.fields import SampleFields
from distill_core.data.order import Order, Place, stable_hash
from distill_core.data.shard import Patience, Shard, retry
from distill_core.errors import AbsentModality, BadSample, DataError
from distill_core.interfaces import Augmentation, Collator, JointAugmentation
from distill_core.plan import joined
from distill_core.system.files import in_words

SHARED_MEMORY = Path("/dev/shm")
ATTEMPTS = 1000
"""Give up after this many unusable samples in place of one."""
DOWN = 5
"""Give up after this many different shards in a row that cannot be read (or all, where there are fewer)."""
MEASURED = 64
"""Samples that each worker measures."""
LESS_SHARED = "Lower data.workers, data.prefetch or data.batch_size, or give more (docker run --shm-size=16g)."


@dataclass(slots=True)
class Item:
    """One sample's views, and the sample that was passed over for it."""

    key: str
    views: dict[str, list[View]]
    """By modality; those that the sample lacks, as it may, are left out."""
    seed: int
    """`Visit.seed_of_sample`."""
    skipped: list[Skipped] = field(default_factory=list)
    set: str = ""
    """The set of the source that it comes from."""
    measures: dict[str, Mapping[str, float]] = field(default_factory=dict)
    """By modality, of the first samples of each worker."""
    fields: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    """Those of `data.fields` that it has."""
    teacher: dict[str, dict[str, list[View]]] = field(default_factory=dict)
    """What teachers take in place of `views`, by teacher and modality."""


@dataclass(slots=True)
class Visits:
    """A batch of B positions, with what says which samples it holds: `seeds` (`Visit.seed_of_sample`) [B], and `passed`
    [B], True where another sample was passed over for it."""

    batch: Batch
    seeds: np.ndarray[Any, Any]
    passed: np.ndarray[Any, Any]


@dataclass(slots=True)
class Failure:
    """What stops a run; it travels in place of a batch, so that a worker's error reaches the user as one line."""

    message: str


class SampleViews:
    """Raw sample -> the views of every modality that it has. Picklable."""

    def __init__(
        self,
        augment: Mapping[str, Augmentation],
        seed: int,
        optional: Collection[str] = (),
        joint: Mapping[str, JointAugmentation] | None = None,
    ) -> None:
        """`optional`: modalities that a sample may lack; `joint`: augmentations of several at once, as `image+text`."""
        self.augment, self.joint = dict(augment), dict(joint or {})
        self.seed, self.optional = seed, frozenset(optional)
        self.measured = 0

    def measure(self, sample: Sample) -> dict[str, Mapping[str, float]]:
        """What the augmentations measure of one of the first samples; {} of all others."""
        if self.measured == MEASURED:
            return {}
        self.measured += 1
        measures = {}
        for name, augmentation in self.augment.items():
            try:
                if measure := augmentation.measure(sample):
                    measures[name] = measure
            except BadSample:  # a sample can be trained on without what is measured
                continue
        return measures

    def __call__(self, sample: Sample, epoch: int, repeat: tuple[int, ...] = ()) -> dict[str, list[View]]:
        """`repeat` tells apart the times that a sample comes in one pass: each has views of its own.

        Raises `BadSample` for what an augmentation says it cannot use, for a modality that is missing and may not be,
        and for a sample that has none at all. Any other error of an augmentation is a bug, not
        the sample's fault: a `DataError` that names the sample.
        """

        def generator(name: str) -> np.random.Generator:
            return np.random.default_rng(stable_hash(self.seed, epoch, sample["__key__"], name, *repeat))

        def own(name: str) -> list[View]:
            with _bugs_named(sample, name, self.augment[name]):
                return self.augment[name].train_views(sample, generator(name))

        views: dict[str, list[View]] = {}
        for key, joint in self.joint.items():
            try:
                with _bugs_named(sample, key, joint):
                    made = joint.train_views(sample, own, generator(key))
                    views |= {name: made[name] for name in joined(key)}
            except AbsentModality:
                if self.optional.isdisjoint(joined(key)):
                    raise
        absent = []
        for name in self.augment:
            try:
                views[name] = views[name] if name in views else own(name)
            except AbsentModality as error:
                if name not in self.optional:
                    raise
                absent.append(f"{name}: {error}")
        if not views:
            raise BadSample(f"it has no modality at all ({'; '.join(absent)})")
        return {name: views[name] for name in self.augment if name in views}


class _Bug(DataError):
    """An augmentation's, named already."""


@contextmanager
def _bugs_named(sample: Sample, name: str, augmentation: Augmentation | JointAugmentation) -> Iterator[None]:
    """Turns any error but a `BadSample` into one that names the sample."""
    try:
        yield
    except (BadSample, _Bug):
        raise
    except Exception as error:
        raise _Bug(
            f"{sample.get('__url__')}: sample {sample['__key__']!r}: augment.{name} ({augmentation.name}) failed: "
            f"{type(error).__name__}: {error}. An augmentation raises BadSample for a sample that is to be "
            "skipped; this is a bug of it."
        ) from error


class Collate:
    """Items -> a batch, by each modality's collator. Picklable."""

    def __init__(
        self,
        collators: Mapping[str, Collator],
        optional: Collection[str] = (),
        fields: SampleFields | None = None,
        teachers: Mapping[str, Mapping[str, Collator]] | None = None,
        maskers: Mapping[str, Masker] | None = None,
    ) -> None:
        """`optional`: modalities and fields that an item may lack; `teachers`: the collators of what each reads for
        itself."""
        self.collators, self.optional = dict(collators), list(optional)
        self.fields, self.teachers = fields or SampleFields({}), dict(teachers or {})
        self.maskers = dict(maskers or {})

    def __call__(self, items: Sequence[Item], fillers: Mapping[str, Item] | None = None) -> Batch:
        """`fillers`: an item with each modality that none of the items has.

        Raises `DataError` where a collator fails, or a worker's shared memory is full.
        """
        views: dict[str, Views] = {}
        teacher: dict[str, dict[str, Views]] = {id: {} for id in self.teachers}
        try:
            for name, collate in self.collators.items():
                members = [item for item in items if name in item.views] or [(fillers or {})[name]]
                samples, seeds = [item.views[name] for item in members], [item.seed for item in members]
                views[name] = with_extra(collate(samples, seeds), samples)
                if name in self.maskers:
                    views[name] = self.maskers[name].drawn(views[name], seeds)
                for group in views[name].groups:
                    group.locate_hidden()
                for id, own in self.teachers.items():
                    for key, collate_own in own.items():
                        if key.rpartition("/")[2] == name:
                            own_views = [item.teacher[id][key] for item in members]
                            teacher[id][key] = with_extra(collate_own(own_views, seeds), own_views)
        except Exception as error:
            keys = ", ".join(item.key for item in items[:3])
            raise DataError(
                f"a batch (samples {keys}, ...) cannot be collated: {type(error).__name__}: {error}"
            ) from error
        batch = Batch(
            views,
            [item.key for item in items],
            skipped=[skip for item in items for skip in item.skipped],
            measures=[item.measures for item in items if item.measures],
            sets=Counter(item.set for item in items),
            presence={
                name: np.array([name in item.views or name in item.fields for item in items]) for name in self.optional
            },
            fields={
                name: torch.from_numpy(x) for name, x in self.fields.stacked([item.fields for item in items]).items()
            },
            teacher=teacher,
        )
        if get_worker_info() is not None:
            try:
                batch.share_memory()
            except RuntimeError as error:
                # the queue's own thread would print it and drop the batch, and the trainer wait for it for ever
                raise DataError(f"a batch does not fit into {shared_memory()}: {error}. {LESS_SHARED}") from error
        return batch


def shared_memory() -> str:
    """What errors call it, with the room that it has."""
    if not SHARED_MEMORY.is_dir():
        return "shared memory"
    usage = shutil.disk_usage(SHARED_MEMORY)
    return f"shared memory ({SHARED_MEMORY}: {in_words(usage.free)} of {in_words(usage.total)} free)"


class BatchReader:
    """The samples at some positions of the order, as a batch.

    A sample that cannot be used is skipped and named, and another of the same pass takes its place, the same one
    whoever reads it. A shard that cannot be read is tried again in the next pass.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        lengths: Sequence[int],
        order: Order,
        views: SampleViews,
        collate: Callable[[Sequence[Item], Mapping[str, Item]], Batch],
        *,
        patience: Patience,
        sets: Sequence[str] = (),
        reading: Callable[[str], None] | None = None,
        fields: SampleFields | None = None,
        teachers: Mapping[str, TeacherReader] | None = None,
    ) -> None:
        """`sets` names the set of each shard; `reading` is called with the name of each that is read from; `teachers`
        are those that read for themselves."""
        self.shards, self.lengths, self.sets = list(shards), list(lengths), list(sets)
        self.order, self.views, self.collate = order, views, collate
        self.patience, self.reading = patience, reading
        self.fields, self.teachers = fields or SampleFields({}), dict(teachers or {})
        self.repeats: list[int] = []  # how often each shard stands before its place in the list
        listed: dict[str, int] = {}
        for shard in self.shards:
            self.repeats.append(listed.get(shard.name, 0))
            listed[shard.name] = self.repeats[-1] + 1
        self._down: dict[int, tuple[int, str]] = {}  # shard -> (the pass in which it could not be read, why)
        self._down_in_a_row: list[int] = []
        self._fillers: dict[str, Item] = {}

    def batch(self, positions: Sequence[int]) -> Batch | Failure:
        """The samples at these positions; a `Failure` for what must stop the run."""
        visits = self.visits(positions)
        return visits if isinstance(visits, Failure) else visits.batch

    def visits(self, positions: Sequence[int]) -> Visits | Failure:
        """As `batch`."""
        try:
            items = [self.item(position) for position in positions]
            lacking = [
                name
                for name in self.views.augment
                if name in self.views.optional and not any(name in item.views for item in items)
            ]
            batch = self.collate(items, {name: self._filler(name) for name in lacking})
        except (DataError, _NothingToRead) as error:
            return Failure(str(error))
        seeds = np.array([item.seed for item in items], dtype=np.int64)
        return Visits(batch, seeds, np.array([bool(item.skipped) for item in items]))

    def item(self, position: int) -> Item:
        """The sample at a position, or what takes its place. Raises `DataError` where nothing can be used."""
        place = self.order.place(position)
        skipped: list[Skipped] = []
        for attempt in range(1, ATTEMPTS + 1):
            repeat = (self.repeats[place.shard], position) if attempt > 1 else self._repeat(place)
            item = self._read(place, repeat, position)
            if isinstance(item, Item):
                item.skipped = skipped
                return item
            if not skipped:  # what cannot take its place is counted where it is due itself
                skipped.append(item)
            place = self.order.substitute(position, attempt)
        raise DataError(f"no sample can be used: {ATTEMPTS} in a row were tried, the first one {skipped[0]}")

    def _repeat(self, place: Place) -> tuple[int, ...]:
        """`Visit.repeat` of a sample that comes when it is due."""
        repeats = self.repeats[place.shard]
        return (repeats,) if repeats else ()

    def _filler(self, name: str) -> Item:
        """A sample that has a modality, for a batch in which none does: the first of some drawn from a pass, the same
        for all workers. Raises `DataError` where none has it."""
        if name not in self._fillers:
            for attempt in range(ATTEMPTS):
                position = stable_hash(self.views.seed, "filler", attempt) % self.order.samples
                place = self.order.place(position)
                item = self._read(place, self._repeat(place), position)
                if isinstance(item, Item) and name in item.views:
                    self._fillers[name] = item
                    return item
            raise DataError(
                f"none of {ATTEMPTS} samples has {name!r}, which data.optional says some lack; `distill data inspect` "
                f"shows what they have. Take {name!r} out of the recipe if there is none"
            )
        return self._fillers[name]

    def _read(self, place: Place, repeat: tuple[int, ...], position: int) -> Item | Skipped:
        try:
            sample = self._sample(place)
        except DataError as error:
            return Skipped(WHOLE_SHARD, self.shards[place.shard].name, str(error))
        key = str(sample["__key__"])
        try:
            fields = self.fields(sample)
            views = self.views(sample, place.epoch, repeat)
            visit = Visit(self.views.seed, place.epoch, key, repeat, position)
            teacher = {id: self._for_teacher(id, sample, views, visit) for id in self.teachers}
        except BadSample as error:
            return Skipped(key, str(sample["__url__"]), str(error))
        set_of, measures = self.sets[place.shard] if self.sets else "", self.views.measure(sample)
        return Item(key, views, visit.seed_of_sample, set=set_of, measures=measures, fields=fields, teacher=teacher)

    def _for_teacher(
        self, id: str, sample: Sample, views: Mapping[str, list[View]], visit: Visit
    ) -> dict[str, list[View]]:
        """Raises `BadSample`; `DataError` for what must end the run, a bug of the teacher's reader included."""
        try:
            return self.teachers[id](sample, views, visit)
        except (BadSample, DataError):
            raise
        except Exception as error:
            raise DataError(
                f"{sample.get('__url__')}: sample {visit.key!r}: the teacher {id!r} cannot read it: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _sample(self, place: Place) -> Sample:
        """Raises `DataError` for a shard that cannot be read in this pass."""
        shard = self.shards[place.shard]
        if (down := self._down.get(place.shard)) is not None and down[0] == place.epoch:
            raise DataError(down[1])
        if self.reading is not None:
            self.reading(shard.name)
        expected = self.lengths[place.shard]
        try:
            sample = retry(lambda: _sample_of(shard, place.number, expected), shard, self.patience)
        except DataError as error:
            self._down[place.shard] = (place.epoch, str(error))
            if place.shard not in self._down_in_a_row:
                self._down_in_a_row.append(place.shard)
            if len(self._down_in_a_row) >= min(DOWN, len(self.shards)):
                raise _NothingToRead(
                    f"no shard can be read: the last {len(self._down_in_a_row)} failed, the last one {error}"
                ) from error
            raise
        self._down_in_a_row = []
        return sample


class _NothingToRead(Exception):
    """Every shard that was tried has failed."""


def _sample_of(shard: Shard, number: int, expected: int) -> Sample:
    if len(shard) != expected:
        raise DataError(f"{shard.name}: has {len(shard)} samples now, and had {expected} when the run began")
    return shard[number]
