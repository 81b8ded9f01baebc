"""The limit of gradients (`train.clip_grad`): by the norm of all, of each part of the model, or of each parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.contracts.component import ComponentConfig
from distill_core.contracts.schedule import Scheduled
from distill_core.outputs import Progress
from distill_core.system.sharded import apart, joined


class GradientLimit(ComponentConfig):
    """The norm above which gradients are scaled down."""

    by: Literal["global", "part", "parameter"] = "global"
    """`global`: of all gradients together. `part`: of each backbone's, fusion's, head's and loss's, and the balance's.
    `parameter`: of each parameter's."""
    max: Scheduled[Annotated[float, Field(gt=0)]]
    """The L2 norm above which gradients are scaled down to it; also a schedule."""


@torch.no_grad()
def limit_gradients(
    named: Sequence[tuple[str, nn.Parameter]], norm: Tensor, limit: GradientLimit, progress: Progress
) -> None:
    """Scale the gradients in place where a norm is above `limit.max`; `norm` is that of all of them, 0-dim.

    Nothing is read by the host. What has no gradient is left out.
    """
    most = limit.max.value(progress)
    trained = [(name, p) for name, p in named if p.grad is not None]
    if limit.by == "global":
        for alike in apart(p for _, p in trained):
            torch.nn.utils.clip_grads_with_norm_(alike, most, norm)
        return
    gradients = {name: p.grad for name, p in trained if p.grad is not None}
    norms: dict[str, Tensor] = {}
    for own in apart(gradients.values()):
        own_norms = dict(zip((id(gradient) for gradient in own), torch._foreach_norm(own), strict=True))
        norms |= {name: joined(own_norms[id(x)]).to(norm.device) for name, x in gradients.items() if id(x) in own_norms}
    if limit.by == "part":
        parts: dict[str, list[Tensor]] = {}
        for name, of_parameter in norms.items():
            parts.setdefault(part_of(name), []).append(of_parameter)
        of_part = {part: torch.linalg.vector_norm(torch.stack(own)) for part, own in parts.items()}
        norms = {name: of_part[part_of(name)] for name in norms}
    factors = (most / (torch.stack([norms[name] for name in gradients]) + 1e-6)).clamp(max=1.0)
    for gradient, factor in zip(gradients.values(), factors, strict=True):
        gradient.mul_(factor.to(gradient.device))


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to: `backbone.NAME`, `fusion`, `fusions.NAME`, `heads.NAME`,
    `loss.ID`, `balance`."""
    words = name.split(".")
    return words[0] if words[0] in ("fusion", "balance") else ".".join(words[:2])
