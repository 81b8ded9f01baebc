"""How a model reads an item's tokens: cross-attention of its fusion, self-attention of its class token, in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill_core.media import Shown, TokenLayout
from distill_core.model import Model, evaluating
from distill_core.types import View


@dataclass(frozen=True)
class Seen:
    """An item, as a person sees it and as the model does."""

    modality: str
    view: View
    shown: Shown
    layout: TokenLayout | None
    pooled: Tensor
    """[D]."""
    tokens: Tensor | None
    """[L, W]."""
    mask: Tensor
    """[L], True where a token is real."""

    @property
    def places(self) -> TokenLayout | None:
        """Where the tokens are, if they can be drawn there: words in a text, a grid on a picture."""
        fits = isinstance(self.layout, list) if isinstance(self.shown, str) else isinstance(self.layout, tuple)
        return self.layout if fits and self.shown is not None else None


@dataclass(frozen=True)
class Reading:
    """How the tokens of `answer` are read, by `asking` in the fusion, or by the answer's own class token (None)."""

    asking: Seen | None
    answer: Seen
    weights: Tensor
    """[H, L] of the real tokens; what a row lacks to one goes elsewhere (padding, a class token)."""

    @property
    def mean(self) -> Tensor:
        """[L], of all heads."""
        return self.weights.mean(0)

    @property
    def entropy(self) -> float:
        """In nats, the mean over heads."""
        return float(entropy(self.weights).mean())


def entropy(weights: Tensor) -> Tensor:
    """Of weights [..., L] in nats, each row divided by its sum: from 0 (one token) to ln L (all alike); [...]."""
    share = weights.double()
    share = share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.special.entr(share).sum(-1)


def see(model: Model, modality: str, items: Sequence[Any]) -> list[Seen]:
    """Items of one modality, in one batch. Raises `BadSample` for one that cannot be read."""
    augmentation, module = model.augment[modality], model.backbone[modality]
    views = [augmentation.plain(item) for item in items]
    if not views:
        return []
    need = (0,) if module.dims(module.config).has_tokens else ()
    features = model.features(modality, [[view] for view in views], need=need)
    tokens, mask = features.tokens.get(0), features.masks.get(0)
    found = []
    for i, view in enumerate(views):
        own = None if tokens is None else tokens[i].float()
        real = mask[i] if mask is not None else torch.ones(0 if own is None else len(own), dtype=torch.bool)
        layout, shown = module.token_layout(view), augmentation.show(view)
        found.append(Seen(modality, view, shown, layout, features.pooled[0, i].float(), own, real.cpu()))
    return found


@torch.no_grad()
def cross(model: Model, asking: Sequence[Seen], answer: Seen) -> list[Reading]:
    """How each of some items reads the tokens of one of another modality; [] where the fusion cannot tell."""
    if model.fusion is None or answer.tokens is None or not asking:
        return []
    queries = torch.stack([one.pooled for one in asking])[:, None]  # [V, 1, D]
    with evaluating(model.fusion):
        mask = answer.mask[None].to(model.device)
        weights = model.fusion.attention(answer.modality, queries, answer.tokens[None], mask)
    if weights is None:
        return []
    real = weights[:, 0].float().cpu()[..., answer.mask]
    return [Reading(one, answer, row) for one, row in zip(asking, real, strict=True)]


def class_readings(model: Model, seen: Sequence[Seen]) -> list[Reading]:
    """How the class token of each item of one modality reads its tokens; [] where the backbone cannot tell."""
    weights = model.class_attention(seen[0].modality, [one.view for one in seen]) if seen else None
    if weights is None:
        return []
    return [
        Reading(None, one, row[:, one.mask] if one.tokens is not None else row)
        for one, row in zip(seen, weights.float().cpu(), strict=True)
    ]


def pairs(model: Model, seen: Sequence[Seen]) -> Iterator[Reading]:
    """All cross-attention among items: each modality's items read each item of the others."""
    for answer in seen:
        for modality in model.modalities:
            if modality != answer.modality:
                yield from cross(model, [one for one in seen if one.modality == modality], answer)


def principal(tokens: Tensor) -> Tensor:
    """tokens [L, W] -> their first three principal components [L, 3], each from 0 to 1; the largest value of each is
    made positive. Where there are fewer than three, the rest is zero."""  # fmt: skip
    u, s, _ = torch.linalg.svd((tokens - tokens.mean(0)).double().cpu(), full_matrices=False)
    parts = (u * s)[:, :3]
    parts = parts * parts.gather(0, parts.abs().argmax(0, keepdim=True)).sign()
    low, high = parts.aminmax(dim=0)
    scaled = (parts - low) / (high - low).clamp(min=1e-12)
    return torch.nn.functional.pad(scaled, (0, 3 - scaled.shape[1]))


def uniform(reading: Reading) -> float:
    """ln L: the entropy of weights that are all alike."""
    return math.log(reading.weights.shape[-1])
