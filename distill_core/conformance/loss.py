"""Checks of losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill_core.conformance.inputs import BATCH, PROGRESS, Fit, fits, leaves, outputs
from distill_core.conformance.modules import finite, generic, require_gradients, require_state_dict
from distill_core.conformance.suite import Case, DoesNotFit, checks, require
from distill_core.types import Features, Outputs

KIND = "loss"


def first(case: Case) -> Fit:
    """The richest plan that it accepts."""
    return fits(case.cls, case.config)[0]


def call(module: Any, given: Outputs, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(terms, metrics), with what it may draw fixed."""
    torch.manual_seed(seed)
    found = module(given)
    require(
        isinstance(found, tuple) and len(found) == 2 and all(isinstance(part, dict) for part in found),
        "`forward` must return ({term: tensor}, {metric: tensor})",
    )
    return found[0], found[1]


def total(module: Any, given: Outputs) -> Tensor:
    """The sum of the terms."""
    return torch.stack([term.float() for term in call(module, given)[0].values()]).sum()


def inputs(case: Case, fit: Fit, module: Any, **options: Any) -> Outputs:
    """What a step gives this loss."""
    return outputs(fit, case.cls, case.config, module, **options)


@checks(KIND)
def terms(case: Case) -> None:
    """Terms and metrics are finite 0-dim tensors, metrics detached; on rich and bare plans, and for one sample."""
    for fit in fits(case.cls, case.config):
        module = case.cls(case.config, fit.plan)
        for batch in (BATCH, 1):
            found, metrics = call(module, inputs(case, fit, module, batch=batch))
            require(found, "`forward` gives no term")
            for what, group in (("term", found), ("metric", metrics)):
                for name, value in group.items():
                    require(
                        isinstance(value, Tensor) and value.ndim == 0, f"the {what} {name!r} must be a 0-dim tensor"
                    )
                    require(finite([value]), f"the {what} {name!r} is {float(value)} for a batch of {batch}")
            kept = [name for name, value in metrics.items() if value.requires_grad]
            require(not kept, f"the metric(s) {', '.join(kept)} hold on to the graph: .detach() them")


@checks(KIND)
def gradients(case: Case) -> None:
    """A finite gradient reaches every parameter, and what the student made."""
    fit = first(case)
    module = generic(case.cls(case.config, fit.plan)).train()
    given = inputs(case, fit, module)
    require_gradients(module, total(module, given), "the terms")
    got = [x.grad for x in leaves(given) if x.grad is not None]
    require(got and any(bool((x != 0).any()) for x in got), "no gradient reaches the student: something detaches it")
    require(finite(got), "the student's gradient is not finite")


@checks(KIND)
def purity(case: Case) -> None:
    """`forward` twice on the same outputs gives the same, and moves no state; `after_step` does."""
    fit = first(case)
    module = case.cls(case.config, fit.plan)
    given = inputs(case, fit, module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    one, other = (call(module, given)[0] for _ in range(2))
    require(one.keys() == other.keys(), "the same outputs give other terms the second time")
    changed = [name for name in one if not torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-5)]
    require(not changed, f"{', '.join(changed)} changes when `forward` is called again: keep no state in it")
    moved = [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]
    require(not moved, f"`forward` moves {', '.join(moved)}; move state in `after_step`")


@checks(KIND)
def after_step(case: Case) -> None:
    """`after_step` runs, leaves finite state, and the loss goes on from it; a state dict carries all of it."""
    fit = first(case)

    def build() -> nn.Module:
        module: nn.Module = case.cls(case.config, fit.plan)
        return module

    module: Any = build()
    given = inputs(case, fit, module)
    call(module, given)
    with torch.no_grad():
        module.after_step(given, PROGRESS)
    require(finite(x for x in module.state_dict().values() if x.is_floating_point()), "its state is not finite then")
    require(finite(call(module, inputs(case, fit, module, seed=20))[0].values()), "the next terms are not finite")

    def run(one: nn.Module) -> list[Tensor]:
        return list(call(one, inputs(case, fit, one))[0].values())

    def stepped() -> nn.Module:
        one: Any = build()
        step = inputs(case, fit, one, seed=torch.initial_seed())
        call(one, step)
        with torch.no_grad():
            one.after_step(step, PROGRESS)
        return one  # type: ignore[no-any-return]

    require_state_dict(stepped, run)


@checks(KIND)
def teacher_modules(case: Case) -> None:
    """Each name in `teacher_modules` is a module of its own with parameters."""
    if not case.cls.teacher_modules:
        raise DoesNotFit("it has no teacher_modules")
    fit = first(case)
    module = case.cls(case.config, fit.plan)
    for name in case.cls.teacher_modules:
        head: Any = getattr(module, name, None)
        require(isinstance(head, nn.Module), f"teacher_modules names {name!r}, and the loss has no module of that name")
        require(list(head.parameters()), f"teacher_modules names {name!r}, which has no parameters to average")
    require(fit.needs.teacher, "it has teacher_modules and does not need a teacher: say needs(teacher=True)")


@checks(KIND)
def masked_tokens(case: Case) -> None:
    """A batch in which no token happens to be masked gives finite terms and gradients."""
    fit = first(case)
    if not fit.needs.masked:
        raise DoesNotFit("it needs no masked views")
    module = case.cls(case.config, fit.plan)
    given = inputs(case, fit, module, hidden=False)
    value = total(module, given)
    require(finite([value]), f"the loss is {float(value)} where no token is masked: divide by at least 1")
    if value.requires_grad:
        value.backward()  # type: ignore[no-untyped-call]
        require(finite(x.grad for x in leaves(given) if x.grad is not None), "a gradient is not finite then")


def _half(given: dict[str, Features]) -> dict[str, Features]:
    return {
        name: Features(
            f.pooled.bfloat16(),
            {view: x.bfloat16() for view, x in f.tokens.items()},
            f.masks,
            f.class_tokens.bfloat16() if f.class_tokens is not None else None,
        )
        for name, f in given.items()
    }


@checks(KIND)
def autocast(case: Case) -> None:
    """bf16 features under autocast give finite terms near those of fp32, and gradients."""
    fit = first(case)
    module = generic(case.cls(case.config, fit.plan))
    given = inputs(case, fit, module)
    with torch.no_grad():
        full = float(total(module, given))
    half = inputs(case, fit, module)
    half.student, half.teacher = _half(half.student), _half(half.teacher)
    with torch.autocast("cpu", torch.bfloat16):
        value = total(module, half)
    require(finite([value]), "the loss is not finite under bf16 autocast")
    near = abs(float(value) - full) <= 0.1 * max(abs(full), 1.0)
    require(near, f"the loss is {float(value):.4g} under bf16 autocast and {full:.4g} in fp32: compute logits in fp32")
    if value.requires_grad:
        value.backward()  # type: ignore[no-untyped-call]
