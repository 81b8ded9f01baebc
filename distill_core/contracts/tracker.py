"""The tracker's contract: a place that metrics go to beside metrics.jsonl."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from distill_core.contracts.component import Component, ComponentConfig

if TYPE_CHECKING:
    import numpy as np


class TrackerConfig(ComponentConfig):
    """Options of a tracker that is given media."""

    tags: tuple[str, ...] = ()
    """Words to find the run by, beside the names of its components."""
    media: Annotated[int, Field(ge=0)] = 4
    """Samples whose views, and queries whose matches, are shown as pictures; 0 sends no pictures or distributions."""
    media_every: Annotated[int, Field(gt=0)] = 200
    """Steps between pictures of training views; those of evaluations come with each evaluation."""


class Tracker(Component, ABC):
    """A place that metrics go to beside `metrics.jsonl`. Called on rank 0, in a thread of its own.

    No call waits for a network: a run that ends waits for all of them.

    Only `start`, `log` and `finish` must be there. A tracker whose `Config` extends `TrackerConfig` gets media too.
    """

    kind = "tracker"

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
        """What the run is made with (`distill_core.run.environment`: versions, device, git), and words to find it by.

        Called after `start`, also when a run is resumed.
        """

    def image(self, step: int, name: str, picture: Any, caption: str, context: Mapping[str, str]) -> None:
        """A picture: a path, a PIL image, or an array [H, W, 3] of uint8."""

    def distribution(self, step: int, name: str, values: np.ndarray, context: Mapping[str, str]) -> None:
        """Values [N], to be seen as a histogram."""

    @abstractmethod
    def finish(self) -> None:
        """Flush and close."""
