"""Teachers that are copies of parts of the student: a moving average, and snapshots."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.batch import Batch, Views
from distill_core.contracts.component import ComponentConfig
from distill_core.contracts.schedule import Scheduled
from distill_core.contracts.shared import distinct
from distill_core.contracts.slot import Slot
from distill_core.contracts.teacher import Teacher, TeacherConfig, TeacherReader
from distill_core.errors import UserError
from distill_core.interfaces import Augmentation, Collator
from distill_core.model import evaluating
from distill_core.outputs import Features, Progress
from distill_core.plan import ModalityPlan, Plan, TeacherPlan
from distill_core.system.sharded import local
from distill_core.teachers.own_views import OwnViews, own_plan, own_problems

Positive = Annotated[int, Field(gt=0)]


class CopyConfig(TeacherConfig):
    """Options of a teacher that is made of the student's parts."""

    of: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Paths of the parts that it copies, as [backbone.NAME, heads.NAME, fusion, loss.ID.HEAD]; null: the towers of its
    modalities, and of the losses that name it those heads that learn from a copy (`Needs.teacher_heads`,
    `Loss.teacher_modules`). A tower that is not copied encodes as the student's own, without gradients:
    [loss.ID.HEAD] averages the head alone."""
    augment: dict[str, Slot[Augmentation]] = {}  # noqa: RUF012
    """Modality -> views of its own, as {NAME: {name: ..., size: 448}}: the student's crops at another size, since they
    are drawn from the same random numbers. Its towers are the student's, and so is the collator."""


class CopiedTeacher(Teacher):
    """Base: copies of parts of the student, at the same paths below the teacher. A rule says how they move."""

    Config: ClassVar[type[ComponentConfig]] = CopyConfig

    def __init__(self, config: Any, name: str, plan: TeacherPlan, student: nn.Module) -> None:
        super().__init__(config, name, plan, student)
        paths = config.of if config.of is not None else (*(f"backbone.{m}" for m in plan.views), *_heads(name, student))
        self._originals: dict[str, nn.Module] = {}  # no submodules: a dict hides them
        copied: dict[int, Any] = {}  # what two parts share is copied once
        self.backbone = nn.ModuleDict()
        """Its own towers, by modality."""
        for path in paths:
            self.copy_part(path, student, copied)
        self._towers = {m: student.get_submodule(f"backbone.{m}") for m in plan.views}
        self._augment: dict[str, Augmentation] = {m: node.build() for m, node in config.augment.items()}
        super().train(False)

    def original(self, path: str, student: nn.Module) -> nn.Module:
        """What the copy at a path is a copy of."""
        return student.get_submodule(path)

    def copy_part(self, path: str, student: nn.Module, copied: dict[int, Any]) -> None:
        """Have a copy of the student's part at this path, before the run starts; `copied`: the copies so far, by the
        identity of what they are of."""
        try:
            original = self.original(path, student)
        except AttributeError as error:
            raise UserError(f"the teacher {self.id!r}: of: {path!r} names no part of the student: {error}") from error
        *holders, last = path.split(".")
        holder: nn.Module = self
        for part in holders:
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = cast(nn.Module, holder._modules[part])
        holder.add_module(last, _frozen_copy(original, copied))
        self._originals[path] = original

    @classmethod
    def parts(cls, config: Any) -> tuple[str, ...] | None:
        """Those of the option `of`."""
        parts: tuple[str, ...] | None = config.of
        return parts

    @classmethod
    def reader(
        cls, config: Any, name: str, plan: TeacherPlan, collators: Mapping[str, Collator]
    ) -> TeacherReader | None:
        """Reads its own views."""
        augment = {m: node.build() for m, node in config.augment.items() if m in plan.views}
        return OwnViews({m: collators[m] for m in augment}, augment, config.views) if augment else None

    @classmethod
    def own_views(cls, config: Any, plan: Plan) -> dict[str, ModalityPlan]:
        """What its towers, which are the student's, are given in place of the student's views."""
        known = {m: node for m, node in config.augment.items() if m in plan.modalities}
        return {m: own_plan(plan.modalities[m], node, config.views) for m, node in known.items()}

    @classmethod
    def problems(cls, config: Any, plan: Plan) -> Iterator[str]:
        """Towers that there are; of its own views as many as the student has."""
        for name in config.augment:
            if reason := plan.unencoded(name):
                yield f"{cls.name!r}: augment: {reason}"
        for name, own in cls.own_views(config, plan).items():
            lines = own_problems(name, plan.modalities[name], own, config.views)
            yield from (f"{cls.name!r}: {line}" for line in lines)
        for path in config.of or ():
            kind, _, rest = path.partition(".")
            if kind == "backbone" and rest and (reason := plan.unencoded(rest.partition(".")[0])):
                yield f"{cls.name!r}: of: {path!r}: {reason}"
            elif kind == "fusion" and not plan.fusion:
                yield f"{cls.name!r}: of: {path!r}: this recipe has no fusion"
            elif kind == "heads" and rest.partition(".")[0] not in plan.heads and plan.complete:
                yield f"{cls.name!r}: of: {path!r} names no head of this recipe"
            elif kind == "fusions" and rest.partition(".")[0] not in plan.fusions:
                yield f"{cls.name!r}: of: {path!r} names no fusion of this recipe"
            elif kind not in ("backbone", "heads", "fusion", "fusions", "loss") or (kind != "fusion" and not rest):
                parts = "backbone.NAME, heads.NAME, fusion, fusions.NAME, loss.ID.HEAD"
                yield f"{cls.name!r}: of: {path!r} names no part of the student ({parts})"

    def towers(self) -> Sequence[nn.Module]:
        """Its own."""
        return distinct(self.backbone.values())

    def encode(self, batch: Batch, tokens_of: Mapping[str, Sequence[int]]) -> dict[str, Features]:
        """By its own towers; by the student's, in evaluation mode, where it has none of its own."""
        features = {}
        for name in self.plan.views:
            views, tokens = self._views(batch, name), tokens_of.get(name, ())
            layers, attention = self.plan.layers_of.get(name), self.plan.attention_of.get(name, ())
            own = name in self.backbone
            tower = self.backbone[name] if own else self._towers[name]
            with nullcontext() if own else evaluating(tower):
                features[name] = tower(views, tokens_of=tokens, layers_of=layers, attention_of=attention)
        return features

    def _views(self, batch: Batch, name: str) -> Views:
        """Those that it sees of a modality: its own, or the student's."""
        if name in self._augment:
            return self._augment[name].on_device(batch.teacher[self.id][name])
        return batch.views[name].only(self.config.views)

    def copy_of(self, path: str) -> nn.Module | None:
        """See `Teacher`."""
        try:
            return self.get_submodule(path)
        except AttributeError:
            return None

    @torch.no_grad()
    def follow(self, weight: float, finite: Tensor | None = None) -> None:
        """copy += weight * (student - copy) over parameters; buffers are the student's. For a rule to call.

        Where `finite`, a 0-dim bool on the device, is False, nothing moves; the host does not read it.
        """
        copies, students = self._tensors
        sources: list[Tensor] = [p.to(q.dtype) for p, q in zip(students, copies, strict=True)]
        _average_in(copies, sources, weight, finite)
        for copied, original in self._pairs():
            for mine, theirs in zip(copied.buffers(), original.buffers(), strict=True):
                mine.copy_(theirs if finite is None else torch.where(finite, theirs, mine))

    @torch.no_grad()
    def start(self, loaded: Collection[str]) -> None:
        """Every tensor is the student's, but those loaded into the teacher."""
        for path, original in self._originals.items():
            state = original.state_dict()
            for name, tensor in self.get_submodule(path).state_dict().items():
                if f"{path}.{name}" not in loaded:
                    tensor.copy_(state[name])

    @cached_property
    def _tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's part of the copies' parameters and the student's, which are laid out alike (`parallel.py`)."""
        pairs: dict[nn.Parameter, nn.Parameter] = {}  # what two parts share moves once
        for copied, original in self._pairs():
            pairs |= dict(zip(copied.parameters(), original.parameters(), strict=True))
        return [local(p) for p in pairs], [local(p) for p in pairs.values()]

    def _pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """(own module, the one that it is a copy of)."""
        return ((self.get_submodule(path), original) for path, original in self._originals.items())


class EmaConfig(CopyConfig):
    """An exponential moving average of the student's towers (and of losses' `teacher_modules`)."""

    momentum: Scheduled[Annotated[float, Field(ge=0, le=1)]] = Scheduled(0.999)
    """teacher = momentum * teacher + (1 - momentum) * student, each step; also a schedule."""
    update: Literal["before_optimizer", "after_optimizer"] = "after_optimizer"
    """Average in the student's weights from before or after this step's optimiser update."""


class Ema(CopiedTeacher):
    """An exponential moving average of the student (mean teacher, Tarvainen & Valpola 2017)."""

    name = "ema"
    Config = EmaConfig

    def momentum(self, progress: Progress) -> float:
        """The momentum at this step."""
        momentum: Scheduled[float] = self.config.momentum
        return momentum.value(progress)

    def move(self, progress: Progress, finite: Tensor | None = None) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student; `finite` as in `follow`."""
        self.follow(1 - self.momentum(progress), finite)

    def before_optimizer(self, progress: Progress, finite: Tensor | None = None) -> None:
        """Moves here, by option."""
        if self.config.update == "before_optimizer":
            self.move(progress, finite)

    def after_step(self, progress: Progress, finite: Tensor | None = None) -> None:
        """Moves here, by option."""
        if self.config.update == "after_optimizer":
            self.move(progress, finite)

    def metrics(self, progress: Progress) -> Mapping[str, float]:
        """The momentum."""
        return {"momentum": self.momentum(progress)}


class SnapshotConfig(CopyConfig):
    """A copy that stands still, and is renewed from time to time."""

    every: Positive
    """Steps after which the copy is renewed."""
    source: str | None = None
    """The teacher that it is a copy of, one that stands before it in the recipe; null: the student."""


class Snapshot(CopiedTeacher):
    """The student, or its average, as it was when the last multiple of `every` steps was reached; up to the first, as
    the run started.
    """

    name = "snapshot"
    Config = SnapshotConfig
    examples = ({"every": 3}, {"every": 4})

    def original(self, path: str, student: nn.Module) -> nn.Module:
        """The student's part, or the source's copy of it; of a head the source may have one for this snapshot alone."""
        if self.config.source is None:
            return super().original(path, student)
        source = student.get_submodule(f"teacher.{self.config.source}")
        if isinstance(source, CopiedTeacher) and source.copy_of(path) is None:
            source.copy_part(path, student, {})
        return source.get_submodule(path)

    @classmethod
    def source(cls, config: Any) -> str | None:
        """See `Teacher`."""
        source: str | None = config.source
        return source

    @classmethod
    def problems(cls, config: Any, plan: Plan) -> Iterator[str]:
        """A source that has copies of the same parts."""
        yield from super().problems(config, plan)
        if config.source is None:
            return
        source = plan.teachers.get(config.source)
        if source is None:
            yield f"{cls.name!r}: source: this recipe has no teacher {config.source!r}"
            return
        modalities = config.modalities or tuple(plan.modalities)
        paths = config.of or tuple(f"backbone.{m}" for m in modalities)
        for path in paths:
            if not source.copies(path) or (path.startswith("backbone.") and path.split(".")[1] not in source.views):
                yield f"{cls.name!r}: source: the teacher {config.source!r} has no copy of {path!r}"

    @torch.no_grad()
    def after_step(self, progress: Progress, finite: Tensor | None = None) -> None:
        """Renews the copy after each `every` steps; where the last of them was not finite, after as many more."""
        if (progress.step + 1) % self.config.every == 0:
            self.follow(1.0, finite)


def _heads(name: str, student: Any) -> Iterator[str]:
    """Paths of the heads of which losses read this teacher's copy."""
    of_losses = [(path, loss, loss.needs(loss.config, student.plan)) for path, loss in student.losses_with_paths()]
    yield from dict.fromkeys(f"heads.{head}" for _, _, needs in of_losses for head in needs.teacher_heads.get(name, ()))
    for path, loss, needs in of_losses:
        if loss.teacher_modules and name in needs.teacher:
            yield from (f"{path}.{head}" for head in loss.teacher_modules)


def _average_in(averages: list[Tensor], sources: list[Tensor], weight: float, finite: Tensor | None) -> None:
    """average += weight * (source - average), or nothing where `finite` is False."""
    if weight == 1.0:  # exactly
        new = (
            sources if finite is None else [torch.where(finite, *pair) for pair in zip(sources, averages, strict=True)]
        )
        torch._foreach_copy_(averages, new)
        return
    if finite is None:
        torch._foreach_lerp_(averages, sources, weight)
    elif finite.device.type == "cpu":
        weights = {x.dtype: torch.where(finite, weight, 0.0).to(x.dtype) for x in averages}
        torch._foreach_lerp_(averages, sources, [weights[x.dtype] for x in averages])
    else:  # lerp would be a launch for each tensor; on a CPU these three passes take nine times as long as its one
        differences = torch._foreach_sub(sources, averages)
        torch._foreach_mul_(differences, torch.where(finite, weight, 0.0))
        torch._foreach_add_(averages, differences)


def _frozen_copy(module: nn.Module, others: dict[int, Any]) -> nn.Module:
    """`others`: what has been copied, by identity."""
    copied = copy.deepcopy(module, others)
    for parameter in copied.parameters():
        # a half-precision average with momentum .999 would never move
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(False)
    return copied
