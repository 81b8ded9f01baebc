"""Checks of heads: of decoders, whose call is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from distill_authoring.conformance.inputs import BATCH, Fit, example_features, fits, on, richest
from distill_authoring.conformance.modules import (
    close,
    finite,
    generic,
    require_autocast,
    require_copy,
    require_gradients,
    require_state_dict,
    require_units,
    unmoved,
    untouched,
    weighted_sum,
)
from distill_authoring.conformance.suite import Case, NotApplicable, checks, require
from distill_core import Decoder, Encoded, Vocabulary

KIND = "head"
LENGTH = 4
"""Ids of each sequence: fewer than there are tokens of any modality."""


def build(case: Case, fit: Fit) -> nn.Module:
    """A decoder in evaluation mode. Raises `NotApplicable` for another head."""
    if not issubclass(case.cls, Decoder):
        raise NotApplicable("it is no decoder: only the losses that call it know how")
    module: nn.Module = case.cls(case.config, fit.plan)
    return module.eval()


def vocabulary_of(case: Case, fit: Fit) -> Vocabulary:
    """That of the side that it writes."""
    vocabulary = fit.plan.modalities[case.cls.writes(case.config)].spec.vocabulary
    assert vocabulary is not None
    return vocabulary


def encoded_for(case: Case, fit: Fit, *, fill: float | None = None) -> dict[str, Encoded]:
    """What the decoder reads; leaves. `fill` is the value of padded tokens."""
    features = example_features(fit.plan, fit.needs.tokens, padding=fit.padding, fill=fill)
    return {name: features[name].view(0) for name in case.cls.reads(case.config)}


def ids_for(case: Case, fit: Fit) -> Tensor:
    """[B, LENGTH], each after `start`."""
    vocabulary = vocabulary_of(case, fit)
    ids = torch.randint(0, vocabulary.size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = vocabulary.start
    return ids


def ready(case: Case) -> tuple[nn.Module, dict[str, Encoded], Tensor]:
    """A decoder whose weights have left their initial values, on the richest plan, with its inputs."""
    fit = richest(case)
    return generic(build(case, fit)), encoded_for(case, fit), ids_for(case, fit)


def tensors_of(encoded: Mapping[str, Encoded]) -> list[Tensor]:
    """The tokens that are read."""
    return [x.tokens for x in encoded.values() if x.tokens is not None]


@checks(KIND)
def logits(case: Case) -> None:
    """Logits [N, L, S] of the vocabulary, finite and in fp32, at `rows` the same [R, S]; on several plans."""
    for fit in fits(case):
        with on(fit), torch.no_grad():
            module, encoded, ids = build(case, fit), encoded_for(case, fit), ids_for(case, fit)
            size = vocabulary_of(case, fit).size
            whole = module(encoded, ids)
            expected = [*ids.shape, size]
            require(
                list(whole.shape) == expected, f"logits are {list(whole.shape)}, not [N, L, S] = {expected}: one an id"
            )
            require(whole.dtype == torch.float32, f"logits are {whole.dtype}: compute them in fp32 or wider")
            require(finite([whole]), "logits are not finite")
            rows = torch.tensor([1, 3, BATCH * LENGTH - 1])
            some = module(encoded, ids, rows)
            require(
                close([some], [whole.flatten(0, 1)[rows]]),
                "logits at `rows` are not those of the same places among N * L",
            )


@checks(KIND)
def looks_back(case: Case) -> None:
    """Logits depend on the ids so far, and on no id that follows, nor on how many follow."""
    module, encoded, ids = ready(case)
    with torch.no_grad():
        expected = module(encoded, ids)
        for place in range(1, LENGTH):
            changed = ids.clone()
            changed[:, place] = (ids[:, place] + 1) % expected.shape[-1]
            after = module(encoded, changed)
            require(
                close([after[:, :place]], [expected[:, :place]]),
                f"an id changes the logits of places before it: id {place} must not be seen from before",
            )
            if case.cls.writes(case.config) not in case.cls.reads(case.config):
                require(not close([after[:, place]], [expected[:, place]], 1e-6), "logits do not depend on the ids")
            require(close([module(encoded, ids[:, :place])], [expected[:, :place]]), "logits depend on the length")


@checks(KIND)
def padding(case: Case) -> None:
    """Padded tokens of what it reads have no effect."""
    fit = replace(richest(case), padding="all")
    module = generic(build(case, fit))
    others = [name for name in case.cls.reads(case.config) if name != case.cls.writes(case.config)]
    if not others:
        raise NotApplicable("it reads no padded tokens")
    ids = ids_for(case, fit)
    with torch.no_grad():
        own, filled = encoded_for(case, fit), encoded_for(case, fit, fill=9.0)
        altered = {name: filled[name] if name in others else own[name] for name in own}
        require(
            close([module(own, ids)], [module(altered, ids)]),
            "padded tokens change the logits: use encoded[m].mask, True where a token is real",
        )


@checks(KIND)
def inputs_untouched(case: Case) -> None:
    """A call changes neither its inputs nor its state."""
    module, encoded, ids = ready(case)
    with untouched({"encoded": encoded, "ids": ids}, "its arguments", "`forward`"), unmoved(module, "`forward`"):
        module(encoded, ids)


@checks(KIND)
def gradients(case: Case) -> None:
    """A finite gradient reaches what it reads, and every parameter."""
    module, encoded, ids = ready(case)
    require_gradients(module, weighted_sum([module.train()(encoded, ids)]), "the logits")
    reached = [x.grad for x in tensors_of(encoded) if x.grad is not None]
    require(len(reached) == len(encoded) and finite(reached), "no finite gradient reaches the tokens that it reads")


@checks(KIND)
def state_dict(case: Case) -> None:
    """Its state dict holds all its state."""
    _, encoded, ids = ready(case)
    require_state_dict(lambda: build(case, richest(case)), lambda module: [module(encoded, ids)])


@checks(KIND)
def copied(case: Case) -> None:
    """A deep copy computes the same and shares nothing."""
    module, encoded, ids = ready(case)
    require_copy(module, lambda copy: [copy(encoded, ids)])


@checks(KIND)
def autocast(case: Case) -> None:
    """bf16 autocast runs forward and backward, and stays near fp32."""
    module, encoded, ids = ready(case)
    require_autocast(lambda: [module(encoded, ids)])


@checks(KIND)
def units(case: Case) -> None:
    """Each of `units` is entered by `forward` alone, is one graph, and computes the same when it is compiled."""
    module, encoded, ids = ready(case)
    require_units(module, lambda: [module(encoded, ids)])
