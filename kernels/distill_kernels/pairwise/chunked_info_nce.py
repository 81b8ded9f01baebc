"""Chunked InfoNCE: forward and backward in pure torch, no logits matrix larger than one chunk alive.

Forward keeps the log-sum-exp of every row and column; backward computes each chunk again, so a step is four
matmuls where the plain form, which stores its logits, takes three. The logits stay in cache, which pays for
the fourth.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill_kernels.pairwise.chunks import Chunk, chunked_gradients, compute_dtype, sweep, target_mean
from distill_kernels.pairwise.operators import register_gradients

# Below this sum, exponentials that a shared shift pushed under fp32's smallest number could matter.
_LEAST_SUM = math.exp(-60.0)
# Above this spread of log-sum-exps within a chunk, one shift does not fit all of it.
_WIDEST_SPREAD = 80.0


@torch.library.custom_op("distill::info_nce_chunked", mutates_args=())
def info_nce_chunked(
    x: Tensor, y: Tensor, scale: Tensor, offset: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x [Va, B, D], y [Vb, M, D] -> loss [Va, Vb], row lse [Va, B, Vb], column lse [Va, Vb, M].

    loss[u, v] is the cross-entropy x[u] -> y[v], row i's target being column offset + i; with `symmetric`
    (M = B) the mean of both directions. Without it the column lse is empty.
    """
    (va, n, _), (vb, m, _) = x.shape, y.shape
    dtype = compute_dtype(x, y)
    with torch.autocast(x.device.type, enabled=False):
        row_lse = x.new_full((va, n, vb), -math.inf, dtype=dtype)
        column_lse = x.new_full((va, vb, m) if symmetric else (0,), -math.inf, dtype=dtype)
        for chunk in sweep(x, y, scale, dtype):
            row, column = _chunk_lse(chunk, symmetric)
            _merge(row_lse[chunk.us, chunk.rows, chunk.vs], row)
            if column is not None:
                _merge(column_lse[chunk.us, chunk.vs, chunk.columns], column)
        loss = row_lse.mean(1)
        if symmetric:
            loss = 0.5 * (loss + column_lse.mean(2))
        return loss - target_mean(x, y, scale, offset, dtype), row_lse, column_lse


def _chunk_lse(chunk: Chunk, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exps of a chunk: rows [nu, ni, nv] and columns [nu, nv, nj]. May overwrite the chunk."""
    z4 = chunk.z4
    if symmetric and z4.device.type == "cpu":
        # One exponential serves rows and columns, when the chunk's largest logit is a fair shift for all of
        # them. NaN and infinity fail the test, and the exact form passes them on.
        shift = z4.amax()
        exp = torch.sub(z4, shift, out=chunk.spare).exp_()
        row, column = exp.sum(3), exp.sum(1)
        if torch.minimum(row.min(), column.min()) > _LEAST_SUM:
            return row.log_().add_(shift), column.log_().add_(shift)
    return z4.logsumexp(3), z4.logsumexp(1) if symmetric else None


def _merge(total: Tensor, part: Tensor) -> None:
    torch.logaddexp(total, part, out=total)


@info_nce_chunked.register_fake
def _(x: Tensor, y: Tensor, scale: Tensor, offset: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    (va, n, _), (vb, m, _) = x.shape, y.shape
    dtype = compute_dtype(x, y)
    return (
        x.new_empty((va, vb), dtype=dtype),
        x.new_empty((va, n, vb), dtype=dtype),
        x.new_empty((va, vb, m) if symmetric else (0,), dtype=dtype),
    )


@torch.library.custom_op("distill::info_nce_chunked_backward", mutates_args=())
def info_nce_chunked_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    offset: int,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `info_nce_chunked` for x, y and scale, of their dtypes; grad is [Va, Vb]."""
    half = grad.to(compute_dtype(x, y)) / ((2 if symmetric else 1) * max(x.shape[1], 1))

    def dz(chunk: Chunk) -> Tensor:
        return _chunk_dz(chunk, half, row_lse, column_lse, symmetric)

    return chunked_gradients(grad, x, y, scale, offset, dz)


def _chunk_dz(chunk: Chunk, weight: Tensor, row_lse: Tensor, column_lse: Tensor, symmetric: bool) -> Tensor:
    """Gradient of a chunk's logits, targets aside, [nu, ni, nv, nj]: weight * (row + column softmax)."""
    z4, spare = chunk.z4, chunk.spare
    row = row_lse[chunk.us, chunk.rows, chunk.vs, None]  # [nu, ni, nv, 1]
    w = weight[chunk.us, None, chunk.vs, None]  # [nu, 1, nv, 1]
    if not symmetric:
        return z4.sub_(row).exp_().mul_(w)
    column = column_lse[chunk.us, None, chunk.vs, chunk.columns]  # [nu, 1, nv, nj]
    if z4.device.type == "cpu":
        # exp(z - row) + exp(z - column) = exp(z - low) (exp(low - row) + exp(low - column)): one exponential
        # an element, when no log-sum-exp is far from the lowest. NaN and infinity fail the test.
        low = torch.minimum(row.min(), column.min())
        if torch.maximum(row.max(), column.max()) - low < _WIDEST_SPREAD:
            factor = torch.add(w * (low - row).exp(), w * (low - column).exp(), out=spare)
            return z4.sub_(low).exp_().mul_(factor)
    torch.sub(z4, column, out=spare).exp_()
    return z4.sub_(row).exp_().add_(spare).mul_(w)


register_gradients(info_nce_chunked, info_nce_chunked_backward)
