"""The teacher's contract: what a loss reads as `outputs.teacher[NAME]`. Built-in teachers stand in `teachers/`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn

from distill_core.batch import Batch, Sample, View
from distill_core.contracts.component import Component, ComponentConfig
from distill_core.data.order import stable_hash
from distill_core.interfaces import Collator
from distill_core.outputs import Features, Progress
from distill_core.plan import BackboneSpec, TeacherPlan

if TYPE_CHECKING:
    import numpy as np


class TeacherConfig(ComponentConfig):
    """Options that every teacher has."""

    views: tuple[str, ...] = ("global",)
    """Roles of the views that the teacher encodes."""
    modalities: tuple[str, ...] | None = None
    """Modalities with a teacher; null means all that it can encode."""
    cache: str | None = None
    """Folder of its features, which `distill teach RECIPE` writes and a run then reads in place of encoding; for
    teachers that do not change (`frozen`)."""


@dataclass(frozen=True, slots=True)
class Visit:
    """One time that a sample comes: all that its views depend on but the sample and the augmentation's options."""

    seed: int
    epoch: int
    key: str
    repeat: tuple[int, ...] = ()
    """Tells apart the times that a key comes in one pass."""
    position: int = 0
    """The place in the run's order for which it is read."""

    @property
    def seed_of_sample(self) -> int:
        """For what collators draw; a number that tells this visit from all others."""
        return stable_hash(self.seed, self.epoch, self.key, *self.repeat)

    def generator(self, modality: str) -> np.random.Generator:
        """That of the views of one modality."""
        import numpy as np

        return np.random.default_rng(stable_hash(self.seed, self.epoch, self.key, modality, *self.repeat))


class TeacherReader(Protocol):
    """In the loader's workers: what a teacher takes of each sample in place of the student's views. Picklable."""

    @property
    def collators(self) -> Mapping[str, Collator]:
        """How a batch of what is returned is collated, by modality."""
        ...

    def __call__(self, sample: Sample, views: Mapping[str, list[View]], visit: Visit) -> dict[str, list[View]]:
        """Modality -> what the teacher takes of a sample; `views` are the student's. The same for the same arguments.

        Raises `BadSample` for a sample that lacks it, and `DataError` for what must end the run."""
        ...


class Teacher(nn.Module, Component, ABC):
    """Features that losses learn from, without gradients. What it holds is saved with the run, if registered."""

    kind: ClassVar[str] = "teacher"
    Config: ClassVar[type[ComponentConfig]] = TeacherConfig

    def __init__(self, config: Any, name: str, plan: TeacherPlan, student: nn.Module) -> None:
        """`student` is the recipe's `Objective`: its parts are at their recipe's paths, as
        `student.get_submodule("backbone.image")`."""
        super().__init__()
        self.config, self.id, self.plan = config, name, plan

    @classmethod
    def specs(cls, config: Any, student: Mapping[str, BackboneSpec]) -> Mapping[str, BackboneSpec]:
        """The modalities that it can encode, and the widths of its features. The default: the student's."""
        return student

    @classmethod
    def parts(cls, config: Any) -> tuple[str, ...] | None:
        """`TeacherPlan.parts`. The default has no copies."""
        return ()

    @classmethod
    def source(cls, config: Any) -> str | None:
        """The teacher whose copies it copies, one that stands before it; None: its copies are of the student."""
        return None

    @classmethod
    def cacheable(cls, config: Any) -> bool:
        """Whether its features are a function of the views alone, so that `distill teach` can write them down."""
        return False

    @classmethod
    def reader(
        cls, config: Any, name: str, plan: TeacherPlan, collators: Mapping[str, Collator]
    ) -> TeacherReader | None:
        """What the loader's workers read for it; None where it encodes the student's views as `collators` make them."""
        return None

    def train(self, mode: bool = True) -> Teacher:
        """Always in evaluation mode: no dropout, no batch statistics."""
        super().train(False)
        return self

    def prepare(self) -> Sequence[str]:
        """Load what comes from outside the run and is not saved with it, before the first step of each process. Returns
        lines for the user. Raises `UserError`."""
        return ()

    def digest(self) -> str | None:
        """Names what `prepare` has loaded: a run resumes only where it is the same. None: everything is saved."""
        return None

    def start(self, loaded: Collection[str]) -> None:
        """The student has the weights that it starts from; `loaded` names those of this teacher (paths below it) that
        have been loaded from elsewhere and stay."""

    @abstractmethod
    def encode(self, batch: Batch, tokens_of: Mapping[str, Sequence[int]]) -> dict[str, Features]:
        """Features of the views of its plan, numbered among themselves; tokens of those in `tokens_of`, by the same
        numbers, and their layers in `plan.layers_of`. Called without gradients, before the student's pass."""

    def towers(self) -> Sequence[nn.Module]:
        """The backbones that it runs but the student does not: what `train.parallel` works on."""
        return ()

    def copy_of(self, path: str) -> nn.Module | None:
        """Its copy of the part of the student at this path."""
        return None

    def before_optimizer(self, progress: Progress, finite: Tensor | None = None) -> None:
        """Called between the backward pass and the optimiser. Where `finite`, a 0-dim bool on the device, is False,
        nothing may change; the host does not read it."""

    def after_step(self, progress: Progress, finite: Tensor | None = None) -> None:
        """Called after the optimiser, in the order of the recipe's teachers; `finite` as above."""

    def metrics(self, progress: Progress) -> Mapping[str, float]:
        """Numbers of a step for metrics.jsonl."""
        return {}
