"""One step of training: forward, backward, optimiser and teacher."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from distill_core.batch import Batch
from distill_core.contracts.optimizer import Optimizer
from distill_core.contracts.slot import Slot
from distill_core.objective import Losses, Objective
from distill_core.outputs import Progress
from distill_core.recipe.sections import Recipe
from distill_core.system import distributed


@dataclass
class StepResult:
    """The values of the losses' terms and of their total, and the norm of all ranks' gradient.

    Without `finite`, on some rank, nothing was updated.
    """

    losses: Losses
    terms: dict[str, float]
    loss: float
    norm: float
    finite: bool


class TrainStep:
    """The objective's trained parameters, their optimiser and its schedule."""

    def __init__(self, recipe: Recipe, objective: Objective, device: torch.device) -> None:
        self.objective, self.device = objective, device
        self.bf16, self.clip_grad = recipe.train.precision == "bf16", recipe.train.clip_grad
        self._named = objective.trainable(recipe.freeze, recipe.train.lr_factors)
        self.parameters = [parameter for _, parameter, _ in self._named]
        self._slot = recipe.train.optimizer
        self.optimizer = self._build(self._slot)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.schedule = recipe.train.schedule.build()
        self.whole = True
        """Whether weights, optimiser and teacher are all of the same step: not where an update broke off half-way."""

    def _build(self, slot: Slot[Optimizer]) -> torch.optim.Optimizer:
        maker = slot.build()
        optimizer: torch.optim.Optimizer = maker.build(maker.groups(self._named))
        return optimizer

    def load_state_dict(self, state: dict[str, Any], options: Mapping[str, Any]) -> None:
        """Take the optimiser's state that was made with these options; those of the recipe that differ are applied."""
        plain = {key: value for key, value in options.items() if key not in ("name", "id")}
        config = self._slot.cls.Config.model_validate_json(json.dumps(plain))  # where lists serve for tuples
        saved_groups = self._build(Slot(self._slot.cls, config)).param_groups
        groups = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        for group, old, new in zip(self.optimizer.param_groups, saved_groups, groups, strict=True):
            group.update({key: new[key] for key in new if key != "params" and new[key] != old[key]})

    def __call__(self, batch: Batch, progress: Progress) -> StepResult:
        """One optimiser step, or none where a value is not finite."""
        factor = self.schedule.factor(progress.step, progress.steps)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            outputs = self.objective.represent(batch, progress)
            losses = self.objective.losses(outputs)
        losses.total.backward()  # type: ignore[no-untyped-call]
        distributed.average_gradients(self.parameters)
        total_norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        # read in one piece: the host waits for a GPU once a step
        scalars = (losses.total, total_norm, *losses.terms.values())
        loss, norm, *numbers = torch.stack([x.detach().to(self.device, torch.float32) for x in scalars]).tolist()
        # the norm is of all ranks' gradients, the loss this rank's
        finite = not distributed.any_rank(not (math.isfinite(loss) and math.isfinite(norm)))
        if finite:
            if self.clip_grad is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad, total_norm)
            self.whole = False
            self.objective.before_step(progress)
            self.optimizer.step()
            self.objective.after_step(outputs, progress)
            self.whole = True
        return StepResult(losses, dict(zip(losses.terms, numbers, strict=True)), loss, norm, finite)
