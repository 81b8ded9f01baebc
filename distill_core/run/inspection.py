"""A close look at one step: the first tensor that is not finite, and what each sample adds to the loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill_core.batch import Batch
from distill_core.objective import Losses, Objective
from distill_core.outputs import Outputs
from distill_core.presence import Present
from distill_core.system.process import get_random, set_random
from distill_core.system.sharded import local


class Inspection:
    """`with Inspection(objective, batch, alone=True) as seen:` one step is made; then its attributes say what was seen.

    It changes nothing of the step. Only where the step's rank is `alone`, samples can be left out of its batch.
    """

    def __init__(self, objective: Objective, batch: Batch, *, alone: bool) -> None:
        self.objective, self.alone = objective, alone
        self.first_bad: str | None = None
        self.bad_gradients: list[str] = []
        self.contributions: list[float] = []
        self.culprits: list[int] = []
        self.no_contributions = "" if alone else "they are computed in one process only"
        self._undo: list[Callable[[], None]] = []
        for modality, views in batch.views.items():
            self._look(views, f"the batch's {modality} views")

    def __enter__(self) -> Inspection:
        for name, module in self.objective.named_modules():
            before = module.register_forward_pre_hook(self._before(name or "the objective"), with_kwargs=True)
            after = module.register_forward_hook(self._after(name or "the objective"))
            self._undo += [before.remove, after.remove]
        for name, parameter in self.objective.named_parameters():
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(self._gradient(name))  # type: ignore[no-untyped-call]
                self._undo.append(hook.remove)
        self.objective.__dict__["losses"] = self._losses(self.objective.losses)
        self._undo.append(lambda: self.objective.__dict__.pop("losses"))
        return self

    def __exit__(self, *error: object) -> None:
        for undo in self._undo:
            undo()

    def _look(self, value: Any, what: str) -> None:
        if self.first_bad is not None:
            return
        for tensor in tensors_in(value):
            if tensor.is_floating_point() and (bad := int((~torch.isfinite(tensor)).sum())):
                shape = ", ".join(map(str, tensor.shape))
                self.first_bad = f"{what}, [{shape}]: {bad} of {tensor.numel()} values"
                return

    def _before(self, name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: self._look((args, kwargs), f"what goes into {name}")

    def _after(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            self._look(output, f"what comes out of {name} ({type(module).__name__})")

        return look

    def _gradient(self, name: str) -> Callable[[Tensor], None]:
        def look(parameter: Tensor) -> None:
            if parameter.grad is not None and not bool(torch.isfinite(local(parameter.grad)).all()):
                self.bad_gradients.append(name)

        return look

    def _losses(self, compute: Callable[[Outputs], Losses]) -> Callable[[Outputs], Losses]:
        def losses(outputs: Outputs) -> Losses:
            result = compute(outputs)
            if outputs.presence is not None:
                self.no_contributions = "samples lack modalities"
            elif self.alone:
                self._leave_out(outputs, result, compute)
            return result

        return losses

    @torch.no_grad()
    def _leave_out(self, outputs: Outputs, result: Losses, compute: Callable[[Outputs], Losses]) -> None:
        """Each sample in turn; the losses' buffers and the random numbers are as before then."""
        first_bad = self.first_bad
        device = result.total.device
        random, buffers = get_random(device), [(x, x.clone()) for x in self.objective.loss.buffers()]
        total, count = result.total.item(), _count(outputs)
        try:
            for i in range(count if count > 1 else 0):
                set_random(random, device)
                without = compute(leave_out(outputs, i)).total.item()
                self.contributions.append(count * total - (count - 1) * without)
                if math.isfinite(without) and not math.isfinite(total):
                    self.culprits.append(i)
        except Exception as error:  # a loss need not take any number of samples
            self.contributions, self.culprits = [], []
            self.no_contributions = f"the losses do not take {count - 1} samples: {type(error).__name__}: {error}"
        finally:
            set_random(random, device)
            for buffer, before in buffers:
                buffer.copy_(before)
            self.first_bad = first_bad


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of a nest of dataclasses, mappings and sequences. Fields without a `repr` are no content: they point
    to what a value was cut from, and to what was cut from it, which may be itself."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in dataclasses.fields(value):
            if item.repr:
                yield from tensors_in(getattr(value, item.name))
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def _count(outputs: Outputs) -> int:
    """B."""
    return next(iter(outputs.student.values())).pooled.shape[1]


def leave_out(outputs: Outputs, i: int) -> Outputs:
    """The outputs of all samples but the i-th, where no sample lacks a modality."""
    mask = np.ones((1, _count(outputs)), dtype=np.bool_)
    mask[0, i] = False
    return outputs.of(Present(mask))
