"""Decoders of text and the captioning loss against what the papers say, written out sample by sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import plain_decoders as plain
import pytest
import torch
from torch import Tensor

from distill_core import (
    BackboneSpec,
    Encoded,
    Features,
    Group,
    HeadPlan,
    ModalityPlan,
    Outputs,
    Plan,
    Progress,
    Views,
    Vocabulary,
)
from distill_vl.captioning import Captioning, CaptioningConfig
from distill_vl.decoders import CaptionDecoder, CaptionDecoderConfig, DecoderConfig, PrefixDecoder

START, END, SIZE = 1, 4, 9
N, P, L, WIDTH = 4, 5, 6, 12


def plan_of(*heads: tuple[str, type, Any]) -> Plan:
    vocabulary = Vocabulary(SIZE, START, END, padding=0, longest=8)
    plan = Plan(
        {
            "image": ModalityPlan(("global",), BackboneSpec(WIDTH, 7)),
            "text": ModalityPlan(("global",), BackboneSpec(8, 7, vocabulary=vocabulary, causal=True)),
        }
    )
    known = {name: HeadPlan(cls, config, cls.needs(config, plan)) for name, cls, config in heads}
    return Plan(plan.modalities, heads=known)


def options(cls: type = DecoderConfig, **more: Any) -> Any:
    return cls(width=8, layers=2, heads=2, **more)


@pytest.fixture
def seen() -> tuple[Encoded, Tensor]:
    """An image's tokens, padded, and ids."""
    torch.manual_seed(0)
    mask = torch.arange(P) < torch.tensor([[5], [3], [1], [4]])
    ids = torch.randint(0, SIZE, (N, L))
    ids[:, 0] = START
    return Encoded(torch.zeros(N, 7), torch.randn(N, P, WIDTH, dtype=torch.float64), mask), ids


def caption(decoder: Any, image: Encoded, ids: Tensor, *, parallel: bool = False) -> Tensor:
    """`caption_decoder`, written out."""
    assert image.tokens is not None
    assert image.mask is not None
    rows = []
    for tokens, real, own in zip(image.tokens, image.mask, ids, strict=True):
        table = decoder.token_embedding.weight
        x = torch.stack([(decoder.mask_token if parallel else table[i]) for i in own])
        x = x + decoder.positional_embedding[: len(own)]
        for block in decoder.blocks:
            x = plain.block(x, tokens, block, real, causal=not parallel)
        rows.append(plain.logits(x, decoder.readout))
    return torch.stack(rows)


@pytest.mark.parametrize("parallel", [False, True])
def test_the_caption_decoder(seen: tuple[Encoded, Tensor], parallel: bool) -> None:
    """Would catch cross-attention before the text's own, a lost LayerNorm, padded patches that are read, a causal mask
    in parallel prediction."""
    decoder = CaptionDecoder(options(CaptionDecoderConfig, parallel=True), plan_of()).double()
    image, ids = seen
    found = decoder({"image": image}, ids, parallel=parallel)
    torch.testing.assert_close(found, caption(decoder, image, ids, parallel=parallel), rtol=1e-9, atol=1e-9)


def test_the_prefix_decoder(seen: tuple[Encoded, Tensor]) -> None:
    """Would catch image tokens that see the text or not one another, text that sees padded patches or what follows."""
    decoder: Any = PrefixDecoder(options(), plan_of()).double()
    image, ids = seen
    assert image.tokens is not None
    assert image.mask is not None
    rows = []
    for tokens, mask, own in zip(image.tokens, image.mask, ids, strict=True):
        text = decoder.token_embedding.weight[own] + decoder.positional_embedding[:L]
        x = torch.cat([tokens @ decoder.image_map.weight.T + decoder.image_map.bias, text])
        real = [*mask.tolist(), *[True] * L]

        def sees(i: int, j: int, real: list[bool] = real) -> bool:
            return real[j] and (j < P or j <= i)

        for block in decoder.blocks:
            x = x + plain.self_attention(plain.norm(x, block.ln_1), block.attn, sees)
            x = x + plain.mlp(plain.norm(x, block.ln_2), block.mlp)
        rows.append(plain.logits(x[P:], decoder.readout))
    torch.testing.assert_close(decoder({"image": image}, ids), torch.stack(rows), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("host", [True, False], ids=["lengths of the collator", "lengths of the ids"])
@pytest.mark.parametrize("parallel", [0.0, 0.5])
def test_the_captioning_loss(seen: tuple[Encoded, Tensor], parallel: float, host: bool) -> None:
    """The mean over the tokens of all texts up to their first `end`, of which there may be more, and gradients. Would
    catch the start or the padding among the targets, a target that is off by one, a mean of the texts' means, rows
    predicted in parallel that are also predicted token by token."""
    image, ids = seen
    ids = ids.clone()
    ids[ids == END] = 5
    for row, length in enumerate((3, 6, 2, 4)):
        ids[row, length - 1 :] = END
    ids[0, 4] = 7  # after the end: padding of any kind
    config = options(CaptionDecoderConfig, parallel=True)
    plan = plan_of(("writer", CaptionDecoder, config))
    decoder = CaptionDecoder(config, plan).double()
    loss = Captioning(CaptioningConfig(head="writer", parallel=parallel), plan)
    tokens = image.tokens.clone().requires_grad_()  # type: ignore[union-attr]
    assert image.mask is not None
    group = Group(ids[None], lengths=np.array([[3, 6, 2, 4]]) if host else None)
    outputs = Outputs(
        {"text": Views([group])},
        {"image": Features(torch.zeros(1, N, 7), {0: tokens}, {0: image.mask})},
        progress=Progress(0, 1),
        heads={"writer": decoder},
    )
    terms, metrics = loss(outputs)
    (found,) = torch.autograd.grad(terms["captioning"], tokens)
    total, count, right = torch.zeros((), dtype=torch.float64), 0, 0
    again = image.tokens.clone().requires_grad_()  # type: ignore[union-attr]
    shown = Encoded(image.pooled, again, image.mask)
    one_by_one = caption(decoder, shown, ids[:, :-1])
    at_once = caption(decoder, shown, ids[:, :-1], parallel=True)
    for row, length in enumerate((3, 6, 2, 4)):
        scores = at_once[row] if row < parallel * N else one_by_one[row]
        for place in range(1, length):
            total = total + plain.surprise(scores[place - 1], int(ids[row, place]))
            right += int(scores[place - 1].argmax()) == int(ids[row, place])
            count += 1
    torch.testing.assert_close(terms["captioning"], total / count, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, torch.autograd.grad(total / count, again)[0], rtol=1e-8, atol=1e-10)
    assert float(metrics["accuracy"]) == pytest.approx(right / count)
