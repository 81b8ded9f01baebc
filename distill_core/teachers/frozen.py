"""A teacher with towers and weights of its own, which do not change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Annotated, Any, cast

import torch
from torch import Tensor, nn

from distill_core.batch import Batch
from distill_core.contracts.raw import Raw
from distill_core.contracts.shared import MayShare, build_all, distinct
from distill_core.contracts.slot import Slot
from distill_core.contracts.teacher import Teacher, TeacherConfig, TeacherReader
from distill_core.contracts.weights import WeightLoader
from distill_core.errors import UserError, counted
from distill_core.interfaces import Augmentation, Backbone, Collator
from distill_core.objective import Objective
from distill_core.outputs import Features
from distill_core.plan import BackboneSpec, Plan, TeacherPlan, joined
from distill_core.teachers.own_views import OwnViews, own_plan, own_problems


class FrozenConfig(TeacherConfig):
    """Towers, the weights at which they stay, and views of their own where they need others."""

    backbone: Annotated[dict[str, Slot[Backbone]], MayShare()] = {}  # noqa: RUF012
    """Modality -> what encodes its views; the modalities are among the student's."""
    weights: list[Slot[WeightLoader]] = []  # noqa: RUF012
    """Its weights, applied in order, as those of a recipe."""
    augment: dict[str, Slot[Augmentation]] = {}  # noqa: RUF012
    """Modality -> views of its own, as {NAME: {name: ..., size: 336}}: another size, other means. They are
    drawn from the same random numbers as the student's, so that the same augmentation makes the same crops. Without an
    entry the teacher sees the student's views, tokenized and collated as its own backbone does."""


class Frozen(Teacher):
    """Towers with weights of their own. A run does not save them: it names them by a digest, and loads them again."""

    name = "frozen"
    Config = FrozenConfig

    def __init__(self, config: FrozenConfig, name: str, plan: TeacherPlan, student: Any) -> None:
        super().__init__(config, name, plan, student)
        modalities = {m: replace(student.plan.modalities[m], spec=plan.specs[m]) for m in plan.views}
        with torch.random.fork_rng(devices=[]):  # a student's first weights do not depend on its teachers
            torch.manual_seed(0)
            backbone = build_all(config.backbone, plan.views)
            # a student without losses, so that what loads weights into the one loads them into the other
            network = Objective(backbone, Plan(modalities))
        network.requires_grad_(False).train(False)
        self._hidden = (network,)  # no submodule: neither saved nor counted
        self._augment = {**student.augment, **{m: node.build() for m, node in config.augment.items()}}
        self._digest: str | None = None

    @classmethod
    def specs(cls, config: Any, student: Mapping[str, BackboneSpec]) -> Mapping[str, BackboneSpec]:
        """Those of its own backbones."""
        return {m: node.cls.spec(node.config) for m, node in config.backbone.items() if m in student}

    @classmethod
    def cacheable(cls, config: Any) -> bool:
        """It is."""
        return True

    @classmethod
    def problems(cls, config: Any, plan: Plan) -> Iterator[str]:
        """Modalities that there are; as many views of its own as the student has of their roles; views that its
        backbones take."""
        for option in ("backbone", "weights"):
            if not getattr(config, option):
                yield f"{cls.name!r}: give its `{option}`: it has none of the student's"
        for name in {**config.backbone, **config.augment}:
            if len(joined(name)) > 1:
                yield f"{cls.name!r}: backbone.{name}: a tower of several modalities is the student's, or a copy of it"
            elif reason := plan.unencoded(name):
                yield f"{cls.name!r}: {reason}"
            elif name not in config.backbone:
                yield f"{cls.name!r}: augment.{name}: it has no backbone for {name!r}"
            elif issubclass(config.backbone[name].cls, Raw):
                yield f"{cls.name!r}: backbone.{name}: it encodes nothing; give the teacher a tower, or leave it out"
        for name, node in config.backbone.items():
            if name not in plan.modalities:
                continue
            student, augment = plan.modalities[name], config.augment.get(name)
            own = own_plan(replace(student, spec=node.cls.spec(node.config)), augment, config.views)
            yield from (f"{cls.name!r}: {line}" for line in own_problems(name, student, own, config.views))
            yield from node.cls.view_problems(node.config, own)

    @classmethod
    def reader(
        cls, config: Any, name: str, plan: TeacherPlan, collators: Mapping[str, Collator]
    ) -> TeacherReader | None:
        """Its own views, and the student's where its backbone collates them otherwise."""
        own = {m: node.cls.collator(node.config) for m, node in config.backbone.items() if m in plan.views}
        own = {m: collate for m, collate in own.items() if m in config.augment or collate != collators[m]}
        augment = {m: node.build() for m, node in config.augment.items() if m in own}
        return OwnViews(own, augment, config.views) if own else None

    @property
    def network(self) -> Objective:
        """Its towers, in a student that has no losses."""
        return self._hidden[0]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Frozen:
        """The towers move with the module: to a device, to another dtype."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.network._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def towers(self) -> Sequence[nn.Module]:
        """Its own."""
        return distinct(self.network.backbone.values())

    def prepare(self) -> Sequence[str]:
        """Load the weights. Raises `UserError` where a part of a tower has none."""
        reports = [node.build().apply(self.network) for node in self.config.weights]
        loaded = {name for report in reports for name in report.names}
        if missing := [name for name, _ in self.network.named_parameters() if name not in loaded]:
            raise UserError(
                f"the teacher {self.id!r}: its weights hold nothing for {counted(len(missing), 'tensor')}: "
                f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
            )
        self._digest = digest_of(self.network)
        return [f"teacher {self.id}: {report.line}" for report in reports]

    def digest(self) -> str | None:
        """Of names and values of all tensors."""
        return self._digest

    def encode(self, batch: Batch, tokens_of: Mapping[str, Sequence[int]]) -> dict[str, Features]:
        """See `Teacher`. Raises RuntimeError before `prepare`."""
        if self._digest is None:
            raise RuntimeError(f"the teacher {self.id!r} has no weights yet: call prepare()")
        features = {}
        for name, module in self.network.backbone.items():
            tower = cast(Backbone, module)
            if (own := batch.teacher.get(self.id, {}).get(name)) is not None:
                views = self._augment[name].on_device(own) if name in self._augment else own
            else:
                views = batch.views[name].only(self.config.views)
            features[name] = tower(
                tower.on_device(views),
                tokens_of=tokens_of.get(name, ()),
                layers_of=self.plan.layers_of.get(name),
                attention_of=self.plan.attention_of.get(name, ()),
            )
        return features


def digest_of(module: nn.Module) -> str:
    """Of names, shapes, dtypes and values of all that a module would save."""
    digest = sha256()
    for name, tensor in sorted(module.state_dict().items()):
        value: Tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
