"""The sigmoid loss over ranks without a gather: columns go from neighbour to neighbour until all have seen them.

Forward and backward each take one round. Nothing of a visiting block is kept: the backward pass lets the columns travel
again, with their gradient, which gathers each rank's share and comes home after the last stop. So a rank holds two
blocks of columns, however many ranks there are.

Shape letters: Va, Vb views of the two sides, B rows of a rank, D embedding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distill_core import rank, world_size
from distill_kernels import multi_view_sigmoid


def ring_sigmoid(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """`multi_view_sigmoid` of this rank's rows a [Va, B, D] against the columns b [Vb, B, D] of all ranks -> [Va, Vb].

    B is the same on all ranks, and all of them must call it, forward and backward. The gradient of `b` is the sum over
    ranks, as that of `distill_core.system.distributed.all_gather`.
    """
    result: Tensor = _Ring.apply(a, b, scale, bias)  # type: ignore[no-untyped-call]
    return result


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, scale, bias)
        total = _block(a, b, scale, bias, own=True)
        for _ in range(world_size() - 1):
            b = _to_the_right(b)
            total = total + _block(a, b, scale, bias, own=False)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a, columns, scale, bias = ctx.saved_tensors
        gradients_of_own = [torch.zeros_like(x) for x in (a, scale, bias)]
        travelling = torch.zeros_like(columns)
        for stop in range(world_size()):
            if stop:
                columns, travelling = _to_the_right(torch.stack([columns, travelling]))
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in (a, scale, bias, columns)]
                rows, s, t, visitors = inputs
                block = _block(rows, visitors, s, t, own=stop == 0)
            *shares, share = torch.autograd.grad(block, inputs, gradients[0])
            gradients_of_own = [x + more for x, more in zip(gradients_of_own, shares, strict=True)]
            travelling = travelling + share
        if world_size() > 1:
            travelling = _to_the_right(travelling)  # the last stop is the left neighbour of where they began
        d_a, d_scale, d_bias = gradients_of_own
        return d_a, travelling, d_scale, d_bias


def _block(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, *, own: bool) -> Tensor:
    """[Va, Vb]: a against one rank's columns, of which only the own rank's hold positives."""
    pairs = multi_view_sigmoid(a, b, scale, bias)
    if own:
        return pairs
    # log sigmoid(z) - log sigmoid(-z) = z: what makes the positives of a block negatives
    return pairs + scale * torch.einsum("uid,vid->uv", a, b) / a.shape[1] + bias


def _to_the_right(x: Tensor) -> Tensor:
    """Hands `x` to the next rank; returns the previous one's."""
    received, x = torch.empty_like(x, memory_format=torch.contiguous_format), x.contiguous()
    left, right = (rank() - 1) % world_size(), (rank() + 1) % world_size()
    moves = [dist.P2POp(dist.isend, x, right), dist.P2POp(dist.irecv, received, left)]
    for move in dist.batch_isend_irecv(moves):
        move.wait()
    return received
