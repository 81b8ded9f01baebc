"""The Triton kernels of the losses of all pairs of rows: InfoNCE and, where there is a bias, the sigmoid loss.

Forward: a program owns a block of rows of one view pair and walks all columns, for each row's log-sum-exp or its sum
of softplus. Backward: tiles of logits are turned into their gradient, one chunk of it is stored, and two library
matmuls take that to the embeddings. A kernel that kept a [rows, D] sum itself would need D = 512 fp32 numbers a row in
registers, or compute each logit once for every slice of D.

Shape letters: Va, Vb views, B rows, M columns, D embedding; u, v count views, i rows, j columns.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (a kernel's arguments are pointers, integers and constants that only triton can type)
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill_kernels.pairwise.chunks import chunk_blocks, compute_dtype
from distill_kernels.triton.compile_specs import Spec, make_spec, precisions
from distill_kernels.triton.launches import dot_precision, launch

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile(
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
    """x rows offs_i times y rows offs_j: [BLOCK_I, BLOCK_J], zero outside; BLOCK_D divides D."""
    offs_d = tl.arange(0, BLOCK_D)
    x_at = x_ptr + offs_i.to(tl.int64)[:, None] * x_si + offs_d[None, :] * x_sd
    y_at = y_ptr + offs_j.to(tl.int64)[None, :] * y_sj + offs_d[:, None] * y_sd
    acc = tl.zeros([BLOCK_I, BLOCK_J], ACC)
    for _ in range(0, D, BLOCK_D):
        x = tl.load(x_at, mask=(offs_i < n)[:, None], other=0.0)
        y = tl.load(y_at, mask=(offs_j < m)[None, :], other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        acc = tl.dot(x, y, acc, input_precision=PRECISION, out_dtype=ACC)
        x_at += BLOCK_D * x_sd
        y_at += BLOCK_D * y_sd
    return acc


@triton.jit
def row_kernel(
    x_ptr, y_ptr, scale_ptr, bias_ptr, out_ptr,
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
    """out [u, v, i], of the logits of x[u, i] with all rows of y[v]: their log-sum-exp, or with a bias the sum of their
    softplus. views is v's count.
    """
    u = (tl.program_id(1) // views).to(tl.int64)
    v = (tl.program_id(1) % views).to(tl.int64)
    offs_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    scale = tl.load(scale_ptr).to(ACC) * LOG2_E  # logits are in units of log2
    if bias_ptr is not None:
        bias = tl.load(bias_ptr).to(ACC) * LOG2_E
    else:
        largest = tl.full([BLOCK_I], float("-inf"), ACC)  # of the logits so far
    total = tl.zeros([BLOCK_I], ACC)
    for start in range(0, m, BLOCK_J):
        offs_j = start + tl.arange(0, BLOCK_J)
        z = scale * tile(
            x_ptr + u * x_su, y_ptr + v * y_sv, offs_i, offs_j, n, m, x_si, x_sd, y_sj, y_sd,
            D, BLOCK_I, BLOCK_J, BLOCK_D, ACC, PRECISION, UPCAST,
        )  # fmt: skip
        inside = (offs_j < m)[None, :]
        if bias_ptr is not None:
            z = bias + z
            # softplus = max(z, 0) + log1p(e). 1 + e loses the low digits of a small e, which is most of this loss:
            # log1p(e) = log(1 + e) e / ((1 + e) - 1), exact to rounding (Kahan).
            e = tl.exp2(-tl.abs(z))
            one = 1.0 + e
            rounded = one - 1.0
            log1p = tl.where(rounded == 0.0, e, tl.log(one) * (e / tl.where(rounded == 0.0, 1.0, rounded)))
            total += tl.sum(tl.where(inside, tl.maximum(z, 0.0) / LOG2_E + log1p, 0.0), 1)
        else:
            z = tl.where(inside, z, float("-inf"))
            new = tl.maximum(largest, tl.max(z, 1))
            shift = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp2(largest - shift) + tl.sum(tl.exp2(z - shift[:, None]), 1)
            largest = new
    if bias_ptr is None:
        total = (largest + tl.log2(total)) / LOG2_E
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * n + offs_i, total, mask=offs_i < n)


@triton.jit
def gradient_kernel(
    x_ptr, y_ptr, scale_ptr, bias_ptr, weight_ptr, row_ptr, column_ptr, dz_ptr, sums_ptr,
    x_su, x_si, x_sd,
    y_sv, y_sj, y_sd,
    weight_su, weight_sv,
    row_su, row_sv,
    column_sv, column_su,
    views, n, m, shift,
    D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dz [u, i, v, j], the gradient of logits: weight (row softmax (+ column softmax) - 1 (2) on the target), or with a
    bias weight (sigmoid - 1 on the target). Row i's target is column i + shift of this chunk.

    sums [programs, 1 or 2]: of dz times the logit without scale and bias, and with a bias of dz, taken here because the
    stored dz may be bf16.
    """
    u = (tl.program_id(2) // views).to(tl.int64)
    v = (tl.program_id(2) % views).to(tl.int64)
    offs_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    dot = tile(
        x_ptr + u * x_su, y_ptr + v * y_sv, offs_i, offs_j, n, m, x_si, x_sd, y_sj, y_sd,
        D, BLOCK_I, BLOCK_J, BLOCK_D, ACC, PRECISION, UPCAST,
    )  # fmt: skip
    target = 1.0
    if bias_ptr is not None:
        z = (tl.load(scale_ptr).to(ACC) * dot + tl.load(bias_ptr).to(ACC)) * LOG2_E
        dz = 1.0 / (1.0 + tl.exp2(-z))
    else:
        z = tl.load(scale_ptr).to(ACC) * LOG2_E * dot
        row = tl.load(row_ptr + u * row_su + v * row_sv + offs_i, mask=offs_i < n, other=0.0) * LOG2_E
        dz = tl.exp2(z - row[:, None])
        if column_ptr is not None:
            column = tl.load(column_ptr + v * column_sv + u * column_su + offs_j, mask=offs_j < m, other=0.0) * LOG2_E
            dz += tl.exp2(z - column[None, :])
            target = 2.0
    dz = tl.where(offs_i[:, None] + shift == offs_j[None, :], dz - target, dz)
    dz *= tl.load(weight_ptr + u * weight_su + v * weight_sv)
    # Outside, dz may be infinite. (Masking z instead takes 50 more registers.)
    inside = (offs_i < n)[:, None] & (offs_j < m)[None, :]
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    if bias_ptr is not None:
        dz = tl.where(inside, dz, 0.0)
        tl.store(sums_ptr + 2 * program, tl.sum(tl.sum(dz * dot, 1), 0))
        tl.store(sums_ptr + 2 * program + 1, tl.sum(tl.sum(dz, 1), 0))
    else:
        tl.store(sums_ptr + program, tl.sum(tl.sum(tl.where(inside, dz * dot, 0.0), 1), 0))
    # 32-bit offsets: a chunk is small, and 64-bit ones of a whole tile spill.
    at = ((tl.program_id(2) // views * n + offs_i) * views + tl.program_id(2) % views) * m
    tl.store(dz_ptr + at[:, None] + offs_j[None, :], dz.to(dz_ptr.dtype.element_ty), mask=inside)


class Blocks(NamedTuple):
    """Block sizes of the kernels; `kernels/bench/resources.csv` holds their resources."""

    i: int
    j: int
    d: int
    warps: int
    stages: int = 3


def block_sizes(itemsize: int, *, softplus: bool = False) -> Blocks:
    """The shipped block sizes: what tensor cores like in half precision, what registers hold in fp32.

    They divide the widths that the kernels take (`pairs.why_not_kernels`) into several steps each. `softplus`: of the
    forward kernel with a bias, whose logarithm spills on sm_80 with 128 columns.
    """
    if itemsize <= 2:
        return Blocks(128, 64 if softplus else 128, 32, 8)
    return Blocks(64, 64, 16, 4)


class Part(NamedTuple):
    """One chunk of the backward pass: x[us, rows] against y[vs, columns]."""

    us: slice
    rows: slice
    vs: slice
    columns: slice
    x: Tensor  # [nu, ni, D]
    y: Tensor  # [nv, nj, D]
    weight: Tensor  # [nu, nv]
    shift: int  # row i's target is column i + shift
    dz: Tensor  # [nu * ni, nv * nj], to be filled with weight times the loss's gradient for the logits


def reduce_rows(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Fill out [Va, Vb, B] from the logits scale * x [Va, B, D] @ y [Vb, M, D].T (+ bias).

    With their log-sum-exp over columns, in the presence of a bias with the sum of their softplus.
    """
    if out.numel() == 0:
        return
    (va, n, _), (vb, m, _) = x.shape, y.shape
    size = block_sizes(x.element_size(), softplus=bias is not None)
    grid = (triton.cdiv(n, size.i), va * vb)
    launch(row_kernel, grid, x, y, scale, bias, out, *x.stride(), *y.stride(), vb, n, m, **_constants(x, size))


def fill_gradient(
    part: Part, scale: Tensor, *, bias: Tensor | None = None, row: Tensor | None = None, column: Tensor | None = None
) -> Tensor:
    """Fill part.dz, contiguous, with the logits' gradient. Returns its sums with and, where there is a bias, without
    the logit, [1] or [2].

    With a bias of the sigmoid loss. Else of InfoNCE, whose log-sum-exps are row [nu, nv, ni] and column [nv, nu, nj],
    or None for one direction.
    """
    (nu, ni, _), (nv, nj, _) = part.x.shape, part.y.shape
    size = block_sizes(part.x.element_size())
    grid = (triton.cdiv(nj, size.j), triton.cdiv(ni, size.i), nu * nv)
    sums = part.weight.new_empty((math.prod(grid), 1 if bias is None else 2))
    launch(
        gradient_kernel,
        grid,
        part.x,
        part.y,
        scale,
        bias,
        part.weight,
        row,
        column,
        part.dz,
        sums,
        *part.x.stride(),
        *part.y.stride(),
        *part.weight.stride(),
        *((0, 0) if row is None else row.stride()[:2]),
        *((0, 0) if column is None else column.stride()[:2]),
        nv,
        ni,
        nj,
        part.shift,
        **_constants(part.x, size),
    )
    return sums.sum(0)


def _constants(x: Tensor, size: Blocks) -> dict[str, Any]:
    return {
        "D": x.shape[2],
        "BLOCK_I": size.i,
        "BLOCK_J": size.j,
        "BLOCK_D": size.d,
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "PRECISION": dot_precision(),
        # The interpreter multiplies bf16 operands of a dot as raw bits (Triton 3.9).
        "UPCAST": triton.knobs.runtime.interpret and x.dtype == torch.bfloat16,
        "num_warps": size.warps,
        "num_stages": 2 if torch.version.hip else size.stages,
        "enable_fp_fusion": True,
    }


def pairwise_gradients(
    grad: Tensor, x: Tensor, y: Tensor, scale: Tensor, offset: int, terms: int, fill: Callable[[Part], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, y (of their dtypes) and what `fill` returns, summed over the chunks, [2].

    grad is [Va, Vb], a pair's loss being the mean over rows of `terms` terms. `fill(part)` writes `part.dz` and
    returns the sums of dz times the logit without its scale, and of dz where they are asked for.
    """
    n, d = x.shape[1:]
    dtype = compute_dtype(x, y)
    # The stored gradient has the inputs' dtype: keep it of the order of a probability, so that fp16 holds it.
    largest = grad.abs().amax().clamp_min(torch.finfo(dtype).tiny) if grad.numel() else grad.new_zeros(())
    weight = (grad / largest).contiguous()
    factor = largest / (terms * max(n, 1))
    dx, dy = x.new_zeros(x.shape, dtype=dtype), y.new_zeros(y.shape, dtype=dtype)
    sums = x.new_zeros(2, dtype=dtype)
    for part in _parts(x, y, weight, offset):
        of_part = fill(part)
        sums[: len(of_part)] += of_part
        _add_product(dx[part.us, part.rows].view(-1, d), part.dz, part.y.reshape(-1, d))
        _add_product(dy[part.vs, part.columns].view(-1, d), part.dz.T, part.x.reshape(-1, d))
    factor_scale = factor * scale.to(dtype)
    return dx.mul_(factor_scale).to(x.dtype), dy.mul_(factor_scale).to(y.dtype), sums.mul_(factor)


def _parts(x: Tensor, y: Tensor, weight: Tensor, offset: int) -> Iterator[Part]:
    """The chunks in row-major order; each overwrites the dz of the one before."""
    row_blocks, column_blocks, largest = chunk_blocks(x, y)
    memory = x.new_empty(largest)
    for us, rows in row_blocks:
        for vs, columns in column_blocks:
            xs, ys = x[us, rows], y[vs, columns]
            shape = (xs.shape[0] * xs.shape[1], ys.shape[0] * ys.shape[1])
            dz = memory[: math.prod(shape)].view(shape)
            shift = offset + rows.start - columns.start
            yield Part(us, rows, vs, columns, xs, ys, weight[us, vs], shift, dz)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed and added in total's dtype, fp32 or wider."""
    with torch.autocast(total.device.type, enabled=False):
        if left.dtype != total.dtype and left.is_cuda:
            total += torch.mm(left, right, out_dtype=total.dtype)
        else:
            total.addmm_(left.to(total.dtype), right.to(total.dtype))


def compile_specs() -> list[Spec]:
    """The variants that `kernels/bench/resources.py` compiles: dtypes x D x what is computed.

    The recipes' widths, and the least. fp16 takes bf16's blocks and, on NVIDIA, exactly its registers: once.
    """
    specs = []
    for dtype, itemsize, widths in (("bf16", 2, (512, 128, 64)), ("fp16", 2, (512,)), ("fp32", 4, (512, 128, 64))):
        for width in widths:
            for precision in precisions(dtype):
                for what in ("lse", "softplus"):
                    size = block_sizes(itemsize, softplus=what == "softplus")
                    specs.append(_spec(row_kernel, what, dtype, width, precision, size))
                for what in ("one direction", "both directions", "sigmoid"):
                    specs.append(_spec(gradient_kernel, what, dtype, width, precision, block_sizes(itemsize)))
    return specs


def _spec(kernel: Any, what: str, dtype: str, width: int, precision: str, size: Blocks) -> Spec:
    absent = {
        "lse": ("bias",),
        "softplus": (),
        "one direction": ("bias", "column"),
        "both directions": ("bias",),
        "sigmoid": ("row", "column"),
    }[what]
    pointers = {name for name in kernel.arg_names if name.endswith("_ptr")}
    types = {name: f"*{dtype}" if name in ("x_ptr", "y_ptr", "dz_ptr") else "*fp32" for name in pointers}
    constants = {f"{name}_ptr": None for name in absent} | {
        "x_sd": 1,
        "y_sd": 1,
        "D": width,
        "BLOCK_I": size.i,
        "BLOCK_J": size.j,
        "BLOCK_D": size.d,
        "ACC": tl.float32,
        "PRECISION": precision,
        "UPCAST": False,
    }
    words = (dtype, f"D={width}", *([] if precision == "ieee" else [precision]), what)
    return make_spec(kernel, " ".join(words), types, constants, warps=size.warps, stages=size.stages)
