"""The evaluation task's contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from distill_core.contracts.component import Component, ComponentConfig
from distill_core.contracts.media import Media
from distill_core.contracts.slot import Slot
from distill_core.contracts.source import DataSource
from distill_core.evaluate.score import Score

if TYPE_CHECKING:
    from distill_core.evaluate.sets import EvaluationSet
    from distill_core.model import Model


class TaskConfig(ComponentConfig):
    """Options that every task has."""

    source: Slot[DataSource] | None = None
    """Data of its own, in place of the recipe's."""


class Task(Component, ABC):
    """A task: scores a model on the sets of a split. Its `Config` extends `TaskConfig`."""

    kind = "task"
    Config: ClassVar[type[ComponentConfig]] = TaskConfig

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def reads(cls, config: Any) -> tuple[str, ...]:
        """Further splits of the same data that it asks its sets for (`EvaluationSet.of_split`), to learn from."""
        return ()

    @classmethod
    def means(cls, config: Any) -> tuple[str, ...] | None:
        """The names of the means over sets that it may give, if its options tell: a recipe whose best checkpoint is to
        be kept by another is refused at once. None: they are known when it has run."""
        return None

    @abstractmethod
    def run(self, model: Model, sets: Sequence[EvaluationSet]) -> list[Score]:
        """Scores of each set, and those over sets (`mean_over_sets`) that summaries show. Raises `DataError`.

        The model may be one that is trained: its mode and tensors stay as they are, and so do the sets' embeddings.
        """

    def note(self) -> str:
        """Caption of the table of means: unit, chance level, abbreviations. Called after `run`.

        For example 'percent; 10 classes, chance top1 10'. The sets that they are means of are added.
        """
        return ""

    def media(self, model: Model, sets: Sequence[EvaluationSet], samples: int) -> Iterable[Media]:
        """Images for a tracker, of about `samples` samples. Called after `run`, with the embeddings that it made.

        It may read tokens (`model.features(..., tokens_of=...)`) and call `model.fusion`.
        """
        return ()
