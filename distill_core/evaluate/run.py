"""Runs a recipe's evaluation tasks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

from distill_core.batch import Sample, Skipped
from distill_core.contracts.media import Media
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
class Evaluated:
    """Scores, a line for each task that failed, and the samples that could not be read."""

    scores: list[TaskScore] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    """Task id -> caption of its means."""
    failed: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """What makes scores say less than they seem to, a line each."""
    media: list[Media] = field(default_factory=list)
    no_media: Exception | None = None
    """Why there are no (more) images: a task failed to make them. Its scores are unaffected."""

    @property
    def values(self) -> dict[str, float]:
        """address -> value."""
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
) -> Evaluated:
    """Score every model on every task. A task that fails leaves the scores of the others as they are.

    A task with a `source` of its own is scored on that. While training it is left out where that has no such split.
    A teacher with fewer modalities than the student is scored by the tasks that do without the others, which is said.
    `media` asks each task for pictures of about so many samples. `watch` sees the samples as they are encoded.
    """
    result = Evaluated()
    scored = [
        node for node in recipe.evaluate.tasks if split == recipe.evaluate.split or _has(node.config.source, split)
    ]
    opened = _Opened(source, cache, watch)
    left_out: dict[str, list[str]] = {}
    for node in scored:
        try:
            sets = opened.sets(node.config.source, split)
        except DataError as error:
            result.failed += [line for line in str(error).splitlines() if line not in result.failed]
            continue
        task = node.build()
        for side, model in models.items():
            if not _scorable(node, recipe, model):
                left_out.setdefault(side, []).append(node.id)
                continue
            progress(f"{node.id} ({side}, {split})")
            try:
                scores = _run(task, model, sets)
            except UserError as error:
                result.failed.append(f"{node.path} ({node.id}): {error}")
                break
            result.scores += [TaskScore(**asdict(score), side=side, task=node.id) for score in scores]
            if any(score.set is None for score in scores):
                words = (task.note(), _means_of([samples.name for samples in sets]))
                if note := "; ".join(filter(None, words)):
                    result.notes[node.id] = note
            if media and result.no_media is None:
                try:
                    with _alone(opened.all()):
                        made = list(task.media(model, sets, media))
                except Exception as error:
                    result.no_media = error
                    continue
                result.media += [
                    replace(item, name=f"{node.id}/{item.name}", context={"model": side, **item.context})
                    for item in made
                ]
    result.skipped = [skipped for samples in opened.all() for skipped in samples.skipped.values()]
    result.warnings = list(dict.fromkeys(line for samples in opened.all() for line in samples.warnings))
    for side, ids in left_out.items():
        missing = ", ".join(name for name in recipe.backbone if name not in models[side].modalities)
        result.warnings.append(f"the {side} has no {missing}, so {', '.join(ids)} cannot score it")
    return result


def _scorable(node: Slot[Task], recipe: Recipe, model: Model) -> bool:
    """Whether a task needs no other modalities than this side has."""
    own = {name: plan for name, plan in recipe.plan.modalities.items() if name in model.modalities}
    if len(own) == len(recipe.plan.modalities):
        return True
    try:
        wanted = node.cls.needs(node.config, recipe.plan).named
        return wanted <= own.keys() and not list(node.cls.problems(node.config, replace(recipe.plan, modalities=own)))
    except MissingModality:
        return False


def _run(task: Task, model: Model, sets: Sequence[EvaluationSet]) -> list[Score]:
    """Its scores. Raises `UserError` on every rank: a rank that failed alone would start the next task alone."""

    def scores() -> list[Score]:
        found = task.run(model, sets)
        counts = Counter(f"{score.set}/{score.name}" if score.set is not None else score.name for score in found)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise DataError(f"two scores have one name: {', '.join(twice)}; rename one, or the set")
        return found

    return distributed.raise_on_all_ranks(scores)


def _means_of(names: Sequence[str]) -> str:
    """Which sets the means are of: data may have fewer of them here than elsewhere."""
    if len(names) < 2:
        return ""
    some = ", ".join(names[:NAMED])
    return f"means of {len(names)} sets: {some}{', ...' if len(names) > NAMED else ''}"


def _has(source: Slot[DataSource] | None, split: str) -> bool:
    """Whether a task's own source may have this split; the shared source is checked with the recipe."""
    splits = source.cls.splits(source.config) if source else None
    return splits is None or split in splits


class _Opened:
    """The sets of each source and split, opened once: tasks share their embeddings."""

    def __init__(self, shared: DataSource, cache: EmbeddingCache | None, watch: Watch | None) -> None:
        self.shared, self.cache, self.watch = shared, cache, watch
        self._found: dict[tuple[str, str], list[EvaluationSet] | DataError] = {}

    def sets(self, own: Slot[DataSource] | None, split: str) -> list[EvaluationSet]:
        """The split's sets. Raises `DataError` on every rank, with all that is wrong on any."""
        key = (json.dumps(own.dump(), sort_keys=True) if own else "", split)
        if key not in self._found:
            try:
                self._found[key] = self._open(own, split)
            except UserError as error:
                self._found[key] = DataError(str(error))
        found = self._found[key]
        if isinstance(found, DataError):
            raise found
        return found

    def all(self) -> list[EvaluationSet]:
        """Every set that was opened."""
        return [samples for found in self._found.values() if not isinstance(found, DataError) for samples in found]

    def _open(self, own: Slot[DataSource] | None, split: str) -> list[EvaluationSet]:
        def samples() -> dict[str, Iterable[Sample]]:
            source = self.shared
            if own is not None:
                source = own.build()
                source.prepare()
            if not (found := source.samples(split)):
                raise DataError(f"the data source has no split {split!r}")
            return found

        def others(other: str) -> list[EvaluationSet]:
            return self.sets(own, other)

        return [
            EvaluationSet(name, read, others=others, cache=self.cache, watch=self.watch)
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
