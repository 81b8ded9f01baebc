"""Triton kernels of `multi_view_sigmoid`: logits exist as tiles in registers, and as one chunk of gradients.

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
    launch_constants,
    launch_rows,
    launch_tiles,
    pairwise_gradients,
    tile,
    tiles_of,
    variants,
)

# Columns of a block of the forward kernel: with 128 its logarithm spills on sm_80.
_FORWARD_J = 64


@triton.jit
def _softplus_kernel(
    x_ptr, y_ptr, scale_ptr, bias_ptr, cost_ptr,
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
    # cost [u, v, i]: the sum over all rows of y[v] of softplus(logit with x[u, i]); views is v's count.
    u = (tl.program_id(1) // views).to(tl.int64)
    v = (tl.program_id(1) % views).to(tl.int64)
    offs_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    scale = tl.load(scale_ptr).to(ACC) * LOG2_E
    bias = tl.load(bias_ptr).to(ACC) * LOG2_E
    total = tl.zeros([BLOCK_I], ACC)
    for start in range(0, m, BLOCK_J):
        offs_j = start + tl.arange(0, BLOCK_J)
        z = bias + scale * tile(
            x_ptr + u * x_su, y_ptr + v * y_sv, offs_i, offs_j, n, m, x_si, x_sd, y_sj, y_sd,
            D, BLOCK_I, BLOCK_J, BLOCK_D, ACC, PRECISION, UPCAST,
        )  # fmt: skip
        # softplus = max(z, 0) + log1p(e). 1 + e loses the low digits of a small e, which is most of this loss:
        # log1p(e) = log(1 + e) e / ((1 + e) - 1), exact to rounding (Kahan).
        e = tl.exp2(-tl.abs(z))
        one = 1.0 + e
        rounded = one - 1.0
        log1p = tl.where(rounded == 0.0, e, tl.log(one) * (e / tl.where(rounded == 0.0, 1.0, rounded)))
        cost = tl.maximum(z, 0.0) / LOG2_E + log1p
        total += tl.sum(tl.where((offs_j < m)[None, :], cost, 0.0), 1)
    tl.store(cost_ptr + tl.program_id(1).to(tl.int64) * n + offs_i, total, mask=offs_i < n)


@triton.jit
def _sigmoid_gradient_kernel(
    x_ptr, y_ptr, scale_ptr, bias_ptr, weight_ptr, dz_ptr, sums_ptr,
    x_su, x_si, x_sd,
    y_sv, y_sj, y_sd,
    weight_su, weight_sv,
    views, n, m, shift,
    D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    # dz [u, i, v, j] = weight (sigmoid - 1 on the target), row i's target being column i + shift of this chunk.
    # sums [programs, 2]: of dz times the logit without scale and bias, and of dz, taken here because the stored dz
    # may be bf16.
    u = (tl.program_id(2) // views).to(tl.int64)
    v = (tl.program_id(2) % views).to(tl.int64)
    offs_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    dot = tile(
        x_ptr + u * x_su, y_ptr + v * y_sv, offs_i, offs_j, n, m, x_si, x_sd, y_sj, y_sd,
        D, BLOCK_I, BLOCK_J, BLOCK_D, ACC, PRECISION, UPCAST,
    )  # fmt: skip
    z = (tl.load(scale_ptr).to(ACC) * dot + tl.load(bias_ptr).to(ACC)) * LOG2_E
    dz = 1.0 / (1.0 + tl.exp2(-z))
    dz = tl.where(offs_i[:, None] + shift == offs_j[None, :], dz - 1.0, dz)
    dz *= tl.load(weight_ptr + u * weight_su + v * weight_sv)
    inside = (offs_i < n)[:, None] & (offs_j < m)[None, :]
    dz = tl.where(inside, dz, 0.0)
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums_ptr + 2 * program, tl.sum(tl.sum(dz * dot, 1), 0))
    tl.store(sums_ptr + 2 * program + 1, tl.sum(tl.sum(dz, 1), 0))
    # 32-bit offsets: a chunk is small, and 64-bit ones of a whole tile spill.
    at = ((tl.program_id(2) // views * n + offs_i) * views + tl.program_id(2) % views) * m
    tl.store(dz_ptr + at[:, None] + offs_j[None, :], dz.to(dz_ptr.dtype.element_ty), mask=inside)


def launch_softplus(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, cost: Tensor) -> None:
    """Fill cost [Va, Vb, B] with the sum over columns of softplus(scale * x [Va, B, D] @ y [Vb, M, D].T + bias)."""
    columns = min(launch_constants(x)["BLOCK_J"], _FORWARD_J)
    launch_rows(_softplus_kernel, x, y, (scale, bias), cost, BLOCK_J=columns)


def launch_sigmoid_gradient(part: Part, scale: Tensor, bias: Tensor) -> Tensor:
    """Fill part.dz, contiguous, with the logits' gradient; returns its sums with and without the logit, [2]."""
    sums = part.weight.new_empty((*tiles_of(part), 2))
    launch_tiles(_sigmoid_gradient_kernel, part, (scale, bias, part.weight, part.dz, sums), ())
    return sums.sum((0, 1, 2))


@torch.library.custom_op("distill::sigmoid_triton", mutates_args=())
def sigmoid_triton(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, offset: int) -> Tensor:
    """x [Va, B, D], y [Vb, M, D] of one dtype -> [Va, Vb], row i's own column being offset + i."""
    dtype = compute_dtype(x, y)
    cost = x.new_empty((x.shape[0], y.shape[0], x.shape[1]), dtype=dtype)
    launch_softplus(x, y, scale, bias, cost)
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
        return launch_sigmoid_gradient(part, scale, bias)

    dx, dy, sums = pairwise_gradients(grad, x, y, scale, offset, 1, fill)
    return dx, dy, sums[0].to(scale.dtype, copy=True), sums[1].to(bias.dtype, copy=True)


register_gradients(sigmoid_triton, sigmoid_triton_backward)


def compile_specs() -> list[Spec]:
    """The variants that `kernels/bench/resources.py` compiles: dtypes x D."""
    specs = []
    for v in variants():
        types = v.types | {"bias_ptr": "*fp32"}
        specs.append(
            make_spec(
                _softplus_kernel,
                v.name,
                types | {"cost_ptr": "*fp32"},
                v.constants | {"BLOCK_J": min(v.constants["BLOCK_J"], _FORWARD_J)},
                **v.options,
            )
        )
        types |= {"weight_ptr": "*fp32", "dz_ptr": f"*{v.dtype}", "sums_ptr": "*fp32"}
        specs.append(make_spec(_sigmoid_gradient_kernel, v.name, types, v.constants, **v.options))
    return specs
