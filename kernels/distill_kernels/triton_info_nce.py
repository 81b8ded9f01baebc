"""Triton kernels of `multi_view_info_nce`: logits exist as tiles in registers, and as one chunk of gradients.

Forward: a program owns a block of rows of one view pair and walks all columns with an online log-sum-exp;
the other direction is the same kernel with the sides exchanged, since a column's sum belongs to no single
program.
Backward: a kernel turns tiles of logits into their gradient, one chunk of it is stored, and two library
matmuls take that to the embeddings. A kernel that kept a [rows, D] sum itself would need D = 512 fp32 numbers
a row in registers, or compute each logit once for every slice of D.

Shape letters: Va, Vb views, B rows, M columns, D embedding; u, v count views, i rows, j columns.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (a kernel's arguments are pointers, integers and constants that only triton can type)
from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill_kernels.chunks import CHUNK, block_size, blocks, compute_dtype, target_mean
from distill_kernels.compile_specs import Spec, make_spec

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(
    x_ptr, y_ptr, offs_i, offs_j, n, m,
    x_si, x_sd, y_sj, y_sd,
    D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    # x rows offs_i times y rows offs_j: [BLOCK_I, BLOCK_J], zero outside.
    offs_d = tl.arange(0, BLOCK_D)
    x_at = x_ptr + offs_i.to(tl.int64)[:, None] * x_si + offs_d[None, :] * x_sd
    y_at = y_ptr + offs_j.to(tl.int64)[None, :] * y_sj + offs_d[:, None] * y_sd
    acc = tl.zeros([BLOCK_I, BLOCK_J], ACC)
    for start in range(0, D, BLOCK_D):
        if D % BLOCK_D == 0:
            x = tl.load(x_at, mask=(offs_i < n)[:, None], other=0.0)
            y = tl.load(y_at, mask=(offs_j < m)[None, :], other=0.0)
        else:
            in_d = offs_d < D - start
            x = tl.load(x_at, mask=(offs_i < n)[:, None] & in_d[None, :], other=0.0)
            y = tl.load(y_at, mask=(offs_j < m)[None, :] & in_d[:, None], other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        acc = tl.dot(x, y, acc, input_precision=PRECISION, out_dtype=ACC)
        x_at += BLOCK_D * x_sd
        y_at += BLOCK_D * y_sd
    return acc


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
        z = scale * _tile(
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
    dot = _tile(
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


class Blocks(NamedTuple):
    """Block sizes for an element size; `kernels/bench/resources.py` holds their resources."""

    i: int
    j: int
    d: int
    warps: int
    stages: int


def block_sizes(itemsize: int) -> Blocks:
    """The shipped block sizes: what tensor cores like in half precision, what registers hold in fp32."""
    return Blocks(128, 128, 32, 8, 3) if itemsize <= 2 else Blocks(64, 64, 16, 4, 3)


def launch_lse(x: Tensor, y: Tensor, scale: Tensor, lse: Tensor) -> None:
    """Fill lse [Va, Vb, B] with the log-sum-exp over columns of scale * x [Va, B, D] @ y [Vb, M, D].T."""
    if lse.numel() == 0:
        return
    (va, n, _), (vb, m, _) = x.shape, y.shape
    size = block_sizes(x.element_size())
    _lse_kernel[(triton.cdiv(n, size.i), va * vb)](
        x, y, scale, lse, *x.stride(), *y.stride(), vb, n, m, **_constants(x, size)
    )


def launch_gradient(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    weight: Tensor,
    row_lse: Tensor,
    column_lse: Tensor | None,
    shift: int,
    dz: Tensor,
) -> Tensor:
    """Fill dz [nu * ni, nv * nj], contiguous: the logits' gradient for x [nu, ni, D] and y [nv, nj, D].

    Returns the gradient of scale, 0-dim.

    weight is [nu, nv], row_lse [nu, nv, ni], column_lse [nv, nu, nj] or None for one direction; row i's
    target is column i + shift.
    """
    (nu, ni, _), (nv, nj, _) = x.shape, y.shape
    size = block_sizes(x.element_size())
    grid = (triton.cdiv(nj, size.j), triton.cdiv(ni, size.i), nu * nv)
    d_scale = row_lse.new_empty(math.prod(grid))
    _gradient_kernel[grid](
        x,
        y,
        scale,
        weight,
        row_lse,
        column_lse,
        dz,
        d_scale,
        *x.stride(),
        *y.stride(),
        *row_lse.stride()[:2],
        *((0, 0) if column_lse is None else column_lse.stride()[:2]),
        *weight.stride(),
        nv,
        ni,
        nj,
        shift,
        SYMMETRIC=column_lse is not None,
        **_constants(x, size),
    )
    return d_scale.sum()


def _constants(x: Tensor, size: Blocks) -> dict[str, Any]:
    return {
        "D": x.shape[2],
        "BLOCK_I": size.i,
        "BLOCK_J": size.j,
        "BLOCK_D": size.d,
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        # The interpreter multiplies bf16 operands of a dot as raw bits (Triton 3.9).
        "UPCAST": triton.knobs.runtime.interpret and x.dtype == torch.bfloat16,
        "num_warps": size.warps,
        "num_stages": size.stages,
    }


@torch.library.custom_op("distill::info_nce_triton", mutates_args=())
def info_nce_triton(x: Tensor, y: Tensor, scale: Tensor, offset: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x [Va, B, D], y [Vb, M, D] of one dtype -> loss [Va, Vb], row lse [Va, Vb, B], column lse [Vb, Va, M].

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
    (va, n, d), (vb, m, _) = x.shape, y.shape
    dtype = compute_dtype(x, y)
    # The stored gradient has the inputs' dtype: keep it of the order of a softmax, so that fp16 holds it.
    largest = grad.abs().amax().clamp_min(torch.finfo(dtype).tiny) if grad.numel() else grad.new_zeros(())
    weight = (grad / largest).contiguous()
    factor = largest / (2 * n if symmetric else max(n, 1))
    dx, dy = x.new_zeros(x.shape, dtype=dtype), y.new_zeros(y.shape, dtype=dtype)
    d_scale = x.new_zeros((), dtype=dtype)
    limit_i, limit_j = CHUNK["cuda"]
    row_blocks, column_blocks = list(blocks(va, n, limit_i)), list(blocks(vb, m, limit_j))
    sizes = [max(map(block_size, some), default=0) for some in (row_blocks, column_blocks)]
    memory = x.new_empty(math.prod(sizes))
    for us, rows in row_blocks:
        xs = x[us, rows]
        for vs, columns in column_blocks:
            ys = y[vs, columns]
            shape = (xs.shape[0] * xs.shape[1], ys.shape[0] * ys.shape[1])
            dz = memory[: math.prod(shape)].view(shape)
            d_scale += launch_gradient(
                xs,
                ys,
                scale,
                weight[us, vs],
                row_lse[us, vs, rows],
                column_lse[vs, us, columns] if symmetric else None,
                offset + rows.start - columns.start,
                dz,
            )
            _add_product(dx[us, rows].view(-1, d), dz, ys.reshape(-1, d))
            _add_product(dy[vs, columns].view(-1, d), dz.T, xs.reshape(-1, d))
    factor_scale = factor * scale.to(dtype)
    return dx.mul_(factor_scale).to(x.dtype), dy.mul_(factor_scale).to(y.dtype), (d_scale * factor).to(scale.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed and added in total's dtype, fp32 or wider."""
    with torch.autocast(total.device.type, enabled=False):
        if left.dtype != total.dtype and left.is_cuda:
            total += torch.mm(left, right, out_dtype=total.dtype)
        else:
            total.addmm_(left.to(total.dtype), right.to(total.dtype))


@info_nce_triton_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    offset: int,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape), torch.empty_like(scale)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, scale, ctx.offset, ctx.symmetric = inputs
    ctx.save_for_backward(x, y, scale, output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, y, scale, row_lse, column_lse = ctx.saved_tensors
    out = info_nce_triton_backward(grad, x, y, scale, row_lse, column_lse, ctx.offset, ctx.symmetric)
    return (*out, None, None)


info_nce_triton.register_autograd(_backward, setup_context=_setup)


def compile_specs() -> list[Spec]:
    """The variants that `kernels/bench/resources.py` compiles: dtypes x D x directions."""
    specs = []
    for dtype, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for width in (512, 100):
            specs += _specs(dtype, itemsize, width)
    return specs


def _specs(dtype: str, itemsize: int, width: int) -> list[Spec]:
    size = block_sizes(itemsize)
    types = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "scale_ptr": "*fp32"}
    constants: dict[str, Any] = {
        "x_sd": 1,
        "y_sd": 1,
        "D": width,
        "BLOCK_I": size.i,
        "BLOCK_J": size.j,
        "BLOCK_D": size.d,
        "ACC": tl.float32,
        "PRECISION": "ieee",
        "UPCAST": False,
    }
    variant = f"{dtype} D={width}"
    options = {"warps": size.warps, "stages": size.stages}
    specs = [make_spec(_lse_kernel, variant, types | {"lse_ptr": "*fp32"}, constants, **options)]
    types |= {f"{name}_ptr": "*fp32" for name in ("weight", "row", "column", "d_scale")} | {"dz_ptr": f"*{dtype}"}
    for symmetric in (False, True):
        of_direction = constants | {"SYMMETRIC": symmetric} | ({} if symmetric else {"column_ptr": None})
        name = f"{variant} {'both directions' if symmetric else 'one direction'}"
        specs.append(make_spec(_gradient_kernel, name, types, of_direction, **options))
    return specs
