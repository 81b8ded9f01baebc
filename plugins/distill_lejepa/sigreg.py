"""SIGReg: sketched isotropic Gaussian regularisation (LeJEPA, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill_core import all_gather, world_size


class SigReg(nn.Module):
    """How far rows are from standard normal along some directions, by Epps and Pulley's test.

    The integral over t of |empirical characteristic function - exp(-t^2/2)|^2 exp(-t^2/2), by the trapezoidal rule with
    `knots` points in [-reach, reach]. What is integrated is even in t, so half of them are computed.
    """

    def __init__(self, knots: int, reach: float) -> None:
        super().__init__()
        self.knots, self.reach = knots, reach

    def forward(self, x: Tensor, directions: Tensor, weight: float = 1.0) -> Tensor:
        """x [V, B, K], directions [K, A] of length 1 -> the mean over directions, a view's by itself: [V].

        The characteristic function is that of the rows of all ranks; `weight` of this rank's mean in the mean over
        ranks. Times the number of rows it is Epps and Pulley's statistic.
        """
        half = self.knots // 2
        t = torch.linspace(0, self.reach, half + 1, device=x.device, dtype=x.dtype)
        normal = (-t.square() / 2).exp()
        angles = (x @ directions)[..., None] * t  # [V, B, A, T]
        means = torch.stack([angles.cos().mean(1), angles.sin().mean(1)])  # [2, V, A, T]
        if world_size() > 1:
            means = all_gather(weight * means[None]).mean(0)
        errors = (means[0] - normal).square() + means[1].square()  # 0 where t is
        widths = torch.full_like(t, 2 * self.reach / half)
        widths[-1] = self.reach / half
        return (errors @ (widths * normal)).mean(-1)


def directions_of(step: int, width: int, count: int, like: Tensor) -> Tensor:
    """[width, count] columns of length 1, uniform on the sphere: the same on all ranks, others in each step."""
    generator = torch.Generator().manual_seed(step)
    drawn = torch.randn(width, count, generator=generator, dtype=like.dtype)
    directions: Tensor = drawn / drawn.norm(dim=0)
    return directions.to(like.device, non_blocking=True)
