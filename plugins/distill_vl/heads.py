"""Projection heads on top of a backbone's tokens or embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize, relu

from distill_core import all_gather, wide


class DINOHead(nn.Module):
    """MLP to a bottleneck, L2-normalised, then a weight-normed layer of K prototypes (DINO, appendix C).

    A logit is the cosine of the bottleneck and a prototype, times the prototype's length: 1, or learned without
    `norm_last_layer`. The MLP has `layers` linear layers with GELU between them, no batch norm.
    """

    def __init__(
        self,
        width: int,
        prototypes: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        widths = [width, *[hidden] * (layers - 1), bottleneck]
        parts: list[nn.Module] = []
        for i in range(layers):
            parts += [nn.Linear(widths[i], widths[i + 1]), nn.GELU()]
        self.mlp = nn.Sequential(*parts[:-1])
        for part in self.mlp:
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
        bound = 1 / math.sqrt(bottleneck)
        self.last_layer = nn.Parameter(torch.empty(prototypes, bottleneck).uniform_(-bound, bound))
        self.last_layer_length = None if norm_last_layer else nn.Parameter(torch.ones(prototypes))

    def forward(self, x: Tensor, *, freeze_last_layer: bool = False) -> Tensor:
        """x [..., W] -> logits [..., K], at least fp32: bf16 would round cosines to 1/256, which a low temperature
        magnifies. `freeze_last_layer` sends the prototypes no gradient."""  # fmt: skip
        x = self.mlp(x)
        with torch.autocast(x.device.type, enabled=False):
            x = normalize(wide(x), dim=-1)
            weight = normalize(self.last_layer, dim=-1)
            if self.last_layer_length is not None:
                weight = weight * self.last_layer_length[:, None]
            return linear(x, (weight.detach() if freeze_last_layer else weight).to(x.dtype))


class BatchNorm(nn.Module):
    """Batch normalisation by the rows of all ranks, each view by itself.

    It keeps no moving statistics: the head is not used after training.
    """

    eps = 1e-5

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, weight: float = 1.0) -> Tensor:
        """x [V, B, C] -> [V, B, C], at least fp32; `weight` of this rank's mean in the mean over ranks."""
        with torch.autocast(x.device.type, enabled=False):
            x = wide(x)
            centred = x - _mean(x, weight)
            return centred * (_mean(centred.square(), weight) + self.eps).rsqrt() * self.weight + self.bias


def _mean(x: Tensor, weight: float) -> Tensor:
    """[V, B, C] -> [V, 1, C], over the rows of all ranks."""
    return all_gather(weight * x.mean(1, keepdim=True), dim=1).mean(1, keepdim=True)


class ProjectionHead(nn.Module):
    """Linear, batch norm, ReLU, twice; then linear (SLIP, section 3.2; LeJEPA's public code)."""

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.layer1, self.bn1 = nn.Linear(width, hidden), BatchNorm(hidden)
        self.layer2, self.bn2 = nn.Linear(hidden, hidden), BatchNorm(hidden)
        self.layer3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, weight: float = 1.0) -> Tensor:
        """x [V, B, W] -> [V, B, dim]."""
        x = relu(self.bn1(self.layer1(x), weight))
        return self.layer3(relu(self.bn2(self.layer2(x), weight)))  # type: ignore[no-any-return]
