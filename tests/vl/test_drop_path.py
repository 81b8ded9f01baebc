"""Stochastic depth and initialisation of the ViT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from distill_core.batch import Group, Views
from distill_core.contracts.schedule import Ramp, Scheduled
from distill_core.outputs import Progress
from distill_vl.transformer import Sequences, Transformer
from distill_vl.vit import VisionTransformer, VisionTransformerConfig

TINY: dict[str, Any] = {"image_size": 16, "patch": 4, "width": 24, "layers": 3, "heads": 3, "dim": 10}


def test_a_sequence_takes_whole_branches_or_none() -> None:
    """Against a loop over sequences and blocks. Catches factors of other tokens, other odds by depth, and a branch that
    is not scaled up; packed lengths as well as rows that are read alone."""
    torch.manual_seed(0)
    transformer = Transformer(16, 3, 2, 2.0)
    transformer.drop_path = 0.5
    shapes = [(4, 5), (3, 2)]
    inputs = [torch.randn(n, length, 16) for n, length in shapes]
    positions = [None, torch.zeros(3, 1, dtype=torch.long)]
    torch.manual_seed(1)
    outs, _ = transformer.together(inputs, positions)
    torch.manual_seed(1)
    kept = torch.rand(3, 7, 2)  # by length: the three short sequences come first
    order = [(1, i) for i in range(3)] + [(0, i) for i in range(4)]
    for number, (group, i) in enumerate(order):
        x = inputs[group][i]
        for block, rate, row in zip(transformer.resblocks, (0.0, 0.25, 0.5), kept[:, number], strict=True):
            of_attention, of_mlp = (float(u >= rate) / (1 - rate) for u in row)
            alone = Sequences.of((1, len(x)))
            x = x + of_attention * block.attn(x, alone, norm=block.ln_1)  # type: ignore[operator]
            x = x + of_mlp * block.mlp(block.ln_2(x))  # type: ignore[operator]
        expected = x if positions[group] is None else x[:1]
        torch.testing.assert_close(outs[group][i], expected, rtol=1e-5, atol=1e-5)


def test_it_is_of_training_alone_and_follows_its_schedule() -> None:
    """Catches a teacher or an evaluation that drops, and a rate that stays at the first step's."""
    torch.manual_seed(0)
    drop = Scheduled.by(Ramp, start=0.0, end=0.4)
    tower = VisionTransformer(VisionTransformerConfig(drop_path=drop, **TINY))
    views = Views([Group(torch.randn(1, 6, 3, 16, 16), "global")])

    def pooled() -> Tensor:
        return tower(views).pooled

    plain = pooled()
    tower.before_step(Progress(0, 10))
    torch.testing.assert_close(pooled(), plain)
    tower.before_step(Progress(5, 10))
    assert tower.transformer.drop_path == pytest.approx(0.2)
    assert not torch.allclose(pooled(), plain)
    tower.eval()
    torch.testing.assert_close(pooled(), plain)
    tower.train()
    torch.manual_seed(3)
    first = pooled()
    torch.manual_seed(3)
    torch.testing.assert_close(pooled(), first, rtol=0, atol=0)
    compiled = copy.deepcopy(tower)
    for unit in compiled.units():
        unit.compile(backend="eager", fullgraph=True)
    torch.manual_seed(3)
    torch.testing.assert_close(compiled(views).pooled, first)


def test_small_start() -> None:
    """Catches biases, LayerNorms or the projection that are drawn, and matrices that are not."""
    torch.manual_seed(0)
    tower = VisionTransformer(
        VisionTransformerConfig(initialization="trunc_normal", **{**TINY, "width": 96, "heads": 4})
    )
    drawn = set()
    for name, parameter in tower.named_parameters():
        if parameter.ndim > 1 and 0.015 < parameter.std() < 0.025 and parameter.abs().max() < 2:
            drawn.add(name.split(".")[-2] if name.startswith("transformer") else name)
        if name.startswith("transformer") and parameter.ndim == 1 and "ln_" not in name:
            assert parameter.abs().max() == 0, name
        if "ln_" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
    assert drawn == {"attn", "out_proj", "c_fc", "c_proj", "positional_embedding"}
    assert 0.01 < tower.class_embedding.std() < 0.03
