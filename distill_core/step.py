"""One step of training: forward, backward, optimiser and teacher."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill_core.batch import Batch
from distill_core.collapse import collapse_indicators
from distill_core.contracts.hook import Computation, Hook
from distill_core.contracts.schedule import Scheduled
from distill_core.errors import UserError
from distill_core.gradient_cache import GradientCache
from distill_core.gradients import GradientLimit, limit_gradients
from distill_core.objective import Losses, Objective
from distill_core.outputs import Outputs, Progress
from distill_core.recipe.sections import Recipe
from distill_core.run.parts import laid_out_like
from distill_core.system import distributed, sharded
from distill_core.system.transfer import Download


class _Numbers(NamedTuple):
    loss: float
    norm: float
    not_finite: int
    meet: bool
    terms: dict[str, float]
    metrics: dict[str, float]


class StepResult:
    """The numbers of a step. The host waits for the device when the first of them is read, and only then."""

    def __init__(self, losses: Losses, norm: Tensor, not_finite: Tensor, meet: Tensor, lr: float) -> None:
        self.lr = lr
        """Of the first parameter group."""
        self._names = [*losses.terms], [*losses.metrics]
        scalars = [losses.total, norm, not_finite, meet, *losses.terms.values(), *losses.metrics.values()]
        self._download = Download(torch.stack([x.detach().to(norm.device, torch.float32) for x in scalars]))

    @cached_property
    def numbers(self) -> _Numbers:
        """All of them, in one piece."""
        loss, norm, not_finite, meet, *more = self._download.tolist()
        terms, metrics = self._names
        of_terms = dict(zip(terms, more[: len(terms)], strict=True))
        of_metrics = dict(zip(metrics, more[len(terms) :], strict=True))
        return _Numbers(loss, norm, int(not_finite), bool(meet), of_terms, of_metrics)

    @property
    def loss(self) -> float:
        """The total, of this rank's samples."""
        return self.numbers.loss

    @property
    def norm(self) -> float:
        """Of all ranks' gradient."""
        return self.numbers.norm

    @property
    def not_finite(self) -> int:
        """So many steps in a row, this one the last, were not finite on some rank; they updated nothing."""
        return self.numbers.not_finite

    @property
    def meet(self) -> bool:
        """Whether some rank asks all of them to meet before the step after the next (`Lockstep`)."""
        return self.numbers.meet

    @property
    def finite(self) -> bool:
        """Whether this one was."""
        return self.not_finite == 0

    @property
    def terms(self) -> dict[str, float]:
        """The losses' terms."""
        return self.numbers.terms

    @property
    def metrics(self) -> dict[str, float]:
        """The losses' metrics."""
        return self.numbers.metrics


class TrainStep:
    """The objective's trained parameters, their optimiser and its schedule.

    A step that is not finite updates nothing, and nor does any after the last that the recipe allows in a row: so the
    host may learn of it while the next step is computed.
    """

    def __init__(self, recipe: Recipe, objective: Objective, device: torch.device) -> None:
        self.objective, self.device = objective, device
        self.bf16, limit = recipe.train.precision == "bf16", recipe.train.clip_grad
        self.limit = GradientLimit(max=Scheduled(limit)) if isinstance(limit, int | float) else limit
        self.micro_batch = recipe.train.parallel.micro_batch
        self.allowed = recipe.train.max_nonfinite if recipe.train.nonfinite == "skip" else 1
        self._named = objective.trainable(recipe.freeze, recipe.train.lr_factors, recipe.train.lr_decay)
        self.parameters = [parameter for _, parameter, _ in self._named]
        self.maker = recipe.train.optimizer.build()
        groups = self.maker.groups(self._named)
        self.optimizer = self.maker.build(
            [group | {"params": alike} for group in groups for alike in sharded.apart(group["params"])]
        )
        self.built = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        """The optimiser's groups before the first step, without their parameters: `lr` is the peak."""
        self.schedule = recipe.train.schedule
        self.hooks: dict[str, Hook] = {slot.id: slot.build() for slot in recipe.hooks}
        self.log_every, self.untrained = recipe.train.log_every, recipe.untrained_embeddings()
        self.not_finite = torch.zeros((), device=device)
        """Steps in a row that were not finite, on the device."""
        self.whole = True
        """Whether weights, optimiser and teacher are all of the same step: not where an update broke off half-way."""
        self.running = False
        """Whether a step has begun, and not returned."""

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's state by the names of its parameters, so that it fits another layout of them too.

        `state`: name -> what the optimiser holds of it; `groups`: of each group the `names` of what is in it, its
        `options`, and those with which it was `built`.
        """
        names, state = self._names_in_order(), self.optimizer.state_dict()
        groups = [
            {
                "names": [names[number] for number in group["params"]],
                "options": {key: value for key, value in group.items() if key != "params"},
                "built": built,
            }
            for group, built in zip(state["param_groups"], self.built, strict=True)
        ]
        return {"state": {names[number]: own for number, own in state["state"].items()}, "groups": groups}

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Take an `optimizer_state`; what the recipe has changed of the groups since they were built is applied."""
        group_of = {name: group for group in state["groups"] for name in group["names"]}
        names, own = self._names_in_order(), self.optimizer.state_dict()
        for group, built in zip(own["param_groups"], self.built, strict=True):
            saved = next((group_of[names[i]] for i in group["params"] if names[i] in group_of), None)
            if saved is None:  # what a stage of the run has begun to train
                continue
            changed = {key: value for key, value in built.items() if value != saved["built"].get(key)}
            group.update(saved["options"] | changed)
        parameters = {name: parameter for name, parameter, _ in self._named}
        own["state"] = {
            number: {key: laid_out_like(value, parameters[name]) for key, value in state["state"][name].items()}
            for number, name in enumerate(names)
            if name in state["state"]
        }
        self.optimizer.load_state_dict(own)

    def load_hooks(self, states: Mapping[str, Any]) -> None:
        """Take the hooks' states, by id; a hook that has none begins anew."""
        for id, hook in self.hooks.items():
            if id in states:
                hook.load_state_dict(states[id])

    def hook_states(self) -> dict[str, Any]:
        """The hooks' states, by id."""
        return {id: hook.state_dict() for id, hook in self.hooks.items()}

    def _names_in_order(self) -> list[str]:
        """Of the parameters, as the optimiser numbers them."""
        names = {id(parameter): name for name, parameter, _ in self._named}
        return [names[id(parameter)] for group in self.optimizer.param_groups for parameter in group["params"]]

    def __call__(self, batch: Batch, progress: Progress, *, meet: bool = False) -> StepResult:
        """One optimiser step, or none where a value is not finite. `meet` reaches all ranks with the result."""
        self.running = True
        factor = self.schedule.value(progress)
        for group, built in zip(self.optimizer.param_groups, self.built, strict=True):
            group["lr"] = built["lr"] * factor
        self.maker.before_step(self.optimizer.param_groups, progress)
        self.optimizer.zero_grad(set_to_none=True)
        computation, losses = self._gradients(batch, progress)
        outputs = computation.outputs
        assert outputs is not None
        norm = sharded.global_norm([p.grad for p in self.parameters if p.grad is not None], self.device)
        finite, any_meets = self._judge(losses.total.detach(), norm, meet)
        if self.limit is not None:
            limit_gradients([(name, p) for name, p, _ in self._named], norm, self.limit, progress)
        self.whole = False
        self.objective.before_optimizer(progress, finite)
        self._update(finite)
        self.objective.after_step(outputs, progress, finite, losses)
        for hook in self.hooks.values():
            hook.after_step(computation, finite)
        result = StepResult(losses, norm, self.not_finite, any_meets, self.optimizer.param_groups[0]["lr"])
        self.whole, self.running = True, False
        return result

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def _gradients(self, batch: Batch, progress: Progress) -> tuple[Computation, Losses]:
        """Forward and backward pass, by way of the recipe's hooks."""
        for hook in self.hooks.values():
            batch = hook.before_forward(batch, progress)

        cache: GradientCache | None = None

        def forward() -> tuple[Outputs, Losses]:
            nonlocal cache
            cache = None
            if self.micro_batch is not None and len(batch) > self.micro_batch:
                cache = GradientCache(self.objective, batch, progress, self.micro_batch, self._autocast)
            with self._autocast():
                outputs = self.objective.represent(batch, progress) if cache is None else cache.outputs
                losses = self.objective.losses(outputs)
            if progress.is_logged(self.log_every):
                losses.metrics |= collapse_indicators(outputs, self.untrained)
            return outputs, losses

        def backward(loss: Tensor) -> None:
            loss.backward()  # type: ignore[no-untyped-call]
            if cache is not None:
                cache.backward()
            distributed.average_gradients(self.parameters)

        def average() -> None:
            if cache is not None:
                raise UserError(
                    "hooks: one of them makes gradients by itself, which train.parallel.micro_batch does not allow"
                )
            distributed.average_gradients(self.parameters)

        computation = Computation([(name, p) for name, p, _ in self._named], progress, forward, backward, average)
        compute = computation.plain
        for hook in reversed(self.hooks.values()):
            compute = partial(hook.gradients, computation, compute)
        return computation, compute()

    def _judge(self, loss: Tensor, norm: Tensor, meet: bool) -> tuple[Tensor, Tensor]:
        """0-dim bools: whether this step may update anything, which counts it where not; whether some rank asks to
        `meet`."""
        bad = ~torch.isfinite(loss + norm)  # the norm is of all ranks, the loss is not
        bad, any_meets = distributed.any_rank_on_device(torch.stack((bad, torch.full_like(bad, meet)))).unbind()
        bad = bad | (self.not_finite >= self.allowed)
        self.not_finite = (self.not_finite + 1) * bad
        return ~bad, any_meets

    def _update(self, finite: Tensor) -> None:
        """The optimiser's step where `finite`, which the host reads only for one that cannot."""
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif finite.item():
            self.optimizer.step()
