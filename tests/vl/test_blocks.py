"""Every use of a transformer's blocks passes through `Block.forward`, so that what wraps it wraps all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill_core.batch import Group, Views
from distill_core.outputs import Features
from distill_core.plan import BackboneSpec, ModalityPlan, Plan
from distill_flava.fusion import MultimodalEncoder, MultimodalEncoderConfig
from distill_vl.clip_text import ClipText, ClipTextConfig
from distill_vl.masked_text import BertText, BertTextConfig
from distill_vl.transformer import DENSE, Attention, Block, Sequences, Transformer
from distill_vl.vit import VisionTransformer, VisionTransformerConfig

TINY = {"width": 24, "layers": 3, "heads": 3, "dim": 10}
LARGE, SMALL = torch.Size((2, 3, 24, 24)), torch.Size((2, 3, 12, 12))


def vit() -> VisionTransformer:
    return VisionTransformer(VisionTransformerConfig(image_size=24, patch=4, **TINY))


def clip() -> ClipText:
    return ClipText(ClipTextConfig(context=16, vocabulary=60, **TINY))


def bert() -> BertText:
    return BertText(BertTextConfig(context=16, vocabulary=60, **TINY))


def flava() -> MultimodalEncoder:
    plans = {m: ModalityPlan(("global",), BackboneSpec(8, 24)) for m in ("image", "text")}
    return MultimodalEncoder(MultimodalEncoderConfig(layers=3, heads=3), Plan(plans, fusion=True))


def images(*sizes: torch.Size) -> Views:
    return Views([Group(torch.randn(1, *size), f"side {size[-1]}") for size in sizes])


def ids() -> Tensor:
    rows = torch.randint(1, 58, (3, 11))
    for row, end in zip(rows, (2, 10, 5), strict=True):
        row[end], row[end + 1 :] = 59, 0
    return rows


class Pass(NamedTuple):
    """One pass through a model, with a result that depends on all that it computes."""

    make: Callable[[], nn.Module]
    run: Callable[[Any], Tensor]


def dense_attention(model: Any, attention: str) -> Tensor:
    return model.dense(torch.randn(LARGE), attention=attention)[1]


def fused(model: Any) -> Tensor:
    mask = torch.arange(5) < torch.tensor([[5], [1], [3]])
    pooled = torch.zeros(1, 3, 24)
    image, text = (Features(pooled, {0: torch.randn(3, 5, 8)}, {0: mask}) for _ in range(2))
    return model({"image": image, "text": text})["text"].tokens


PASSES = {
    "dense": Pass(vit, lambda m: m(images(LARGE), tokens_of=(0,)).tokens[0]),
    "dense, class token alone": Pass(vit, lambda m: m(images(LARGE)).pooled),
    "packed": Pass(vit, lambda m: m(images(LARGE, SMALL), tokens_of=(0, 1)).tokens[1]),
    "packed, class tokens alone": Pass(vit, lambda m: m(images(LARGE, SMALL)).pooled[1]),
    "packed, both": Pass(vit, lambda m: m(images(LARGE, SMALL), tokens_of=(1,)).pooled.sum(0)),
    "causal": Pass(clip, lambda m: m.encode(ids(), tokens=True, token_mask=None).tokens),
    "causal, end alone": Pass(clip, lambda m: m.encode(ids(), tokens=False, token_mask=None).pooled),
    "causal, packed": Pass(clip, lambda m: m(Views([Group(ids()[None])]), tokens_of=(0,)).tokens[0]),
    "causal, packed, ends alone": Pass(clip, lambda m: m(Views([Group(ids()[None])])).pooled),
    "both ways, packed": Pass(bert, lambda m: m(Views([Group(ids()[None])]), tokens_of=(0,)).tokens[0]),
    "both ways, packed, starts alone": Pass(bert, lambda m: m(Views([Group(ids()[None])])).pooled),
    "fusion": Pass(flava, fused),
    **{f"attention by {name}": Pass(vit, partial(dense_attention, attention=name)) for name in DENSE},
}


@pytest.fixture(params=PASSES.values(), ids=PASSES.keys())
def case(request: pytest.FixtureRequest) -> Pass:
    chosen: Pass = request.param
    return chosen


def made(case: Pass) -> tuple[nn.Module, list[Block]]:
    torch.manual_seed(0)
    model = case.make()
    return model, [module for module in model.modules() if isinstance(module, Block)]


def run(case: Pass, model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    return case.run(model)


def test_each_block_is_called_once_a_pass(case: Pass) -> None:
    """Sharding gathers a block's weights in hooks of `forward`: a use past it would meet shards. One call, not one a
    group of inputs: each would gather them again. Its attention and its MLP are called within."""
    model, blocks = made(case)
    calls: Counter[str] = Counter()
    open_blocks: list[str] = []
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda module, args, name=f"block {i}": open_blocks.append(name))
        block.register_forward_hook(lambda module, args, out, name=f"block {i}": calls.update([open_blocks.pop()]))
        for part in (block.attn, block.attn.out_proj, block.mlp, block.ln_2):
            part.register_forward_hook(
                lambda module, args, out, name=f"block {i}": calls.update(
                    [f"{type(module).__name__} of {name}"] if open_blocks == [name] else ["outside of its block"]
                )
            )
    run(case, model)
    parts = ("Attention", "Linear", "MLP", "LayerNorm")
    assert calls == {f"{part}block {i}": 1 for i in range(3) for part in ("", *(f"{p} of " for p in parts))}


def test_what_wraps_forward_changes_every_pass(case: Pass) -> None:
    """A hook on any block, or on its attention or MLP, as an adapter's. Would catch a pass that takes the residual or
    the update from elsewhere. (Channels are rolled: a LayerNorm would undo a factor.)"""
    model, blocks = made(case)
    before = run(case, model)
    for module in (part for block in blocks for part in (block, block.attn, block.mlp)):
        handle = module.register_forward_hook(lambda module, args, out: out.roll(1, -1))
        assert not torch.allclose(run(case, model), before, atol=1e-5)
        handle.remove()
    torch.testing.assert_close(run(case, model), before)


def test_checkpointed_blocks_give_the_same_gradients(case: Pass) -> None:
    """Activation checkpointing of `forward`: each block runs once more in the backward pass, and nothing moves."""
    model, blocks = made(case)
    gradients: list[dict[str, Tensor]] = []
    runs: Counter[int] = Counter()
    for wrapped in (False, True):
        model.zero_grad()
        if wrapped:
            for i, block in enumerate(blocks):
                block.forward = partial(checkpoint, counted(block.forward, runs, i), use_reentrant=False)  # type: ignore[method-assign]
        run(case, model).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert runs == {0: 2, 1: 2, 2: 2}
    torch.testing.assert_close(gradients[1], gradients[0])


def counted(function: Callable[..., Tensor], runs: Counter[int], name: int) -> Callable[..., Tensor]:
    def call(*args: Any) -> Tensor:
        runs[name] += 1
        return function(*args)

    return call


@pytest.mark.parametrize("causal", [False, True])
def test_groups_and_starts_say_the_same(causal: bool) -> None:
    """Sequences of 5 and 3 tokens as groups and as packed rows, and rows as positions and as rows of x: the same output
    as of each sequence alone."""
    torch.manual_seed(0)
    block = Block(24, 3, 4.0).double()
    sequences = [torch.randn(n, dtype=torch.float64).expand(24, n).T.cumsum(0).sin() for n in (5, 5, 3)]
    sequences = [x + torch.randn(len(x), 24, dtype=torch.float64) for x in sequences]
    alone = [block(x, Sequences.of((1, len(x)), causal=causal)) for x in sequences]
    x, expected = torch.cat(sequences), torch.cat(alone)
    groups = Sequences.of((2, 5), (1, 3), causal=causal)
    packed = Sequences(torch.tensor([0, 5, 10, 13]), causal=causal)
    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
    for division in (groups, packed):
        close(block(x, division), expected)
    rows = torch.tensor([4, 7, 11])
    close(block(x, packed, rows), expected[rows])
    close(block(x, groups, [torch.tensor([[4], [2]]), torch.tensor([[1]])]), expected[rows])
    close(block(x, groups, [None, torch.tensor([[1]])]), expected[[*range(10), 11]])


def test_together_keeps_the_order_of_its_inputs() -> None:
    """They are sorted by length within; some whole, some at two positions, one of them twice as long as the next."""
    torch.manual_seed(0)
    stack = Transformer(24, 2, 3, 4.0).double()
    inputs = [torch.randn(n, length, 24, dtype=torch.float64) for n, length in ((2, 6), (3, 3), (1, 4), (2, 3))]
    positions = [None, torch.tensor([[0, 2], [1, 1], [2, 0]]), torch.tensor([[3, 0]]), None]
    outs, _ = stack.together(inputs, positions)
    for x, at, out in zip(inputs, positions, outs, strict=True):
        (whole,), _ = stack.together([x], [None])
        expected = whole if at is None else torch.stack([one[places] for one, places in zip(whole, at, strict=True)])
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


def test_what_sequences_refuse() -> None:
    with pytest.raises(ValueError, match=r"no attention 'other' \(there are: plain, value, value_value, correlative\)"):
        Sequences.of((2, 3), attention="other")
    for wrong in (partial(Sequences.of, (2, 3), (1, 4)), partial(Sequences.of, (2, 3), causal=True), Sequences):
        with pytest.raises(ValueError, match="'value' attention is for one group of sequences of one length"):
            wrong(attention="value")
    for shapes in ((), ((2, 3), (1, 4))):
        with pytest.raises(ValueError, match="sequences begin at `starts`"):
            Sequences(shapes=shapes)
    attention, norm, x = Attention(6, 2), nn.LayerNorm(6), torch.randn(6, 6)
    with pytest.raises(ValueError, match="one of a causal sequence"):
        attention(x, Sequences.of((2, 3), causal=True), [torch.zeros(2, 2, dtype=torch.long)], norm=norm)
    with pytest.raises(ValueError, match="few rows are read by plain attention"):
        attention(x, Sequences.of((2, 3), attention="value"), [torch.zeros(2, 1, dtype=torch.long)], norm=norm)
