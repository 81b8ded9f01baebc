"""Runs a recipe's evaluation tasks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

from distill_core.batch import Sample, Skipped
from distill_core.contracts.media import Media
from distill_core.contracts.nested import needs_of
from distill_core.contracts.slot import Slot
from distill_core.contracts.source import DataSource
from distill_core.contracts.task import Task
from distill_core.errors import DataError, UserError
from distill_core.evaluate.cache import EmbeddingCache
from distill_core.evaluate.score import Score, TaskScore
from distill_core.evaluate.sets import EvaluationSet, Watch
from distill_core.model import Model
from distill_core.plan import MissingModality
from distill_core.recipe.sections import Recipe
from distill_core.system import distributed

NAMED = 8
"""Sets named below a table of means, at most."""


@dataclass
class EvaluationResult:
    """Scores, a line for each task that failed, and the samples that could not be read."""

    scores: list[TaskScore] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    """Task id -> caption of its means."""
    failed: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """Reasons to trust the scores less, a line each."""
    media: list[Media] = field(default_factory=list)
    no_media: Exception | None = None
    """Why there are no (more) images: a task failed to make them. Its scores are unaffected."""

    @property
    def values(self) -> dict[str, float]:
        """Each score's value by its address, SIDE/TASK/SET/NAME."""
        return {score.address: score.value for score in self.scores}


def evaluate(
    recipe: Recipe,
    models: Mapping[str, Model],
    source: DataSource,
    split: str,
    progress: Callable[[str], None] = lambda what: None,
    media: int = 0,
    *,
    cache: EmbeddingCache | None = None,
    watch: Watch | None = None,
) -> EvaluationResult:
    """Score every model on every task. A task that fails does not affect the scores of the others.

    A task with its own `source` is scored on that; during training it is skipped if that source has no such split.
    A teacher with fewer modalities than the student, or without its fusion, is scored by the tasks that do not need
    what it lacks, with a warning.
    `media` is the approximate number of samples that each task draws; `watch` sees the samples as they are encoded.
    """
    result = EvaluationResult()
    nodes = [
        node for node in recipe.evaluate.tasks if split == recipe.evaluate.split or _may_have(node.config.source, split)
    ]
    open_sets = _OpenSets(source, cache, watch)
    unscorable: dict[str, list[str]] = {}
    for node in nodes:
        try:
            sets = open_sets.sets(node.config.source, split)
        except DataError as error:
            result.failed += [line for line in str(error).splitlines() if line not in result.failed]
            continue
        task = node.build()
        for side, model in models.items():
            if not _scorable(node, recipe, model):
                unscorable.setdefault(side, []).append(node.id)
                continue
            progress(f"{node.id} ({side}, {split})")
            try:
                scores = _run(task, model, sets)
            except UserError as error:
                result.failed.append(f"{node.path} ({node.id}): {error}")
                break
            result.scores += [TaskScore(**asdict(score), side=side, task=node.id) for score in scores]
            if any(score.set is None for score in scores):
                parts = (task.note(), _means_of([samples.name for samples in sets]))
                if note := "; ".join(filter(None, parts)):
                    result.notes[node.id] = note
            if media and result.no_media is None:
                try:
                    with _alone(open_sets.all()):
                        items = list(task.media(model, sets, media))
                except Exception as error:
                    result.no_media = error
                    continue
                result.media += [
                    replace(item, name=f"{node.id}/{item.name}", context={"model": side, **item.context})
                    for item in items
                ]
    result.skipped = [skipped for samples in open_sets.all() for skipped in samples.skipped.values()]
    result.warnings = list(dict.fromkeys(line for samples in open_sets.all() for line in samples.warnings))
    for side, ids in unscorable.items():
        lost = [name for name in recipe.towers if name not in models[side].backbone]
        lost += [f"head {name}" for name in recipe.heads if name not in models[side].heads]
        missing = ", ".join(lost) or "fusion"
        result.warnings.append(f"the {side} has no {missing}, so {', '.join(ids)} cannot score it")
    return result


def _scorable(node: Slot[Task], recipe: Recipe, model: Model) -> bool:
    """Whether a task needs no other modalities and heads than this side has, and no fusion where it has none."""
    if recipe.heads and set(needs_of(node.cls, node.config, recipe.plan).heads) - model.heads.keys():
        return False
    modalities = {name: plan for name, plan in recipe.plan.modalities.items() if name in model.backbone}
    fusion = recipe.plan.fusion and model.fusion is not None
    if len(modalities) == len(recipe.plan.modalities) and fusion == recipe.plan.fusion:
        return True
    try:
        needed = needs_of(node.cls, node.config, recipe.plan).named
        return needed <= modalities.keys() and not list(
            node.cls.problems(node.config, replace(recipe.plan, modalities=modalities, fusion=fusion))
        )
    except MissingModality:
        return False


def _run(task: Task, model: Model, sets: Sequence[EvaluationSet]) -> list[Score]:
    """The task's scores. Raises `UserError` on every rank: a rank that failed alone would start the next task alone."""

    def scores() -> list[Score]:
        result = task.run(model, sets)
        counts = Counter(f"{score.set}/{score.name}" if score.set is not None else score.name for score in result)
        if duplicates := [name for name, count in counts.items() if count > 1]:
            raise DataError(f"two scores have one name: {', '.join(duplicates)}; rename one, or the set")
        return result

    return distributed.raise_on_all_ranks(scores)


def _means_of(names: Sequence[str]) -> str:
    """Which sets the means cover: there may be fewer of them on this machine than elsewhere."""
    if len(names) < 2:
        return ""
    listed = ", ".join(names[:NAMED])
    return f"means of {len(names)} sets: {listed}{', ...' if len(names) > NAMED else ''}"


def _may_have(source: Slot[DataSource] | None, split: str) -> bool:
    """Whether a task's own source may have this split; the shared source is checked with the recipe."""
    splits = source.cls.splits(source.config) if source else None
    return splits is None or split in splits


class _OpenSets:
    """The sets of each source and split, opened once: tasks share their embeddings."""

    def __init__(self, shared: DataSource, cache: EmbeddingCache | None, watch: Watch | None) -> None:
        self.shared, self.cache, self.watch = shared, cache, watch
        self._sets: dict[tuple[str, str], list[EvaluationSet] | DataError] = {}

    def sets(self, source: Slot[DataSource] | None, split: str) -> list[EvaluationSet]:
        """The split's sets. Raises `DataError` on every rank, with the problems of all ranks."""
        key = (json.dumps(source.dump(), sort_keys=True) if source else "", split)
        if key not in self._sets:
            try:
                self._sets[key] = self._open(source, split)
            except UserError as error:
                self._sets[key] = DataError(str(error))
        sets = self._sets[key]
        if isinstance(sets, DataError):
            raise sets
        return sets

    def all(self) -> list[EvaluationSet]:
        """Every set that was opened."""
        return [samples for sets in self._sets.values() if not isinstance(sets, DataError) for samples in sets]

    def _open(self, source: Slot[DataSource] | None, split: str) -> list[EvaluationSet]:
        def samples() -> dict[str, Iterable[Sample]]:
            opened = self.shared
            if source is not None:
                opened = source.build()
                opened.prepare()
            if not (sets := opened.samples(split)):
                raise DataError(f"the data source has no split {split!r}")
            return sets

        def open_split(name: str) -> list[EvaluationSet]:
            return self.sets(source, name)

        return [
            EvaluationSet(name, read, open_split=open_split, cache=self.cache, watch=self.watch)
            for name, read in distributed.raise_on_all_ranks(samples).items()
        ]


@contextmanager
def _alone(sets: Sequence[EvaluationSet]) -> Iterator[None]:
    """Marks the sets as used by one rank alone."""
    for samples in sets:
        samples.alone = True
    try:
        yield
    finally:
        for samples in sets:
            samples.alone = False
