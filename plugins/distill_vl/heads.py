"""Projection heads on top of a backbone's tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize


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
            x = normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
            weight = normalize(self.last_layer, dim=-1)
            if self.last_layer_length is not None:
                weight = weight * self.last_layer_length[:, None]
            return linear(x, (weight.detach() if freeze_last_layer else weight).to(x.dtype))
