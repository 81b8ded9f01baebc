"""Lion and Muon: which parameters they update how, against transcriptions of their papers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distill_core.contracts.slot import Context, Slot
from distill_core.outputs import Progress
from distill_core.recipe.sections import TrainConfig
from distill_core.registry import Registry

pytest.importorskip("timm")


def made(registry: Registry, **options: Any) -> Slot[Any]:
    import json

    text = json.dumps({"optimizer": options})
    return TrainConfig.model_validate_json(text, context=Context(registry)).optimizer


def parameters() -> list[tuple[str, nn.Parameter, float]]:
    torch.manual_seed(0)
    shapes = {"block.weight": (6, 4), "token_embedding.weight": (9, 4), "head.last_layer": (8, 4), "ln.weight": (4,)}
    return [(name, nn.Parameter(torch.randn(shape)), 1.0) for name, shape in shapes.items()]


def test_lion(registry: Registry) -> None:
    """Algorithm 2 of arXiv 2302.06675, two steps; the decay of each from its schedule, and none of vectors."""
    decay = {"name": "steps", "values": [0.5, 0.0], "at": [0.5]}
    slot = made(registry, name="lion", lr=0.1, betas=[0.9, 0.99], weight_decay=decay)
    named, component = parameters(), slot.build()
    optimizer = component.build(component.groups(named))
    expected = {name: p.detach().clone() for name, p, _ in named}
    momentum = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step, rate in enumerate((0.5, 0.0)):
        component.before_step(optimizer.param_groups, Progress(step, 2))
        for name, p, _ in named:
            p.grad = torch.randn_like(p)
            update = (0.9 * momentum[name] + 0.1 * p.grad).sign()
            own = rate if p.ndim > 1 else 0.0
            expected[name] = expected[name] - 0.1 * (update + own * expected[name])
            momentum[name] = 0.99 * momentum[name] + 0.01 * p.grad
        optimizer.step()
    for name, p, _ in named:
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-5, atol=1e-6)


def test_muon(registry: Registry) -> None:
    """Matrices move along an orthogonal matrix of AdamW's size, 0.2 sqrt(max(rows, columns)) of the rate; tables,
    prototypes and vectors as by AdamW."""
    slot = made(registry, name="muon", lr=0.01, weight_decay=0.0)
    named, component = parameters(), slot.build()
    optimizer = component.build(component.groups(named))
    before = {name: p.detach().clone() for name, p, _ in named}
    for _, p, _ in named:
        p.grad = torch.randn_like(p)
    reference = [nn.Parameter(before[name].clone()) for name, _, _ in named[1:]]
    for p, (_, own, _) in zip(reference, named[1:], strict=True):
        p.grad = own.grad
    optimizer.step()
    torch.optim.AdamW(reference, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0).step()
    for p, (name, own, _) in zip(reference, named[1:], strict=True):
        torch.testing.assert_close(own.detach(), p.detach(), rtol=1e-4, atol=1e-5, msg=name)
    moved = (before["block.weight"] - named[0][1].detach()) / 0.01
    gradient = named[0][1].grad
    assert gradient is not None
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    size = 0.2 * 6**0.5
    singular = torch.linalg.svdvals(moved) / size
    assert ((singular > 0.6) & (singular < 1.3)).all(), "five Newton-Schulz steps are not exact"
    cosine = torch.nn.functional.cosine_similarity(moved.flatten(), (u @ v).flatten(), dim=0)
    assert cosine > 0.97
