"""The teacher: an exponential moving average of the student."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.contracts.component import ComponentConfig
from distill_core.outputs import Progress


class TeacherConfig(ComponentConfig):
    """The teacher: an exponential moving average of the student's backbones (and of losses' `teacher_modules`)."""

    momentum: Annotated[float, Field(ge=0, le=1)] = 0.999
    """teacher = momentum * teacher + (1 - momentum) * student, each step."""
    momentum_end: Annotated[float, Field(ge=0, le=1)] | None = None
    """Move the momentum to this value along a cosine over the run; null keeps it fixed."""
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
        start, end = self.config.momentum, self.config.momentum_end
        if end is None:
            return start
        return end - (end - start) * (math.cos(math.pi * progress.fraction) + 1) / 2

    @torch.no_grad()
    def move(self, progress: Progress) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student over parameters; buffers are the student's."""
        own: list[Tensor] = []
        students: list[Tensor] = []
        for copied, module in self._pairs():
            own += list(copied.parameters())
            students += [p.detach().to(q.dtype) for p, q in zip(module.parameters(), copied.parameters(), strict=True)]
        torch._foreach_lerp_(own, students, 1 - self.momentum(progress))
        for copied, module in self._pairs():
            for copied_tensor, theirs in zip(copied.buffers(), module.buffers(), strict=True):
                copied_tensor.copy_(theirs)

    @torch.no_grad()
    def start_from_student(self, keep: Collection[str]) -> None:
        """Make every tensor the student's, but those named in `keep` (paths below `teacher.`): weights given to it."""
        inside = {id(module): name for name, module in self.named_modules()}
        for copied, module in self._pairs():
            state = module.state_dict()
            for name, copied_tensor in copied.state_dict().items():
                if f"{inside[id(copied)]}.{name}" not in keep:
                    copied_tensor.copy_(state[name])

    def _pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """(own module, the student's)."""
        return zip([*self.backbone.values(), *self.heads.values()], self._students, strict=True)


def _frozen_copy(module: nn.Module) -> nn.Module:
    copied = copy.deepcopy(module)
    for parameter in copied.parameters():
        # a half-precision average with momentum .999 would never move
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(False)
    return copied
