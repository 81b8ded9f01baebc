"""What `distill check-plugin` feeds the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_clipself.loss import ClipSelf, ClipSelfConfig
from distill_core import ConformanceCase


def extras(config: ClipSelfConfig, modality: str, name: str, shape: tuple[int, int]) -> Tensor:
    """Boxes [V, B, 4]; every second view counts."""
    if name == "counted":
        return (torch.arange(shape[0] * shape[1]).view(shape) % 2) == 0
    draw = torch.Generator().manual_seed(0)
    corner = 0.5 * torch.rand(*shape, 2, generator=draw)
    return torch.cat([corner, corner + 0.1 + 0.4 * torch.rand(*shape, 2, generator=draw)], -1)


CASES = [ConformanceCase(ClipSelf, extra=extras)]
