"""Attention weights against what the modules compute with them: read with these weights, the values give the output."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import linear

from distill_core.batch import View
from distill_core.interfaces import TowerInput
from distill_core.model import evaluating
from distill_core.plan import BackboneSpec, ModalityPlan, Plan
from distill_cosmos.fusion import CrossAttention
from distill_cosmos_variants.fusion import GatedCrossAttention
from distill_cosmos_variants.q_former import QFormer
from distill_flair.fusion import TextConditionedPool
from distill_vl.clip_text import ClipText
from distill_vl.masked_text import BertText
from distill_vl.token_fusion import CrossPooler
from distill_vl.tokenizer import ClipTokenizer
from distill_vl.transformer import Sequences, attention_weights
from distill_vl.vit import VisionTransformer

D, HEADS, LENGTH = 12, 3, 9
PLAN = Plan(
    {name: ModalityPlan(("global",), BackboneSpec(width, D)) for name, width in (("image", 10), ("text", 8))},
    fusion=True,
)


def moved(module: Any) -> Any:
    """Every parameter off where it starts."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module.eval().requires_grad_(False)


def inputs(width: int, lengths: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [V, B, D], tokens [B, L, width], mask [B, L]."""
    return torch.randn(4, 3, D), torch.randn(3, LENGTH, width), torch.arange(LENGTH) < torch.tensor(lengths)[:, None]


def read(attention: Any, weights: Tensor, values: Tensor) -> Tensor:
    """weights [V, B, H, L] and what the values are made of, [B, L, D] -> [V, B, D], through the output projection."""
    width = values.shape[-1]
    made = linear(values, attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :])
    heads = rearrange(made, "b l (h k) -> b h l k", h=weights.shape[2])
    out: Tensor = attention.out_proj(torch.einsum("vbhl,bhlk->vbhk", weights, heads).flatten(2))
    return out


@pytest.mark.parametrize("form", ["projected", "absorbed"])
@pytest.mark.parametrize("masked", [True, False])
def test_the_poolers_weights_give_its_output(form: str, masked: bool) -> None:
    """By both forms of the kernel, which makes no weights. Would catch another scale, mask, head or projection."""
    pooler = moved(CrossPooler(D, HEADS))
    queries, tokens, lengths = inputs(D, (LENGTH, 4, 0))
    mask = lengths if masked else None
    weights = pooler.weights(queries, tokens, mask)
    assert weights.shape == (4, 3, HEADS, LENGTH)
    found = queries + read(pooler.attn, weights, pooler.ln_k(tokens))
    torch.testing.assert_close(found, pooler(queries, tokens, mask, backend=form), atol=1e-5, rtol=0)
    real = torch.tensor([1.0, 1.0, 0.0 if masked else 1.0])
    torch.testing.assert_close(weights.sum(-1), real[None, :, None].expand(4, 3, HEADS))
    if masked:
        assert not weights.masked_select(~lengths[:, None]).any()


def test_weights_by_hand() -> None:
    """Two keys, K = 4: scores 2 ln 3 / sqrt(4) = ln 3 and 0, so 3/4 and 1/4; a masked key is left out."""
    q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 3, 4)
    q[..., 0], k[0, 0, 0, 0] = 2.0, torch.tensor(3.0).log()
    found = attention_weights(q, k, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(found.flatten(), torch.tensor([0.75, 0.25, 0.0]))


FUSIONS: list[tuple[Any, dict[str, Any]]] = [
    (CrossAttention, {}),
    (CrossAttention, {"mask_padding": False}),
    (GatedCrossAttention, {}),
    (QFormer, {"queries": 4, "layers": 2}),
    (TextConditionedPool, {}),
]


def make(cls: Any, options: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    return moved(cls(cls.Config.model_validate_json(json.dumps({"heads": HEADS, **options})), PLAN))


@pytest.mark.parametrize(("cls", "options"), FUSIONS)
def test_a_fusions_weights_go_with_the_tokens(cls: Any, options: dict[str, Any]) -> None:
    """Tokens in another order have their weights in that order, and a query has its own whoever asks beside it."""
    fusion = make(cls, options)
    queries, tokens, mask = inputs(8, (LENGTH, 4, 1))
    weights = fusion.attention("text", queries, tokens, mask)
    order = torch.randperm(LENGTH)
    mixed = fusion.attention("text", queries, tokens[:, order], mask[:, order])
    torch.testing.assert_close(mixed, weights[..., order], atol=1e-5, rtol=0)
    torch.testing.assert_close(fusion.attention("text", queries[1:2], tokens, mask), weights[1:2], atol=1e-5, rtol=0)
    assert not torch.allclose(weights[0], weights[1], atol=1e-3), "another query reads otherwise"
    assert bool(weights.masked_select(~mask[:, None]).any()) == (options.get("mask_padding") is False)
    assert fusion.attention("sound", queries, tokens, mask) is None, "it does not read this"
    sums = weights.sum(-1)
    if cls is TextConditionedPool:
        assert (sums < 1).all(), "the zero token has a share"
    else:
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_flairs_pool_reads_with_its_weights() -> None:
    """The zero token's value is zero, so what it takes of the weights is lost. None where nobody asks."""
    fusion = make(TextConditionedPool, {"queries": ["text"]})
    queries, tokens, mask = inputs(10, (LENGTH, 4, 1))
    assert fusion.attention("text", queries, torch.randn(3, LENGTH, 8), mask) is None
    weights, pooler = fusion.attention("image", queries, tokens, mask), fusion.pooler["image"]
    found = read(pooler.attn, weights, pooler.ln_v(fusion.token_map["image"](tokens)))
    torch.testing.assert_close(found, fusion.pool("image", queries, tokens, mask), atol=1e-5, rtol=0)


def test_the_q_formers_last_block_reads_with_its_weights() -> None:
    """Of one learned query, whose mean is itself: the last cross-attention's input and output, taken as it runs."""
    fusion = make(QFormer, {"queries": 1, "layers": 2})
    queries, tokens, _ = inputs(8, (LENGTH, LENGTH, LENGTH))
    seen: list[tuple[Tensor, Tensor]] = []
    last = fusion.former["text"].blocks[-1].cross
    last.register_forward_hook(lambda module, given, out: seen.append((given[0], out)))
    fusion.pool("text", queries, tokens)
    ((asked, out),) = seen
    values = last.ln_k(fusion.token_map["text"](tokens))
    found = asked + read(last.attn, fusion.attention("text", queries, tokens), values)
    torch.testing.assert_close(found, out, atol=1e-5, rtol=0)


TEXTS = ["a red bird by the sea", "boat", "a caf\u00e9 \u4f60\u597d of the old astrophotographer"]
TOWERS: list[tuple[Any, dict[str, Any]]] = [
    (VisionTransformer, {"image_size": 16, "patch": 4, "class_tokens": 2}),
    (ClipText, {"context": 32, "padding": "longest"}),
    (ClipText, {"context": 32}),
    (BertText, {"context": 32}),
]


@pytest.mark.parametrize(("cls", "options"), TOWERS)
def test_a_towers_embedding_is_read_with_its_weights(cls: Any, options: dict[str, Any]) -> None:
    """Sample by sample, without padding, the last block is written out from the weights on.

    Would catch weights of another block, token or mask, and a sequence that is not what `encode` reads.
    """
    torch.manual_seed(0)
    tower = moved(cls(cls.Config.model_validate({"width": 24, "layers": 2, "heads": HEADS, "dim": 8, **options})))
    vit, causal = cls is VisionTransformer, cls is ClipText
    views = [View(torch.randn(3, 16, 16)) if vit else View(text) for text in TEXTS]
    collate, body, last = (
        tower.collator(tower.config),
        tower.transformer.resblocks[:-1],
        tower.transformer.resblocks[-1],
    )
    x = collate([[view] for view in views]).groups[0].x[0]
    features, weights = tower.encode(x, tokens=True, token_mask=None), tower.class_attention(x)
    assert weights.shape == (3, HEADS, features.tokens.shape[1])
    for i, view in enumerate(views):
        layout = tower.token_layout(view)
        real = 16 if vit else len(layout)
        assert layout == (4, 4) if vit else layout[0] == "<start> "
        row = weights[i, :, :real]
        assert not weights[i, :, real:].any(), "padding has none"
        ids = collate([[view]]).groups[0].x[0]
        if causal:
            sequence = tower.token_embedding(ids) + tower.positional_embedding[: ids.shape[1]]
        else:
            sequence = tower._embed(ids, None) if vit else tower._embed(TowerInput(ids))[0]
        for block in body:
            length = sequence.shape[1]
            sequence = block(sequence[0], Sequences.of((1, length), causal=causal))[None]
        if vit:  # the class tokens' own share
            own = last.weights(sequence, torch.tensor([0]), None)[0, :, :2]
            row = torch.cat([own, row], -1)
        torch.testing.assert_close(row.sum(-1), torch.ones(HEADS))
        out = sequence[:, -1 if causal else 0] + read(last.attn, row[None, None], last.ln_1(sequence))[0]
        out = out + last.mlp(last.ln_2(out))
        pooled = tower.ln_post(out) @ tower.proj if vit else tower.ln_final(out) @ tower.text_projection
        torch.testing.assert_close(pooled, features.pooled[i : i + 1], atol=1e-4, rtol=1e-4)


def test_pieces_are_the_tokens() -> None:
    """A piece a token; characters of several tokens once; words in lower case; cut as the ids are."""
    tokenizer = ClipTokenizer(40)
    for text in [*TEXTS, "Two  WORDS\n", "\U00013000 \N{REPLACEMENT CHARACTER} <b>&amp;", ""]:
        pieces = tokenizer.pieces(text)
        assert len(pieces) == int(tokenizer([text])[0].argmax()) + 1, text
        assert (pieces[0], pieces[-1]) == ("<start> ", "<end> ")
    assert tokenizer.pieces("Astrophotographer A!") == ["<start> ", "astro", "photographer ", "a ", "! ", "<end> "]
    spelt = tokenizer.pieces("\u4f60\u597d")
    assert len(spelt) > 4
    assert "".join(spelt).replace("\N{MIDDLE DOT}", "") == "<start> \u4f60\u597d <end> "
    assert len(ClipTokenizer(5).pieces("a b c d e f")) == 5


def test_evaluating_gives_the_modes_back() -> None:
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2))
    module[0].eval()
    inside = []

    def fail() -> None:
        with evaluating(module):
            inside.extend(part.training for part in module.modules())
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert inside == [False] * 3
    assert [module.training, module[0].training, module[1].training] == [True, False, True]
