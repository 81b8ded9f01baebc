"""How the COSMOS step is computed: no repeated tokens, no loss call a view pair, bf16 autocast."""

from typing import Any

import pytest
import torch

import distill_vl.contrastive
import distill_vl.token_fusion
from distill_core.batch import Batch, Group, Views
from distill_core.objective import Objective
from distill_core.outputs import Progress
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import parse_recipe
from distill_core.registry import Registry

RECIPE = """
augment: {image: {name: multi_crop, size: 16, local_size: 8}, text: {name: text_crop}}
backbone:
  image: {name: vit, image_size: 16, patch: 4, width: 32, layers: 2, heads: 2, dim: 32}
  text: {name: clip_text, context: 12, width: 32, layers: 2, heads: 2, dim: 32}
fusion: {name: cross_attention, heads: 2}
loss: [{name: contrastive}, {name: cross_modal_distillation}]
teacher: {}
data: {source: {name: emoji}}
train: {steps: 1}
"""
B = 6


@pytest.fixture
def objective(registry: Registry) -> Objective:
    torch.manual_seed(0)
    return build_objective(parse_recipe(RECIPE, "r.yaml", registry=registry))


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 49000, (8, B, 9), generator=generator)
    ids[..., -1] = 49407
    image = Views(
        [
            Group(torch.randn(2, B, 3, 16, 16, generator=generator), "global"),
            Group(torch.randn(6, B, 3, 8, 8, generator=generator), "local"),
        ]
    )
    return Batch({"image": image, "text": Views([Group(ids[:2], "global"), Group(ids[2:], "local")])}, ["k"] * B)


def test_one_set_of_tokens_a_sample_and_two_loss_calls(
    objective: Objective, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[tuple[torch.Size, torch.Size]] = []
    calls: list[tuple[int, int]] = []
    pool, nce = distill_vl.token_fusion.cross_attention_pool, distill_vl.contrastive.multi_view_info_nce

    def counting_pool(queries: torch.Tensor, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        pools.append((queries.shape, tokens.shape))
        return pool(queries, tokens, **options)

    def counting_nce(a: torch.Tensor, b: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        calls.append((a.shape[0], b.shape[0]))
        return nce(a, b, *rest, **options)

    monkeypatch.setattr(distill_vl.token_fusion, "cross_attention_pool", counting_pool)
    monkeypatch.setattr(distill_vl.contrastive, "multi_view_info_nce", counting_nce)
    objective.losses(objective.represent(batch, Progress(0, 1)))
    assert sorted(pools) == [((8, B, 32), (B, 12, 32)), ((8, B, 32), (B, 16, 32))]
    # 2 x 8 pairs of the contrastive loss, then (8 + 8) x (2 + 2) of the distillation
    assert calls == [(2, 8), (16, 4)]


def test_tokens_only_of_the_first_global_view(objective: Objective, batch: Batch) -> None:
    outputs = objective.represent(batch, Progress(0, 1))
    assert {m: list(f.tokens) for m, f in outputs.student.items()} == {"image": [0], "text": [0]}
    assert {m: list(f.tokens) for m, f in outputs.teacher["default"].items()} == {"image": [], "text": []}
    assert outputs.student["image"].pooled.shape == (8, B, 32)
    assert outputs.teacher["default"]["text"].pooled.shape == (2, B, 32)
    assert outputs.fused
    norms = torch.cat([f.pooled.norm(dim=-1) for f in outputs.fused.values()])
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_bf16_autocast(objective: Objective, batch: Batch) -> None:
    """Catches logits or losses in bf16, and a step whose result has nothing to do with fp32's."""
    exact = objective.losses(objective.represent(batch, Progress(0, 1)))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = objective.represent(batch, Progress(0, 1))
        rough = objective.losses(outputs)
    assert outputs.student["image"].pooled.dtype == torch.bfloat16
    assert outputs.student["image"].embedding.dtype == torch.float32
    assert rough.total.dtype == torch.float32
    torch.testing.assert_close(rough.total, exact.total, rtol=2e-2, atol=0)
    rough.total.backward()
    for name, p in objective.named_parameters():
        if not name.startswith("teacher."):
            assert p.grad is not None, name
            assert p.grad.dtype == torch.float32
            assert torch.isfinite(p.grad).all(), name


def test_padding_is_masked_only_when_asked(objective: Objective, batch: Batch) -> None:
    """With the mask, what stands behind the end-of-text token cannot reach the fused image views."""
    first = batch.views["text"].groups[0]
    short = first.x.clone()
    short[..., 5] = 49407
    short[..., 6:] = 0
    other = short.clone()
    other[..., 6:] = 7
    fused = []
    for ids in (short, other):
        views = {**batch.views, "text": Views([Group(ids, "global"), batch.views["text"].groups[1]])}
        outputs = objective.represent(Batch(views, batch.keys), Progress(0, 1))
        assert outputs.fused
        fused.append(outputs.fused["image"].pooled)
    torch.testing.assert_close(fused[0], fused[1])
    objective.fusion.config = objective.fusion.config.model_copy(update={"mask_padding": False})  # type: ignore[union-attr]
    outputs = objective.represent(Batch(views, batch.keys), Progress(0, 1))
    assert outputs.fused
    assert (outputs.fused["image"].pooled - fused[1]).abs().max() > 1e-4
