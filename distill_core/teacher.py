"""The teacher: an exponential moving average of the student."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.contracts.component import ComponentConfig
from distill_core.contracts.schedule import Scheduled
from distill_core.outputs import Progress
from distill_core.system.distributed import local


class TeacherConfig(ComponentConfig):
    """The teacher: an exponential moving average of the student's backbones (and of losses' `teacher_modules`)."""

    momentum: Scheduled[Annotated[float, Field(ge=0, le=1)]] = Scheduled(0.999)
    """teacher = momentum * teacher + (1 - momentum) * student, each step; also a schedule."""
    update: Literal["before_optimizer", "after_optimizer"] = "after_optimizer"
    """Average in the student's weights from before or after this step's optimiser update."""
    views: tuple[str, ...] = ("global",)
    """Roles of the views that the teacher encodes."""
    modalities: tuple[str, ...] | None = None
    """Modalities with a teacher; null means all."""


class Teacher(nn.Module):
    """Exponential moving average of modules of the student; no gradients."""

    def __init__(
        self, config: TeacherConfig, backbones: Mapping[str, nn.Module], heads: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = nn.ModuleDict({name: _frozen_copy(module) for name, module in backbones.items()})
        self.heads = nn.ModuleDict({name.replace(".", "/"): _frozen_copy(module) for name, module in heads.items()})
        self._students = [*backbones.values(), *heads.values()]
        super().train(False)

    def train(self, mode: bool = True) -> Teacher:
        """Always in evaluation mode: no dropout, no batch statistics."""
        return super().train(False)

    def momentum(self, progress: Progress) -> float:
        """The momentum at this step."""
        return self.config.momentum.value(progress)

    @torch.no_grad()
    def move(self, progress: Progress, finite: Tensor | None = None) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student over parameters; buffers are the student's.

        Where `finite`, a 0-dim bool on the device, is False, nothing moves; the host does not read it.
        """
        averages, students = self._tensors
        sources: list[Tensor] = [p.to(q.dtype) for p, q in zip(students, averages, strict=True)]
        _average_in(averages, sources, 1 - self.momentum(progress), finite)
        for copied, module in self._pairs():
            for copied_tensor, theirs in zip(copied.buffers(), module.buffers(), strict=True):
                copied_tensor.copy_(theirs if finite is None else torch.where(finite, theirs, copied_tensor))

    @torch.no_grad()
    def start_from_student(self, keep: Collection[str]) -> None:
        """Make every tensor the student's, but those named in `keep` (paths below `teacher.`): weights given to it."""
        inside = {id(module): name for name, module in self.named_modules()}
        for copied, module in self._pairs():
            state = module.state_dict()
            for name, copied_tensor in copied.state_dict().items():
                if f"{inside[id(copied)]}.{name}" not in keep:
                    copied_tensor.copy_(state[name])

    @cached_property
    def _tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's part of the own parameters and the student's, which are laid out alike (`parallel.py`)."""
        averages, students = [], []
        for copied, module in self._pairs():
            averages += [local(p) for p in copied.parameters()]
            students += [local(p) for p in module.parameters()]
        return averages, students

    def _pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """(own module, the student's)."""
        return zip([*self.backbone.values(), *self.heads.values()], self._students, strict=True)


def _average_in(averages: list[Tensor], sources: list[Tensor], weight: float, finite: Tensor | None) -> None:
    """average += weight * (source - average), or nothing where `finite` is False."""
    if finite is None:
        torch._foreach_lerp_(averages, sources, weight)
    elif finite.device.type == "cpu":
        weights = {x.dtype: torch.where(finite, weight, 0.0).to(x.dtype) for x in averages}
        torch._foreach_lerp_(averages, sources, [weights[x.dtype] for x in averages])
    else:  # lerp would be a launch for each tensor; on a CPU these three passes take nine times as long as its one
        differences = torch._foreach_sub(sources, averages)
        torch._foreach_mul_(differences, torch.where(finite, weight, 0.0))
        torch._foreach_add_(averages, differences)


def _frozen_copy(module: nn.Module) -> nn.Module:
    copied = copy.deepcopy(module)
    for parameter in copied.parameters():
        # a half-precision average with momentum .999 would never move
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(False)
    return copied
