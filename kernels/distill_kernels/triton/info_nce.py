"""Triton kernels of `multi_view_info_nce`: logits exist as tiles in registers, and as one chunk of gradients.

Forward: an online log-sum-exp over the columns; the other direction is the same kernel with the sides
exchanged, since a column's sum belongs to no single program.

Shape letters as in pairwise.py.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (a kernel's arguments are pointers, integers and constants that only triton can type)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill_kernels.pairwise.chunks import compute_dtype, target_mean
from distill_kernels.pairwise.operators import register_gradients
from distill_kernels.triton.compile_specs import Spec, make_spec
from distill_kernels.triton.pairwise import (
    LOG2_E,
    Part,
    launch_rows,
    launch_tiles,
    pairwise_gradients,
    tile,
    tiles_of,
    variants,
)


@triton.jit
def _lse_kernel(
    x_ptr, y_ptr, scale_ptr, lse_ptr,
    x_su, x_si, x_sd,
    y_sv, y_sj, y_sd,
    views, n, m,
    D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    # lse [u, v, i] of x[u] against all rows of y[v]; views is v's count.
    u = (tl.program_id(1) // views).to(tl.int64)
    v = (tl.program_id(1) % views).to(tl.int64)
    offs_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    scale = tl.load(scale_ptr).to(ACC) * LOG2_E
    largest = tl.full([BLOCK_I], float("-inf"), ACC)  # of the logits so far, in units of log2
    total = tl.zeros([BLOCK_I], ACC)
    for start in range(0, m, BLOCK_J):
        offs_j = start + tl.arange(0, BLOCK_J)
        z = scale * tile(
            x_ptr + u * x_su, y_ptr + v * y_sv, offs_i, offs_j, n, m, x_si, x_sd, y_sj, y_sd,
            D, BLOCK_I, BLOCK_J, BLOCK_D, ACC, PRECISION, UPCAST,
        )  # fmt: skip
        z = tl.where((offs_j < m)[None, :], z, float("-inf"))
        new = tl.maximum(largest, tl.max(z, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(largest - shift) + tl.sum(tl.exp2(z - shift[:, None]), 1)
        largest = new
    lse = (largest + tl.log2(total)) / LOG2_E
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * n + offs_i, lse, mask=offs_i < n)


@triton.jit
def _gradient_kernel(
    x_ptr, y_ptr, scale_ptr, weight_ptr, row_ptr, column_ptr, dz_ptr, d_scale_ptr,
    x_su, x_si, x_sd,
    y_sv, y_sj, y_sd,
    row_su, row_sv,
    column_sv, column_su,
    weight_su, weight_sv,
    views, n, m, shift,
    D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    # dz [u, i, v, j] = weight (row softmax (+ column softmax) - 1 (2) on the target), row i's target being
    # column i + shift of this chunk. d_scale [programs]: sums of dz times the logit without its scale, taken here
    # because the stored dz may be bf16.
    u = (tl.program_id(2) // views).to(tl.int64)
    v = (tl.program_id(2) % views).to(tl.int64)
    offs_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    in_i = offs_i < n
    in_j = offs_j < m
    dot = tile(
        x_ptr + u * x_su, y_ptr + v * y_sv, offs_i, offs_j, n, m, x_si, x_sd, y_sj, y_sd,
        D, BLOCK_I, BLOCK_J, BLOCK_D, ACC, PRECISION, UPCAST,
    )  # fmt: skip
    z = tl.load(scale_ptr).to(ACC) * LOG2_E * dot
    row = tl.load(row_ptr + u * row_su + v * row_sv + offs_i, mask=in_i, other=0.0) * LOG2_E
    dz = tl.exp2(z - row[:, None])
    target = 1.0
    if SYMMETRIC:
        column = tl.load(column_ptr + v * column_sv + u * column_su + offs_j, mask=in_j, other=0.0) * LOG2_E
        dz += tl.exp2(z - column[None, :])
        target = 2.0
    dz = tl.where(offs_i[:, None] + shift == offs_j[None, :], dz - target, dz)
    dz *= tl.load(weight_ptr + u * weight_su + v * weight_sv)
    # Outside, dz may be infinite. (Masking z instead takes 50 more registers.)
    inside = in_i[:, None] & in_j[None, :]
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(d_scale_ptr + program, tl.sum(tl.sum(tl.where(inside, dz * dot, 0.0), 1), 0))
    # 32-bit offsets: a chunk is small, and 64-bit ones of a whole tile spill.
    at = ((tl.program_id(2) // views * n + offs_i) * views + tl.program_id(2) % views) * m
    tl.store(dz_ptr + at[:, None] + offs_j[None, :], dz.to(dz_ptr.dtype.element_ty), mask=inside)


def launch_lse(x: Tensor, y: Tensor, scale: Tensor, lse: Tensor) -> None:
    """Fill lse [Va, Vb, B] with the log-sum-exp over columns of scale * x [Va, B, D] @ y [Vb, M, D].T."""
    launch_rows(_lse_kernel, x, y, (scale,), lse)


def launch_gradient(part: Part, scale: Tensor, row_lse: Tensor, column_lse: Tensor | None) -> Tensor:
    """Fill part.dz, contiguous, with the logits' gradient; returns the gradient of scale, 0-dim.

    row_lse is [nu, nv, ni], column_lse [nv, nu, nj], or None for one direction.
    """
    d_scale = row_lse.new_empty(tiles_of(part))
    tensors = (scale, part.weight, row_lse, column_lse, part.dz, d_scale)
    strides = (*row_lse.stride()[:2], *((0, 0) if column_lse is None else column_lse.stride()[:2]))
    launch_tiles(_gradient_kernel, part, tensors, strides, SYMMETRIC=column_lse is not None)
    return d_scale.sum()


@torch.library.custom_op("distill::info_nce_triton", mutates_args=())
def info_nce_triton(x: Tensor, y: Tensor, scale: Tensor, offset: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x [Va, B, D], y [Vb, B or M, D] of one dtype -> loss [Va, Vb], row lse [Va, Vb, B], column lse [Vb, Va, M].

    loss[u, v] is the cross-entropy x[u] -> y[v], row i's target being column offset + i; with `symmetric`
    (M = B) the mean of both directions. Without it the column lse is empty.
    """
    _, row_lse, column_lse = _outputs(x, y, symmetric)
    launch_lse(x, y, scale, row_lse)
    loss = row_lse.mean(2)
    if symmetric:
        launch_lse(y, x, scale, column_lse)
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
        return launch_gradient(part, scale, row_lse[part.us, part.vs, part.rows], column)

    dx, dy, d_scale = pairwise_gradients(grad, x, y, scale, offset, 2 if symmetric else 1, fill)
    return dx, dy, d_scale[0].to(scale.dtype, copy=True)


register_gradients(info_nce_triton, info_nce_triton_backward)


def compile_specs() -> list[Spec]:
    """The variants that `kernels/bench/resources.py` compiles: dtypes x D x directions."""
    specs = []
    for v in variants():
        specs.append(make_spec(_lse_kernel, v.name, v.types | {"lse_ptr": "*fp32"}, v.constants, **v.options))
        types = v.types | {f"{name}_ptr": "*fp32" for name in ("weight", "row", "column", "d_scale")}
        types |= {"dz_ptr": f"*{v.dtype}"}
        for symmetric in (False, True):
            constants = v.constants | {"SYMMETRIC": symmetric} | ({} if symmetric else {"column_ptr": None})
            name = f"{v.name} {'both directions' if symmetric else 'one direction'}"
            specs.append(make_spec(_gradient_kernel, name, types, constants, **v.options))
    return specs
