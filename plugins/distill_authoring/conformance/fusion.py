"""Checks of fusion heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distill_authoring.conformance.inputs import BATCH, Fit, example_features, fits, on, richest
from distill_authoring.conformance.modules import (
    close,
    finite,
    generic,
    of_samples,
    require_autocast,
    require_copy,
    require_gradients,
    require_lets_draw,
    require_single,
    require_state_dict,
    require_true_gradients,
    require_units,
    require_weights,
    unmoved,
    untouched,
    weighted_sum,
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
    parts = [fused[name] for name in sorted(fused)]
    return [*(x.pooled for x in parts), *(x.tokens for x in parts if x.tokens is not None)]


def student_features(fit: Fit, **options: Any) -> dict[str, Features]:
    """The student's features, with the tokens that the fusion needs."""
    return example_features(fit.plan, fit.needs.tokens, padding=fit.padding, layers=fit.needs.layers, **options)


def ready(case: Case) -> tuple[nn.Module, dict[str, Features]]:
    """A fusion whose weights have left their initial values, and the student's features, on the richest plan."""
    fit = richest(case)
    return generic(build(case, fit)), student_features(fit)


MASK = torch.arange(6) < torch.tensor([[6], [3], [2]])
"""Of `queries_and_tokens`, [B, L]: real tokens, then padding."""


def queries_and_tokens(fit: Fit) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(modality, queries [4, B, D], tokens [B, L, W]) of each modality that is fused."""
    draw = torch.Generator().manual_seed(1)
    for name in fit.needs.student or fit.plan.modalities:
        modality = fit.plan.modalities[name]
        queries = torch.randn(4, BATCH, modality.spec.dim, generator=draw)
        yield name, queries, torch.randn(BATCH, 6, modality.spec.width, generator=draw)


@checks(KIND)
def shapes(case: Case) -> None:
    """pooled[m] is [V, B, D] (or [1, B, D]), of norm 1, for each modality; on several plans, for one sample or none."""
    for fit in fits(case):
        with on(fit):
            _shapes(case, fit)


def _shapes(case: Case, fit: Fit) -> None:
    module = build(case, fit)
    for batch in (BATCH, 1, 0):
        with of_samples(batch):
            fused = module(student_features(fit, batch=batch))
        require(
            isinstance(fused, dict) and all(isinstance(x, Fused) for x in fused.values()),
            "`forward` must return {modality: Fused(pooled)}",
        )
        for name in fit.needs.student or fit.plan.modalities:
            require(name in fused, f"`forward` returns no {name!r}; give fused views of each modality")
            expected = [len(fit.plan.modalities[name].roles), batch, fit.plan.modalities[name].spec.dim]
            shape = list(fused[name].pooled.shape)
            require(
                shape in (expected, [1, *expected[1:]]),
                f"pooled[{name!r}] is {shape}, not [V, B, D] = {expected} (nor [1, B, D], one for all views)",
            )
        for name, value in ((name, x.pooled) for name, x in fused.items()):
            norms = value.float().norm(dim=-1)
            require(finite([value]), f"pooled[{name!r}] is not finite")
            deviating = norms[(norms - 1).abs() > 1e-3]
            require(
                not len(deviating),
                f"pooled[{name!r}] is not L2-normalised: {len(deviating)} norms, as {deviating[:1].tolist()}",
            )
        for name, tokens in ((name, x.tokens) for name, x in fused.items()):
            require(
                tokens is None or (tokens.ndim == 3 and tokens.shape[0] == batch), f"tokens[{name!r}] are not [B, L, D]"
            )
        require_single(flat(fused), "an output")


@checks(KIND)
def masks(case: Case) -> None:
    """The values of padded tokens have no effect, whichever modality has padding."""
    applicable = False
    for fit in (replace(richest(case), padding="all"), *fits(case)):
        with on(fit), torch.no_grad():
            module, features = generic(build(case, fit)), student_features(fit)
            if any(f.masks for f in features.values()):
                applicable = True
                require(
                    close(flat(module(features)), flat(module(student_features(fit, fill=9.0)))),
                    "padded tokens change the result: use features[m].masks, True where a token is real (no "
                    "example may have an option that turns this off)",
                )
    if not applicable:
        raise NotApplicable("it reads no padded tokens")


@checks(KIND)
def inputs_untouched(case: Case) -> None:
    """A call does not change the features, which losses and other calls read, and seeds no global generator."""
    fit = replace(richest(case), padding="all")
    module, features = build(case, fit), student_features(fit)
    for mode in (True, False):
        module.train(mode)
        with untouched(features, "features", "`forward`"), unmoved(module, "`forward`", values=False):
            module(features)
    with torch.no_grad(), untouched(features, "features", "`forward`"):
        module(features)
    require_lets_draw(lambda: module.train()(features))


@checks(KIND)
def pool(case: Case) -> None:
    """`pool` accepts any stack of queries [V, B, D] over one modality's tokens, with or without a mask."""
    if not issubclass(case.cls, TokenPooling):
        raise NotApplicable("it has no `pool`")
    fit = richest(case)
    module = generic(build(case, fit))
    for name, four_queries, tokens in queries_and_tokens(fit):
        for queries in (four_queries[:1], four_queries):
            with untouched({"queries": queries, "tokens": tokens, "mask": MASK}, "its arguments", "`pool`"):
                results = [module.pool(name, queries, tokens, m) for m in (None, MASK)]  # type: ignore[operator]
            altered = torch.where(MASK[..., None], tokens, torch.full_like(tokens, 9.0))
            changed = module.pool(name, queries, altered, MASK)  # type: ignore[operator]
            for value in results:
                require(value.shape == queries.shape, f"`pool` returns {list(value.shape)}, not {list(queries.shape)}")
                require(finite([value]), "`pool` returns values that are not finite")
            require(close([results[1]], [changed]), "`pool` lets padded tokens (mask False) change the result")


@checks(KIND)
def attention(case: Case) -> None:
    """`attention`, if it has one: the weights [V, B, H, L] with which tokens are read, zero at padding."""
    if not issubclass(case.cls, TokenAttention):
        raise NotApplicable("it has no `attention`")
    fit = richest(case)
    module = generic(build(case, fit))
    for name, queries, tokens in queries_and_tokens(fit):
        for mask in (None, MASK):
            weights = module.attention(name, queries, tokens, mask)  # type: ignore[operator]
            if weights is not None:
                require_weights(weights.detach(), [4, BATCH, 0, 6], mask)


@checks(KIND)
def gradients(case: Case) -> None:
    """A finite gradient reaches every parameter, and the student's embeddings or tokens."""
    module, features = ready(case)
    require_gradients(module, weighted_sum(flat(module.train()(features))), "the fused views")
    inputs = [x for f in features.values() for x in (f.pooled, f.class_tokens, *f.tokens.values()) if x is not None]
    gradients_of_inputs = [x.grad for x in inputs if x.grad is not None]
    require(
        gradients_of_inputs and finite(gradients_of_inputs),
        "no finite gradient reaches the features: something detaches them",
    )


@checks(KIND)
def true_gradients(case: Case) -> None:
    """The gradient is that of finite differences, for every parameter, every embedding and the tokens it needs."""
    module, features = ready(case)
    inputs = [x for f in features.values() for x in (f.pooled, f.class_tokens, *f.tokens.values()) if x is not None]
    require_true_gradients(module, lambda m: flat(m(features)), inputs, "the features or the parameters")


@checks(KIND)
def state_dict(case: Case) -> None:
    """Its state dict holds all its state."""
    fit = richest(case)
    features = student_features(fit)
    require_state_dict(lambda: build(case, fit), lambda module: flat(module(features)))


@checks(KIND)
def copied(case: Case) -> None:
    """A deep copy computes the same and shares nothing."""
    fit = richest(case)
    features = student_features(fit)
    require_copy(build(case, fit), lambda module: flat(module(features)))


@checks(KIND)
def autocast(case: Case) -> None:
    """bf16 autocast runs forward and backward, and stays near fp32."""
    module, features = ready(case)
    require_autocast(lambda: flat(module(features)))


@checks(KIND)
def units(case: Case) -> None:
    """Each of `units` is entered by `forward` alone, is one graph, and computes the same when it is compiled."""
    module, features = ready(case)
    require_units(module, lambda: flat(module(features)))
