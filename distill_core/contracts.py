"""The small contracts around a method: where data come from, scores, optimisers, schedules, trackers, first weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from distill_core.component import Component, ComponentConfig
from distill_core.data.shards import Shards
from distill_core.media import Media
from distill_core.types import Sample

if TYPE_CHECKING:
    import numpy as np

    from distill_core.evaluate.sets import EvaluationSet
    from distill_core.model import Model
    from distill_core.objective import Objective


class DataSource(Component, ABC):
    """Where shards come from."""

    kind = "source"
    trainable: ClassVar[bool] = True
    """False for a source without shards: evaluations read its `samples`, and nothing can be trained on it."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def splits(cls, config: Any) -> tuple[str, ...] | None:
        """The splits it has, if its options tell: a recipe that uses another is refused at once."""
        return None

    @classmethod
    def knows_size(cls, config: Any) -> bool:
        """Whether `size` will know the samples of `train`: a recipe with `train.epochs` is refused at once if not."""
        return cls.size is not DataSource.size

    def prepare(self) -> None:
        """Write what must be written once (a cache), with a progress bar. Raises `DataError`."""

    @abstractmethod
    def sets(self, split: str) -> dict[str, list[str]]:
        """The shards of a split (`train`, `validation`, `test`), by set; {} where it has no such split.

        Training pools the sets; evaluations score each by itself. Raises `DataError`.
        """

    def samples(self, split: str) -> dict[str, Iterable[Sample]]:
        """What evaluations read of a split, by set; each is read again and again. {} where it has no such split.

        The samples of the shards, unless a source that has none (`trainable = False`) overrides it: its `sets` is {}.
        Samples have a `__key__`, a `__url__` (the file), and bytes by field; they may be mappings that
        open a file when a field is asked for, and raise `BadSample` then. What is returned may have a `fingerprint()`,
        a text that changes when its samples do, which kept embeddings are looked up by. Raises `DataError`.
        """
        return {name: Shards(shards) for name, shards in self.sets(split).items()}

    def size(self, split: str) -> int | None:
        """Samples in a split, if known; `train.epochs` needs it for `train`."""
        return None


class Evaluation(Component, ABC):
    """A task: scores a model on the sets of a split."""

    kind = "evaluation"

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def reads(cls, config: Any) -> tuple[str, ...]:
        """Further splits of the same data that it asks its sets for (`EvaluationSet.of_split`), to learn from."""
        return ()

    @classmethod
    def example(cls, config: Any) -> tuple[Model, list[Sample]] | None:
        """A small model, and samples that it can be scored on, for `distill check-plugin`.

        None for the checks' own, whose samples have a number alone; a task that reads pictures, say, needs others.
        """
        return None

    @abstractmethod
    def run(self, model: Model, sets: Sequence[EvaluationSet]) -> dict[str, float]:
        """Scores by name: `SET/score`, and `score` for the mean over sets. Raises `DataError`.

        The model may be one that is trained: its mode and tensors stay as they are, and so do the sets' embeddings.
        """

    def note(self) -> str:
        """What to know to read the means, in a few words that stand below their table; asked for behind `run`.

        Their unit, what chance would score, what a short name means: 'percent; 10 classes, chance top1 10'. How many
        sets they are means of is added.
        """
        return ""

    def media(self, model: Model, sets: Sequence[EvaluationSet], samples: int) -> Iterable[Media]:
        """What there is to see of it, for a tracker; asked for behind `run`, with the embeddings that it made.

        About `samples` pictures. It may read tokens (`model.features(..., need=...)`) and call `model.fusion`.
        """
        return ()


class Optimizer(Component, ABC):
    """Builds a torch optimiser."""

    kind = "optimizer"

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def groups(self, parameters: Sequence[tuple[str, nn.Parameter, float]]) -> list[dict[str, Any]]:
        """Parameter groups of (name, parameter, learning-rate factor): `lr` goes with the factor.

        Norms, biases and scales (ndim < 2) are not decayed.
        """

    @abstractmethod
    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimiser. Each group's `lr` is its peak; the schedule sets it, so `step` must read it anew."""


class Schedule(Component, ABC):
    """The factor of the learning rate at each optimiser step."""

    kind = "schedule"

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def factor(self, step: int, steps: int) -> float:
        """Factor, from 0 to 1, for optimiser step `step` (from 0) of `steps`."""


class TrackerConfig(ComponentConfig):
    """Options that every tracker has."""

    tags: tuple[str, ...] = ()
    """Words to find the run by, beside the names of its components."""
    media: Annotated[int, Field(ge=0)] = 4
    """Samples whose views, and queries whose matches, are shown as pictures; 0 sends no pictures or distributions."""
    media_every: Annotated[int, Field(gt=0)] = 200
    """Steps between pictures of training views; those of evaluations come with each evaluation."""


class Tracker(Component, ABC):
    """A place that metrics go to beside `metrics.jsonl`. Called on rank 0, in a thread of its own.

    No call waits for a network: a run that ends waits for all of them.

    Only `start`, `log` and `finish` must be there. A tracker whose `Config` is no `TrackerConfig` gets no media.
    """

    kind = "tracker"
    Config: ClassVar[type[ComponentConfig]] = TrackerConfig

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def start(self, folder: str, name: str, recipe: dict[str, Any], resume: bool) -> None:
        """Open the run of this name; `folder` is its run folder.

        Not to `resume` in a folder that has been here before: the run went back to an older checkpoint, and is a new
        one with that as its parent; `describe` has a fact `branch` then, from which `step`.
        """

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float], context: Mapping[str, str]) -> None:
        """Scalars of one step."""

    def describe(self, facts: Mapping[str, Any], tags: Sequence[str]) -> None:
        """What the run is made with (`distill_core.environment`: versions, device, git), and words to find it by.

        Called behind `start`, when a run is resumed as well.
        """

    def image(self, step: int, name: str, picture: Any, caption: str, context: Mapping[str, str]) -> None:
        """A picture: a path, a PIL image, or an array [H, W, 3] of uint8."""

    def distribution(self, step: int, name: str, values: np.ndarray, context: Mapping[str, str]) -> None:
        """Values [N], to be seen as a histogram."""

    @abstractmethod
    def finish(self) -> None:
        """Flush and close."""


@dataclass(frozen=True)
class Loaded:
    """What an initializer did: one line for the user, and the names of the objective's tensors that it loaded."""

    line: str
    names: frozenset[str]


class Initializer(Component, ABC):
    """Weights to start from: an entry of a recipe's `init`."""

    kind = "init"

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def apply(self, objective: Objective) -> Loaded:
        """Load weights into the objective. Raises `UserError`, and has loaded nothing then.

        What the teacher is not given it takes from the student afterwards.
        """
