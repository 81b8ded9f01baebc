"""The sweep that the pairwise losses share: view pairs' logits, one chunk at a time.

Shape letters: Va, Vb views, B rows, M columns, D embedding; u, v count views, i rows, j columns of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distill_kernels.defaults import numbers_for


@dataclass(frozen=True)
class Chunk:
    """Logits of a block of `x` rows against a block of `y` rows.

    `z` is [nu * ni, nv * nj]; `z4` is the same memory as [nu, ni, nv, nj].
    """

    us: slice
    rows: slice
    vs: slice
    columns: slice
    x: Tensor  # [nu * ni, D], times scale
    y: Tensor  # [nv * nj, D]
    z: Tensor
    z4: Tensor
    spare: Tensor  # as z4, free for the caller


Block = tuple[slice, slice]  # of views and rows


def chunk_blocks(x: Tensor, y: Tensor) -> tuple[list[Block], list[Block], int]:
    """The blocks of x's rows and of y's whose products are the chunks, and the elements of the largest chunk."""
    limits = numbers_for("pairwise_chunks", x)
    rows = list(_blocks(x.shape[0], x.shape[1], int(limits["rows"])))
    columns = list(_blocks(y.shape[0], y.shape[1], int(limits["columns"])))
    return rows, columns, max(map(_size, rows), default=0) * max(map(_size, columns), default=0)


def _size(block: Block) -> int:
    views, rows = block
    return int((views.stop - views.start) * (rows.stop - rows.start))


def _blocks(views: int, rows: int, limit: int) -> Iterator[Block]:
    """Cut [views, rows] in blocks of about `limit` rows.

    Short views go several to a block, whole; a long view is cut in runs. Either way a block of a
    contiguous tensor is contiguous.
    """
    if rows == 0 or views == 0:
        return
    if rows >= limit:
        parts = -(-rows // limit)
        step = -(-rows // parts)
        for u in range(views):
            for start in range(0, rows, step):
                yield slice(u, u + 1), slice(start, min(start + step, rows))
    else:
        step = max(1, limit // rows)
        for u in range(0, views, step):
            yield slice(u, min(u + step, views)), slice(0, rows)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """At least fp32: logits near 100 are good to half a unit in bf16."""
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def sweep(x: Tensor, y: Tensor, scale: Tensor, dtype: torch.dtype) -> Iterator[Chunk]:
    """Every chunk of scale * x[u] @ y[v].T, in row-major order; each overwrites the one before."""
    d = x.shape[2]
    row_blocks, column_blocks, largest = chunk_blocks(x, y)
    memory = x.new_empty((2, largest), dtype=dtype)
    for us, rows in row_blocks:
        xs = (x[us, rows].to(dtype) * scale.to(dtype)).reshape(-1, d)
        for vs, columns in column_blocks:
            ys = y[vs, columns].to(dtype).reshape(-1, d)
            z = memory[0, : xs.shape[0] * ys.shape[0]].view(xs.shape[0], ys.shape[0])
            torch.mm(xs, ys.T, out=z)
            four = [s.stop - s.start for s in (us, rows, vs, columns)]
            spare = memory[1, : z.numel()].view(four)
            yield Chunk(us, rows, vs, columns, xs, ys, z, z.view(four), spare)


def target_mean(x: Tensor, y: Tensor, scale: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """Mean of each view pair's target logits, [Va, Vb], as one [Va, B * D] @ [B * D, Vb] product."""
    n = x.shape[1]
    own = y[:, offset : offset + n].to(dtype).reshape(y.shape[0], -1)
    return x.to(dtype).reshape(x.shape[0], -1) @ own.T * scale.to(dtype) / n


def chunked_gradients(
    grad: Tensor, x: Tensor, y: Tensor, scale: Tensor, offset: int, dz: Callable[[Chunk], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, y and scale, of their dtypes, of a loss that is a mean over rows less `target_mean`.

    grad is [Va, Vb]; `dz(chunk)` is the gradient [nu, ni, nv, nj] of a chunk's logits, targets aside.
    """
    (va, n, d), (vb, m, _) = x.shape, y.shape
    dtype = compute_dtype(x, y)
    with torch.autocast(x.device.type, enabled=False):
        weight = grad.to(dtype) / max(n, 1)  # [Va, Vb], each row's share
        s = scale.to(dtype)
        own = slice(offset, offset + n)
        # Targets first: minus one a row, for all pairs, and no zero fill.
        dx = (weight @ y[:, own].to(dtype).reshape(vb, -1)).neg_().view(va, n, d)  # not yet times scale
        dy = x.new_zeros((vb, m, d), dtype=dtype)
        dy[:, own] = (weight.T @ x.to(dtype).reshape(va, -1)).mul_(-s).view(vb, n, d)
        for chunk in sweep(x, y, scale, dtype):
            of_logits = dz(chunk).view(chunk.z.shape)
            dx[chunk.us, chunk.rows].view(-1, d).addmm_(of_logits, chunk.y)
            dy[chunk.vs, chunk.columns].view(-1, d).addmm_(of_logits.T, chunk.x)
        d_scale = torch.dot(x.to(dtype).reshape(-1), dx.view(-1))
        return dx.mul_(s).to(x.dtype), dy.to(y.dtype), d_scale.to(scale.dtype)
