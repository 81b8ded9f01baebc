"""The vision tower's dense embeddings: its ordinary tokens, projected, and the published attentions, transcribed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from distill_core.batch import View
from distill_core.errors import UserError
from distill_vl.example import model
from distill_vl.transformer import Sequences
from distill_vl.vit import VisionTransformer, VisionTransformerConfig


def tower(class_tokens: int = 1) -> VisionTransformer:
    torch.manual_seed(3)
    config = VisionTransformerConfig(
        image_size=16, patch=4, width=24, layers=3, heads=3, dim=20, class_tokens=class_tokens
    )
    made = VisionTransformer(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():  # biases start at zero, which would hide their absence
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("class_tokens", [1, 2])
@pytest.mark.parametrize("shape", [(16, 16), (8, 20)])
@torch.no_grad()
def test_plain_dense_embeddings_are_the_ordinary_tokens_projected(class_tokens: int, shape: tuple[int, int]) -> None:
    """Would catch another position table, a missing LayerNorm, a class token among the patches, rows for columns."""
    vit = tower(class_tokens)
    x = torch.randn(2, 3, *shape)
    features = vit.encode(x, tokens=True, token_mask=None)
    pooled, dense = vit.dense(x, attention="plain")
    assert dense.shape == (2, shape[0] // 4, shape[1] // 4, 20)
    torch.testing.assert_close(pooled, features.pooled)
    torch.testing.assert_close(dense.flatten(1, 2), features.tokens @ vit.proj)


def transcribed(vit: VisionTransformer, x: Tensor, attention: str) -> Tensor:
    """SCLIP's public `custom_attn`, head by head; value-value attention in the last block; MaskCLIP's public
    `return_qkv` branch: v + x, then the MLP."""
    *body, last = vit.transformer.resblocks
    h = vit._embed(x, None)
    for block in body:
        h = block(h.flatten(0, 1), Sequences.of((h.shape[0], h.shape[1]))).view(h.shape)
    q, k, v = linear(last.ln_1(h), last.attn.in_proj_weight, last.attn.in_proj_bias).chunk(3, -1)
    heads = []
    for head in range(3):
        a, b, c = (t[..., 8 * head : 8 * head + 8] for t in (q, k, v))
        if attention == "correlative":
            weights = (a @ a.mT * 8**-0.5).softmax(-1) + (b @ b.mT * 8**-0.5).softmax(-1)
        elif attention == "value":
            weights = torch.eye(h.shape[1])
        else:
            weights = (c @ c.mT * 8**-0.5).softmax(-1)
        heads.append(weights @ c)
    h = h + last.attn.out_proj(torch.cat(heads, -1))
    h = h + last.mlp(last.ln_2(h))
    return vit.ln_post(h) @ vit.proj


@pytest.mark.parametrize("attention", ["correlative", "value", "value_value"])
@torch.no_grad()
def test_other_attentions_are_the_published_ones(attention: str) -> None:
    vit = tower()
    x = torch.randn(2, 3, 12, 16)
    pooled, dense = vit.dense(x, attention=attention)
    expected = transcribed(vit, x, attention)
    torch.testing.assert_close(dense.flatten(1, 2), expected[:, 1:])
    torch.testing.assert_close(pooled, expected[:, 0])
    assert not torch.allclose(dense, vit.dense(x, attention="plain")[1], atol=1e-3)


def test_what_a_model_refuses() -> None:
    small = model()
    with pytest.raises(UserError, match="image: crops of 10 x 10 px are not whole patches of 4 px"):
        small.dense("image", [View(torch.zeros(3, 10, 10))])
    with pytest.raises(UserError, match="the backbone of 'text' gives no dense embeddings with 'plain' attention"):
        small.dense("text", [View("a word")])
    with pytest.raises(UserError, match="the backbone of 'image' gives no dense embeddings with 'other' attention"):
        small.dense("image", [View(torch.zeros(3, 16, 16))], attention="other")
    dense = small.dense("image", [View(torch.randn(3, 16, 8))] * 3, attention="correlative")
    torch.testing.assert_close(dense.norm(dim=-1), torch.ones(3, 4, 2))
