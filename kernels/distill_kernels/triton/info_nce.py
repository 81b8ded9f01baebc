"""The Triton backend of `multi_view_info_nce`: the kernels of pairwise.py without a bias.

Forward: a log-sum-exp over the columns of each row; the other direction is the same with the sides exchanged, since a
column's sum belongs to no single program. Shape letters as in pairwise.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill_kernels.pairwise.chunks import compute_dtype, target_mean
from distill_kernels.pairwise.operators import register_gradients
from distill_kernels.triton.pairwise import Part, fill_gradient, pairwise_gradients, reduce_rows


@torch.library.custom_op("distill::info_nce_triton", mutates_args=())
def info_nce_triton(x: Tensor, y: Tensor, scale: Tensor, offset: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x [Va, B, D], y [Vb, B or M, D] of one dtype -> loss [Va, Vb], row lse [Va, Vb, B], column lse [Vb, Va, M].

    loss[u, v] is the cross-entropy x[u] -> y[v], row i's target being column offset + i; with `symmetric`
    (M = B) the mean of both directions. Without it the column lse is empty.
    """
    _, row_lse, column_lse = _outputs(x, y, symmetric)
    reduce_rows(x, y, scale, None, row_lse)
    loss = row_lse.mean(2)
    if symmetric:
        reduce_rows(y, x, scale, None, column_lse)
        loss = 0.5 * (loss + column_lse.mean(2).T)
    with torch.autocast(x.device.type, enabled=False):
        return loss - target_mean(x, y, scale, offset, loss.dtype), row_lse, column_lse


def _outputs(x: Tensor, y: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    (va, n, _), (vb, m, _) = x.shape, y.shape
    dtype = compute_dtype(x, y)
    return (
        x.new_empty((va, vb), dtype=dtype),
        x.new_empty((va, vb, n), dtype=dtype),
        x.new_empty((vb, va, m) if symmetric else (0,), dtype=dtype),
    )


@info_nce_triton.register_fake
def _(x: Tensor, y: Tensor, scale: Tensor, offset: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, y, symmetric)


@torch.library.custom_op("distill::info_nce_triton_backward", mutates_args=())
def info_nce_triton_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    offset: int,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `info_nce_triton` for x, y and scale, of their dtypes; grad is [Va, Vb]."""

    def fill(part: Part) -> Tensor:
        column = column_lse[part.vs, part.us, part.columns] if symmetric else None
        return fill_gradient(part, scale, row=row_lse[part.us, part.vs, part.rows], column=column)

    dx, dy, d_scale = pairwise_gradients(grad, x, y, scale, offset, 2 if symmetric else 1, fill)
    return dx, dy, d_scale[0].to(scale.dtype, copy=True)


register_gradients(info_nce_triton, info_nce_triton_backward, sweep_a_side=True)
