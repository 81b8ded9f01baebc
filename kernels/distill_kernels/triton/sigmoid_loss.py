"""The Triton backend of `multi_view_sigmoid`: the kernels of pairwise.py with a bias.

Shape letters as in pairwise.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill_kernels.pairwise.chunks import compute_dtype, target_mean
from distill_kernels.pairwise.operators import register_gradients
from distill_kernels.triton.pairwise import Part, fill_gradient, pairwise_gradients, reduce_rows


@torch.library.custom_op("distill::sigmoid_triton", mutates_args=())
def sigmoid_triton(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, offset: int) -> Tensor:
    """x [Va, B, D], y [Vb, M, D] of one dtype -> [Va, Vb], row i's own column being offset + i."""
    dtype = compute_dtype(x, y)
    cost = x.new_empty((x.shape[0], y.shape[0], x.shape[1]), dtype=dtype)
    reduce_rows(x, y, scale, bias, cost)
    with torch.autocast(x.device.type, enabled=False):
        return cost.mean(2) - target_mean(x, y, scale, offset, dtype) - bias.to(dtype)


@sigmoid_triton.register_fake
def _(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, offset: int) -> Tensor:
    return x.new_empty((x.shape[0], y.shape[0]), dtype=compute_dtype(x, y))


@torch.library.custom_op("distill::sigmoid_triton_backward", mutates_args=())
def sigmoid_triton_backward(
    grad: Tensor, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, offset: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `sigmoid_triton` for x, y, scale and bias, of their dtypes; grad is [Va, Vb]."""

    def fill(part: Part) -> Tensor:
        return fill_gradient(part, scale, bias=bias)

    dx, dy, sums = pairwise_gradients(grad, x, y, scale, offset, 1, fill)
    return dx, dy, sums[0].to(scale.dtype, copy=True), sums[1].to(bias.dtype, copy=True)


register_gradients(sigmoid_triton, sigmoid_triton_backward)
