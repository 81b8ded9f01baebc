"""How a model reads an item's tokens: cross-attention of its fusion, self-attention of its class token, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill_core import (
    ClassAttention,
    LaidOutTokens,
    Model,
    Rendered,
    TokenAttention,
    TokenLayout,
    View,
    offers,
)
from distill_core.tools import evaluating


@dataclass(frozen=True)
class ViewedItem:
    """An item, as rendered for people and as the model encodes it."""

    modality: str
    rendered: Rendered
    layout: TokenLayout | None
    pooled: Tensor
    """[D]."""
    tokens: Tensor | None
    """[L, W]."""
    mask: Tensor
    """[L], True where a token is real."""
    own: Tensor | None
    """[H, L], the class token's weights in the last block; None where the backbone does not offer `ClassAttention`."""

    @property
    def places(self) -> TokenLayout | None:
        """The positions of the tokens, if they can be drawn: words of a text, or a grid on an image."""
        fits = isinstance(self.layout, list) if isinstance(self.rendered, str) else isinstance(self.layout, tuple)
        return self.layout if fits and self.rendered is not None else None


@dataclass(frozen=True)
class Reading:
    """How the tokens of `answer` are read, by `reader` in the fusion, or by the answer's own class token (None)."""

    reader: ViewedItem | None
    answer: ViewedItem
    weights: Tensor
    """[H, L] of the real tokens; a row sums to less than 1 if other tokens (padding, a class token) get the rest."""

    @property
    def entropy(self) -> float:
        """Entropy of the weights in nats, the mean over heads."""
        return float(entropy(self.weights).mean())


def entropy(weights: Tensor) -> Tensor:
    """Of weights [..., L] in nats, each row divided by its sum: from 0 (one token) to ln L (all alike); [...]."""
    share = weights.double()
    share = share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    result: Tensor = torch.special.entr(share).sum(-1)
    return result


def see(model: Model, modality: str, views: Sequence[View]) -> list[ViewedItem]:
    """Views of one modality, one of each item, in one batch."""
    augmentation, module = model.augment[modality], model.backbone[modality]
    if not views:
        return []
    tokens_of = (0,) if module.spec(module.config).has_tokens else ()
    features = model.features(modality, [[view] for view in views], tokens_of=tokens_of)
    tokens, mask = features.tokens.get(0), features.masks.get(0)
    weights = model.class_attention(modality, views) if offers(module, ClassAttention) else None
    length = next((x.shape[-1 - i] for i, x in ((0, weights), (1, tokens)) if x is not None), 0)
    mask = torch.ones(len(views), length, dtype=torch.bool) if mask is None else mask.cpu()
    return [
        ViewedItem(
            modality,
            augmentation.render(view),
            module.token_layout(view) if offers(module, LaidOutTokens) else None,
            features.pooled[0, i].float(),
            None if tokens is None else tokens[i].float(),
            mask[i],
            None if weights is None else weights[i].float().cpu(),
        )
        for i, view in enumerate(views)
    ]


def joins(model: Model, *modalities: str) -> bool:
    """Whether the fusion reads across these; one without an option `modalities` reads across all."""
    joined = getattr(getattr(model.fusion, "config", None), "modalities", None)
    return model.fusion is not None and (joined is None or set(modalities) <= set(joined))


@torch.no_grad()
def cross(model: Model, readers: Sequence[ViewedItem], answers: Sequence[ViewedItem]) -> list[Reading]:
    """How each reader reads its answer's tokens, one by one; answers of one batch. [] where the fusion does not offer
    `TokenAttention`, or does not join the two modalities."""
    if readers and answers and not joins(model, readers[0].modality, answers[0].modality):
        return []
    tokens = [one.tokens for one in answers if one.tokens is not None]
    fusion = model.fusion
    if model.fusion is None or not answers or len(tokens) < len(answers) or not offers(fusion, TokenAttention):
        return []
    queries = torch.stack([one.pooled for one in readers])[None]  # [1, B, D]
    mask = torch.stack([one.mask for one in answers]).to(model.device)
    with evaluating(model.fusion):
        weights = fusion.attention(answers[0].modality, queries, torch.stack(tokens), mask)
    if weights is None:
        return []
    rows = weights[0].float().cpu()  # [B, H, L]
    return [Reading(a, b, row[:, b.mask]) for a, b, row in zip(readers, answers, rows, strict=True)]


def class_readings(items: Sequence[ViewedItem]) -> list[Reading]:
    """How the class token of each item reads its tokens, of those whose backbone tells."""
    return [Reading(None, item, item.own[:, item.mask]) for item in items if item.own is not None]


def readings(model: Model, items: Sequence[ViewedItem], readers: Sequence[ViewedItem] = ()) -> list[Reading]:
    """How items read one another across modalities, and each its own tokens; `readers` read, and are not read."""
    result = []
    for answer in items:
        for modality in model.modalities:
            if modality != answer.modality:
                others = [item for item in (*items, *readers) if item.modality == modality]
                result += cross(model, others, [answer] * len(others))
    return result + class_readings(items)


def principal(tokens: Tensor) -> Tensor:
    """tokens [L, W] -> their first three principal components [L, 3], each from 0 to 1; the largest value of each is
    made positive. Where there are fewer than three, the rest is zero."""  # fmt: skip
    u, s, _ = torch.linalg.svd((tokens - tokens.mean(0)).double().cpu(), full_matrices=False)
    parts = (u * s)[:, :3]
    parts = parts * parts.gather(0, parts.abs().argmax(0, keepdim=True)).sign()
    low, high = parts.aminmax(dim=0)
    scaled = (parts - low) / (high - low).clamp(min=1e-12)
    return torch.nn.functional.pad(scaled, (0, 3 - scaled.shape[1]))
