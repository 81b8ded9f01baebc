"""Checks of fusion heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distill_authoring.conformance.backbone import require_near
from distill_authoring.conformance.inputs import BATCH, Fit, features, fits, on
from distill_authoring.conformance.modules import (
    close,
    finite,
    generic,
    of_samples,
    require_copy,
    require_gradients,
    require_lets_draw,
    require_single,
    require_state_dict,
    require_true_gradients,
    require_weights,
    unmoved,
    untouched,
)
from distill_authoring.conformance.suite import Case, NotApplicable, checks, require
from distill_core import Features, Fused, TokenAttention, TokenPooling

KIND = "fusion"


def build(case: Case, fit: Fit) -> nn.Module:
    """A fusion head in evaluation mode."""
    module: nn.Module = case.cls(case.config, fit.plan)
    return module.eval()


def flat(fused: dict[str, Fused]) -> list[Tensor]:
    """Every tensor of the result, in a fixed order."""
    made = [fused[name] for name in sorted(fused)]
    return [*(x.pooled for x in made), *(x.tokens for x in made if x.tokens is not None)]


def first(case: Case) -> Fit:
    """The richest plan that it accepts."""
    return fits(case.cls, case.config)[0]


def given_to(fit: Fit, **options: Any) -> dict[str, Features]:
    """The student's features, with the tokens that it needs."""
    return features(fit.plan, fit.needs.tokens, padding=fit.padding, **options)


@checks(KIND)
def shapes(case: Case) -> None:
    """pooled[m] is [V, B, D] (or [1, B, D]), of norm 1, for each modality; on several plans, for one sample or none."""
    for fit in fits(case.cls, case.config):
        with on(fit):
            _shapes(case, fit)


def _shapes(case: Case, fit: Fit) -> None:
    module = build(case, fit)
    for batch in (BATCH, 1, 0):
        with of_samples(batch):
            fused = module(given_to(fit, batch=batch))
        require(
            isinstance(fused, dict) and all(isinstance(x, Fused) for x in fused.values()),
            "`forward` must return {modality: Fused(pooled)}",
        )
        for name in fit.needs.student or fit.plan.modalities:
            require(name in fused, f"`forward` returns no {name!r}; give fused views of each modality")
            wanted = [len(fit.plan.modalities[name].roles), batch, fit.plan.modalities[name].spec.dim]
            shape = list(fused[name].pooled.shape)
            require(
                shape in (wanted, [1, *wanted[1:]]),
                f"pooled[{name!r}] is {shape}, not [V, B, D] = {wanted} (nor [1, B, D], one for all views)",
            )
        for name, value in ((name, x.pooled) for name, x in fused.items()):
            norms = value.float().norm(dim=-1)
            require(finite([value]), f"pooled[{name!r}] is not finite")
            off = norms[(norms - 1).abs() > 1e-3]
            require(not len(off), f"pooled[{name!r}] is not L2-normalised: {len(off)} norms, as {off[:1].tolist()}")
        for name, tokens in ((name, x.tokens) for name, x in fused.items()):
            require(
                tokens is None or (tokens.ndim == 3 and tokens.shape[0] == batch), f"tokens[{name!r}] are not [B, L, D]"
            )
        require_single(flat(fused), "an output")


@checks(KIND)
def masks(case: Case) -> None:
    """What stands in padded tokens changes nothing, whichever modality has padding."""
    read = False
    for fit in (replace(first(case), padding="all"), *fits(case.cls, case.config)):
        with on(fit), torch.no_grad():
            module, given = generic(build(case, fit)), given_to(fit)
            if any(f.masks for f in given.values()):
                read = True
                require(
                    close(flat(module(given)), flat(module(given_to(fit, fill=9.0)))),
                    "padded tokens change the result: use features[m].masks, True where a token is real (an option "
                    "that turns this off belongs in no example)",
                )
    if not read:
        raise NotApplicable("it reads no tokens of a modality with padding")


@checks(KIND)
def inputs_untouched(case: Case) -> None:
    """A call changes nothing of the features, which losses and other calls read, and seeds no generator."""
    fit = replace(first(case), padding="all")
    module, given = build(case, fit), given_to(fit)
    for mode in (True, False):
        module.train(mode)
        with untouched(given, "features", "`forward`"), unmoved(module, "`forward`", values=False):
            module(given)
    with torch.no_grad(), untouched(given, "features", "`forward`"):
        module(given)
    require_lets_draw(lambda: module.train()(given))


@checks(KIND)
def pool(case: Case) -> None:
    """`pool` takes any stack of queries [V, B, D] over one modality's tokens, with a mask or without."""
    if not issubclass(case.cls, TokenPooling):
        raise NotApplicable("it has no `pool`")
    fit = first(case)
    module = generic(build(case, fit))
    draw = torch.Generator().manual_seed(1)
    for name in fit.needs.student or fit.plan.modalities:
        modality = fit.plan.modalities[name]
        tokens = torch.randn(BATCH, 6, modality.spec.width, generator=draw)
        mask = torch.arange(6) < torch.tensor([[6], [3], [2]])
        for count in (1, 4):
            queries = torch.randn(count, BATCH, modality.spec.dim, generator=draw)
            with untouched({"queries": queries, "tokens": tokens, "mask": mask}, "its arguments", "`pool`"):
                found = [module.pool(name, queries, tokens, m) for m in (None, mask)]  # type: ignore[operator]
            other = torch.where(mask[..., None], tokens, torch.full_like(tokens, 9.0))
            spoilt = module.pool(name, queries, other, mask)  # type: ignore[operator]
            for value in found:
                require(value.shape == queries.shape, f"`pool` gives {list(value.shape)}, not {list(queries.shape)}")
                require(finite([value]), "`pool` gives something that is not finite")
            require(close([found[1]], [spoilt]), "`pool` lets padded tokens (mask False) change the result")


@checks(KIND)
def attention(case: Case) -> None:
    """`attention`, where it has one: weights [V, B, H, L] with which tokens are read, zero at padding."""
    if not issubclass(case.cls, TokenAttention):
        raise NotApplicable("it has no `attention`")
    fit = first(case)
    module = generic(build(case, fit))
    draw = torch.Generator().manual_seed(1)
    for name in fit.needs.student or fit.plan.modalities:
        modality = fit.plan.modalities[name]
        tokens = torch.randn(BATCH, 6, modality.spec.width, generator=draw)
        queries = torch.randn(4, BATCH, modality.spec.dim, generator=draw)
        for mask in (None, torch.arange(6) < torch.tensor([[6], [3], [2]])):
            weights = module.attention(name, queries, tokens, mask)  # type: ignore[operator]
            if weights is not None:
                require_weights(weights.detach(), [4, BATCH, 0, 6], mask)


def _scalar(fused: dict[str, Fused]) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    return torch.stack([(x.float() * torch.randn(x.shape, generator=draw)).mean() for x in flat(fused)]).sum()


@checks(KIND)
def gradients(case: Case) -> None:
    """A finite gradient reaches every parameter, and the student's embeddings or tokens."""
    fit = first(case)
    module, given = generic(build(case, fit)).train(), given_to(fit)
    scalar = _scalar(module(given))
    require_gradients(module, scalar, "the fused views")
    inputs = [x for f in given.values() for x in (f.pooled, f.class_tokens, *f.tokens.values()) if x is not None]
    got = [x.grad for x in inputs if x.grad is not None]
    require(got and finite(got), "no finite gradient reaches the features: something detaches them")


@checks(KIND)
def true_gradients(case: Case) -> None:
    """The gradient is that of finite differences, for every parameter, every embedding and the tokens it needs."""
    fit = first(case)
    module, given = generic(build(case, fit)), given_to(fit)
    inputs = [x for f in given.values() for x in (f.pooled, f.class_tokens, *f.tokens.values()) if x is not None]
    require_true_gradients(module, lambda m: flat(m(given)), inputs, "the features or the parameters")


@checks(KIND)
def state_dict(case: Case) -> None:
    """A state dict carries all its state."""
    fit = first(case)
    given = given_to(fit)
    require_state_dict(lambda: build(case, fit), lambda module: flat(module(given)))


@checks(KIND)
def copied(case: Case) -> None:
    """A deep copy computes the same and shares nothing."""
    fit = first(case)
    given = given_to(fit)
    require_copy(build(case, fit), lambda module: flat(module(given)))


@checks(KIND)
def autocast(case: Case) -> None:
    """bf16 autocast runs, forward and backward, and stays near fp32."""
    fit = first(case)
    module, given = generic(build(case, fit)), given_to(fit)
    with torch.no_grad():
        full = flat(module(given))
    with torch.autocast("cpu", torch.bfloat16):
        half = flat(module(given))
    torch.stack([x.float().mean() for x in half]).sum().backward()  # type: ignore[no-untyped-call]
    require_near(half, full)
