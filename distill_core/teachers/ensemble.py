"""Several teachers as one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from distill_core.batch import Batch, Sample, View
from distill_core.contracts.slot import Slot
from distill_core.contracts.teacher import Teacher, TeacherConfig, TeacherReader, Visit
from distill_core.interfaces import Collator
from distill_core.outputs import Features, Progress, wide
from distill_core.plan import BackboneSpec, Plan, TeacherPlan


class EnsembleConfig(TeacherConfig):
    """The teachers that it is made of."""

    members: Annotated[dict[str, Slot[Teacher]], Field(min_length=1)]
    """Name -> a teacher. Each sees the same `views`, and the ensemble has the modalities that all of them have."""


class Ensemble(Teacher):
    """The members' normalised embeddings one after the other: the similarity of two rows is the mean of the members'.

    A loss that must tell them apart names them as teachers of their own.
    """

    name = "ensemble"
    Config = EnsembleConfig
    examples = ({"members": {"slow": {"name": "ema"}, "fast": {"name": "ema", "momentum": 0.9}}},)

    def __init__(self, config: EnsembleConfig, name: str, plan: TeacherPlan, student: Any) -> None:
        super().__init__(config, name, plan, student)
        known = {m: modality.spec for m, modality in student.plan.modalities.items()}
        self.members = nn.ModuleDict()
        for id, node in config.members.items():
            specs = node.cls.specs(node.config, known)
            own = TeacherPlan(plan.views, {m: specs[m] for m in plan.views}, node.cls.parts(node.config))
            self.members[id] = node.build(_member(name, id), own, student)

    @classmethod
    def specs(cls, config: Any, student: Mapping[str, BackboneSpec]) -> Mapping[str, BackboneSpec]:
        """The widths D are added up; tokens have none in common."""
        members = [node.cls.specs(node.config, student) for node in config.members.values()]
        common = [m for m in student if all(m in own for own in members)]
        return {m: BackboneSpec(dim, dim, has_tokens=False) for m in common if (dim := sum(x[m].dim for x in members))}

    @classmethod
    def cacheable(cls, config: Any) -> bool:
        """Where all members are."""
        return all(node.cls.cacheable(node.config) for node in config.members.values())

    @classmethod
    def problems(cls, config: Any, plan: Plan) -> Iterator[str]:
        """Members that see the same views, and have a modality in common."""
        for id, node in config.members.items():
            if node.config.views != config.views:
                yield f"{cls.name!r}: members.{id} sees the views {list(node.config.views)}, not {list(config.views)}"
            if node.config.cache is not None:
                yield f"{cls.name!r}: members.{id}: cache: give it to the ensemble, which is cached as a whole"
        if plan.modalities and not cls.specs(config, {m: modality.spec for m, modality in plan.modalities.items()}):
            yield f"{cls.name!r}: its members have no modality in common"

    @classmethod
    def reader(
        cls, config: Any, name: str, plan: TeacherPlan, collators: Mapping[str, Collator]
    ) -> TeacherReader | None:
        """The members' readers, as one."""
        readers = {}
        for id, node in config.members.items():
            if (reader := node.cls.reader(node.config, _member(name, id), plan, collators)) is not None:
                readers[id] = reader
        return MemberReaders(readers) if readers else None

    @property
    def _teachers(self) -> dict[str, Teacher]:
        return {id: member for id, member in self.members.items() if isinstance(member, Teacher)}

    def prepare(self) -> Sequence[str]:
        """Each member's."""
        return [line for member in self._teachers.values() for line in member.prepare()]

    def digest(self) -> str | None:
        """Those of the members that have one."""
        digests = {id: digest for id, member in self._teachers.items() if (digest := member.digest()) is not None}
        return " ".join(f"{id}:{digest}" for id, digest in digests.items()) or None

    def towers(self) -> Sequence[nn.Module]:
        """All members'."""
        return [tower for member in self._teachers.values() for tower in member.towers()]

    def start(self, loaded: Collection[str]) -> None:
        """Each member's."""
        for id, member in self._teachers.items():
            own = f"members.{id}."
            member.start({name.removeprefix(own) for name in loaded if name.startswith(own)})

    def encode(self, batch: Batch, tokens_of: Mapping[str, Sequence[int]]) -> dict[str, Features]:
        """[V, B, sum of D], each member's part of length 1."""
        read, parts = batch.teacher.get(self.id, {}), []
        for id, member in self._teachers.items():
            own = {key.removeprefix(f"{id}/"): x for key, x in read.items() if key.startswith(f"{id}/")}
            parts.append(member.encode(replace(batch, teacher={member.id: own}), {}))
        return {
            m: Features(torch.cat([normalize(wide(x[m].pooled), dim=-1) for x in parts], -1)) for m in self.plan.views
        }

    def before_optimizer(self, progress: Progress, finite: Tensor | None = None) -> None:
        """Each member's."""
        for member in self._teachers.values():
            member.before_optimizer(progress, finite)

    def after_step(self, progress: Progress, finite: Tensor | None = None) -> None:
        """Each member's."""
        for member in self._teachers.values():
            member.after_step(progress, finite)

    def metrics(self, progress: Progress) -> Mapping[str, float]:
        """Each member's, by its name."""
        return {f"{id}/{k}": x for id, member in self._teachers.items() for k, x in member.metrics(progress).items()}


@dataclass(frozen=True)
class MemberReaders:
    """A `TeacherReader` of several; what each reads stands under MEMBER/MODALITY."""

    readers: Mapping[str, TeacherReader]

    @property
    def collators(self) -> Mapping[str, Collator]:
        """Those of all."""
        return {f"{id}/{m}": collate for id, reader in self.readers.items() for m, collate in reader.collators.items()}

    def __call__(self, sample: Sample, views: Mapping[str, list[View]], visit: Visit) -> dict[str, list[View]]:
        """What each reads."""
        return {f"{id}/{m}": x for id, read in self.readers.items() for m, x in read(sample, views, visit).items()}


def _member(ensemble: str, id: str) -> str:
    return f"{ensemble}.{id}"
