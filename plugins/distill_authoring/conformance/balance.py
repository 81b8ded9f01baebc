"""Checks of balances: factors, gradients, state, and equality over ranks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from distill_authoring.conformance.modules import close, finite, generic
from distill_authoring.conformance.ranks import on_two_ranks
from distill_authoring.conformance.suite import Case, checks, require
from distill_core import Outputs, Progress

LOSSES = ("first", "second", "third")


def losses_of(step: int, *, rank: int = 0) -> dict[str, Tensor]:
    """Of a step and a rank: of other sizes by loss, one of them negative."""
    draw = torch.Generator().manual_seed(100 * step + rank)
    sizes = torch.tensor([5.0, -0.3, 0.01])
    values = sizes * (0.5 + torch.rand(3, generator=draw))
    return {name: value.clone().requires_grad_() for name, value in zip(LOSSES, values, strict=True)}


def call(module: Any, losses: dict[str, Tensor], step: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(factors, penalties)."""
    result = module(losses, Outputs(progress=Progress(step, 10)))
    require(
        isinstance(result, tuple) and len(result) == 2 and all(isinstance(part, dict) for part in result),
        "`forward` must return ({loss: factor}, {loss: penalty})",
    )
    return result[0], result[1]


@checks("balance")
def factors(case: Case) -> None:
    """A finite 0-dim factor of each loss, through which no gradient goes to a loss; one loss alone is balanced too."""
    for names in (LOSSES, LOSSES[:1]):
        module: Any = generic(case.cls(case.config, names)).train()
        for step in range(3):
            losses = {name: value for name, value in losses_of(step).items() if name in names}
            own, penalties = call(module, losses, step)
            require(tuple(own) == names, f"`forward` gives factors of {', '.join(own)}; the losses: {', '.join(names)}")
            require(penalties.keys() <= own.keys(), "`forward` gives a penalty of what is no loss")
            for name, value in [*own.items(), *penalties.items()]:
                require(value.ndim == 0, f"the factor or penalty of {name!r} must be a 0-dim tensor")
                require(finite([value]), f"the factor or penalty of {name!r} is {float(value)}")
            through = [value for value in [*own.values(), *penalties.values()] if value.requires_grad]
            reached = (
                torch.autograd.grad(through, [*losses.values()], [*map(torch.ones_like, through)], allow_unused=True)
                if through
                else ()
            )
            require(all(x is None for x in reached), "a gradient goes through a factor to a loss: .detach() the losses")
            module.after_step({name: value.detach() for name, value in losses.items()}, Progress(step, 10))


@checks("balance")
def balanced(case: Case) -> None:
    """`forward` changes no state, every parameter gets a finite gradient of the total, and the state dict is all of its
    state."""
    module: Any = generic(case.cls(case.config, LOSSES))
    for step in range(3):
        losses, before = losses_of(step), copy.deepcopy(module.state_dict())
        first, penalties = call(module, losses, step)
        again, _ = call(module, losses, step)
        require(close(list(first.values()), list(again.values())), "the same losses give other factors the second time")
        moved = [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]
        require(not moved, f"`forward` changes {', '.join(moved)}; change state in `after_step`")
        parts = [first[name] * losses[name] for name in LOSSES] + [*penalties.values()]
        parameters = [p for p in module.parameters() if p.requires_grad]
        if parameters:
            gradients = torch.autograd.grad(torch.stack(parts).sum(), parameters, allow_unused=True)
            require(
                all(x is not None and finite([x]) for x in gradients),
                "no finite gradient reaches one of its parameters",
            )
        module.after_step({name: value.detach() for name, value in losses.items()}, Progress(step, 10))
    other = case.cls(case.config, LOSSES)
    other.load_state_dict(copy.deepcopy(module.state_dict()))
    one, two = ([*call(part, losses_of(3), 3)[0].values()] for part in (module, other))
    require(close(one, two), "one that takes the state dict of another gives other factors: hold all state in buffers")


@checks("balance")
def equal_ranks(case: Case) -> None:
    """On two ranks whose losses differ, factors and state stay equal."""
    torch.manual_seed(0)
    state = case.cls(case.config, LOSSES).state_dict()
    results = on_two_ranks(rank_steps, [(case.cls, case.config, state, rank) for rank in (0, 1)])
    require(
        close(results[0], results[1], 1e-6),
        "two ranks have different factors or state: take the mean over ranks (all_gather), and draw by the step",
    )


def rank_steps(cls: Any, config: Any, state: dict[str, Tensor], rank: int) -> list[Tensor]:
    """The factors and the state after each of three steps, of losses that differ by rank."""
    module = cls(config, LOSSES)
    module.load_state_dict(state)
    torch.manual_seed(rank)
    results: list[Tensor] = []
    for step in range(3):
        losses = losses_of(step, rank=rank)
        results += [value.detach() for value in call(module, losses, step)[0].values()]
        module.after_step({name: value.detach() for name, value in losses.items()}, Progress(step, 10))
        results += [value.detach().clone().float() for value in module.state_dict().values()]
    return results
