"""Losses over pairs of rows of all ranks without a gather: columns go from neighbour to neighbour until all have seen
them.

Forward and backward each take one round. Nothing of a visiting block is kept: the backward pass lets the columns travel
again, with their gradient, which gathers each rank's share and comes home after the last stop. So a rank holds two
blocks of columns, however many ranks there are.

Shape letters: Va, Vb views of the two sides, B rows of a rank, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distill_core import rank, world_size
from distill_kernels import info_nce_gradients, info_nce_sums, multi_view_sigmoid


def ring_info_nce(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """`multi_view_info_nce` of this rank's rows a [Va, B, D] and b [Vb, B, D] against those of all ranks -> [Va, Vb].

    B is the same on all ranks, and all of them must call it, forward and backward. The gradients of `a` and `b` are
    sums over ranks, as those of `distill_core.all_gather`; that of `scale` counts the visitors' rows here and not at
    home, so that only its mean over ranks is that of gathered rows. The forward pass makes each logit once, not twice.
    """
    result: Tensor = _InfoNce.apply(a, b, scale)  # type: ignore[no-untyped-call]
    return result


def ring_sigmoid(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """`multi_view_sigmoid` of this rank's rows a [Va, B, D] against the columns b [Vb, B, D] of all ranks -> [Va, Vb].

    B is the same on all ranks, and all of them must call it, forward and backward. The gradient of `b` is the sum over
    ranks, as that of `distill_core.all_gather`.
    """
    result: Tensor = _Sigmoid.apply(a, b, scale, bias)  # type: ignore[no-untyped-call]
    return result


class _InfoNce(torch.autograd.Function):
    """Rows stay and merge the log-sum-exps of each visit; columns take theirs along."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        rows, columns = info_nce_sums(a, b, scale)  # [Va, Vb, B]
        visitors = b
        for _ in range(world_size() - 1):
            visitors, columns = _to_the_right([visitors, columns])
            more, theirs = info_nce_sums(a, visitors, scale)
            rows, columns = torch.logaddexp(rows, more), torch.logaddexp(columns, theirs)
        if world_size() > 1:
            (columns,) = _to_the_right([columns])  # the last stop is the left neighbour of where they began
        ctx.save_for_backward(a, b, scale, rows, columns)
        positives = scale * torch.einsum("uid,vid->uv", a, b) / a.shape[1]
        return 0.5 * (rows.mean(2) + columns.mean(2)) - positives

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, visitors, scale, rows, columns = ctx.saved_tensors
        weight = 0.5 * gradients[0]  # of each direction
        theirs = weight  # of the rank that the visitors are from
        d_a, d_scale, travelling = torch.zeros_like(a), torch.zeros_like(scale), torch.zeros_like(visitors)
        for stop in range(world_size()):
            if stop:
                visitors, columns, theirs, travelling = _to_the_right([visitors, columns, theirs, travelling])
            own = stop == 0
            a_there, there, s_there = info_nce_gradients(weight, a, visitors, scale, rows, positives=own)
            back, a_back, s_back = info_nce_gradients(
                theirs.T, visitors, a, scale, columns.transpose(0, 1), positives=own
            )
            d_a, d_scale, travelling = d_a + a_there + a_back, d_scale + s_there + s_back, travelling + there + back
        if world_size() > 1:
            (travelling,) = _to_the_right([travelling])
        return d_a, travelling, d_scale


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, scale, bias)
        total = _sigmoid_block(a, b, scale, bias, own=True)
        for _ in range(world_size() - 1):
            (b,) = _to_the_right([b])
            total = total + _sigmoid_block(a, b, scale, bias, own=False)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a, columns, scale, bias = ctx.saved_tensors
        gradients_of_own = [torch.zeros_like(x) for x in (a, scale, bias)]
        travelling = torch.zeros_like(columns)
        for stop in range(world_size()):
            if stop:
                columns, travelling = _to_the_right([columns, travelling])
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in (a, scale, bias, columns)]
                rows, s, t, visitors = inputs
                block = _sigmoid_block(rows, visitors, s, t, own=stop == 0)
            *shares, share = torch.autograd.grad(block, inputs, gradients[0])
            gradients_of_own = [x + more for x, more in zip(gradients_of_own, shares, strict=True)]
            travelling = travelling + share
        if world_size() > 1:
            (travelling,) = _to_the_right([travelling])
        d_a, d_scale, d_bias = gradients_of_own
        return d_a, travelling, d_scale, d_bias


def _sigmoid_block(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, *, own: bool) -> Tensor:
    """[Va, Vb]: a against one rank's columns, of which only the own rank's hold positives."""
    pairs = multi_view_sigmoid(a, b, scale, bias)
    if own:
        return pairs
    # log sigmoid(z) - log sigmoid(-z) = z: what makes the positives of a block negatives
    return pairs + scale * torch.einsum("uid,vid->uv", a, b) / a.shape[1] + bias


def _to_the_right(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Hands the tensors to the next rank; returns the previous one's."""
    left, right = (rank() - 1) % world_size(), (rank() + 1) % world_size()
    sent = [x.contiguous() for x in tensors]
    received = [torch.empty_like(x) for x in sent]
    moves = [dist.P2POp(dist.isend, x, right) for x in sent] + [dist.P2POp(dist.irecv, x, left) for x in received]
    for move in dist.batch_isend_irecv(moves):
        move.wait()
    return received
