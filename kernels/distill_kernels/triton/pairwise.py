"""What the Triton kernels of the pairwise losses share: a tile of products, block sizes, and the backward sweep.

Forward: a program owns a block of rows of one view pair and walks all columns. Backward: a kernel turns tiles
of logits into their gradient, one chunk of it is stored, and two library matmuls take that to the embeddings.
A kernel that kept a [rows, D] sum itself would need D = 512 fp32 numbers a row in registers, or compute each
logit once for every slice of D.

Shape letters: Va, Vb views, B rows, M columns, D embedding; u, v count views, i rows, j columns.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (a kernel's arguments are pointers, integers and constants that only triton can type)
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill_kernels.pairwise.chunks import chunk_blocks, compute_dtype
from distill_kernels.triton.compile_specs import precisions
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
    """x rows offs_i times y rows offs_j: [BLOCK_I, BLOCK_J], zero outside."""
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


class Blocks(NamedTuple):
    """Block sizes for a (D, element size); `kernels/bench/resources.py` holds their resources."""

    i: int
    j: int
    d: int
    warps: int
    stages: int
    registers: int | None  # NVIDIA: the most that a thread may use; None leaves it to the compiler


def block_sizes(width: int, itemsize: int) -> Blocks:
    """The shipped block sizes: what tensor cores like in half precision, what registers hold in fp32.

    Rows whose width is no multiple of 16 are not aligned: their many addresses take the registers of half the
    columns. Widths of one block need the bound, without which NVIDIA's compiler spills some bytes to fit one more
    program on a multiprocessor.
    """
    i, j, d, warps = (128, 128, 32, 8) if itemsize <= 2 else (64, 64, 16, 4)
    aligned = width % 16 == 0
    return Blocks(i, j if aligned else j // 2, d, warps, 3, None if aligned and width > d else 255)


def launch_constants(x: Tensor) -> dict[str, Any]:
    """The constants of a launch on embeddings like x [.., .., D]."""
    size = block_sizes(x.shape[2], x.element_size())
    constants = {
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
    return constants if torch.version.hip else constants | {"maxnreg": size.registers}


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


def launch_rows(kernel: Any, x: Tensor, y: Tensor, scalars: Sequence[Tensor], out: Tensor, **changed: int) -> None:
    """A forward kernel: fill out [Va, Vb, B] from x [Va, B, D] against all of y [Vb, M, D]."""
    if out.numel() == 0:
        return
    (va, n, _), (vb, m, _) = x.shape, y.shape
    constants = launch_constants(x) | changed
    grid = (triton.cdiv(n, constants["BLOCK_I"]), va * vb)
    launch(kernel, grid, x, y, *scalars, out, *x.stride(), *y.stride(), vb, n, m, **constants)


def tiles_of(part: Part) -> tuple[int, int, int]:
    """The grid of a backward kernel."""
    (nu, ni, _), (nv, nj, _) = part.x.shape, part.y.shape
    size = block_sizes(part.x.shape[2], part.x.element_size())
    return triton.cdiv(nj, size.j), triton.cdiv(ni, size.i), nu * nv


def launch_tiles(
    kernel: Any, part: Part, tensors: Sequence[Tensor | None], strides: Sequence[int], **more: Any
) -> None:
    """A backward kernel over a part's tiles; `strides` are of tensors between x, y and the weight."""
    (_, ni, _), (nv, nj, _) = part.x.shape, part.y.shape
    launch(
        kernel,
        tiles_of(part),
        part.x,
        part.y,
        *tensors,
        *part.x.stride(),
        *part.y.stride(),
        *strides,
        *part.weight.stride(),
        nv,
        ni,
        nj,
        part.shift,
        **more,
        **launch_constants(part.x),
    )


def pairwise_gradients(
    grad: Tensor, x: Tensor, y: Tensor, scale: Tensor, offset: int, terms: int, fill: Callable[[Part], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, y (of their dtypes) and what `fill` returns, summed over the chunks, [2].

    grad is [Va, Vb], a pair's loss being the mean over rows of `terms` terms. `fill(part)` writes `part.dz` and
    returns [2]: the sums of dz times the logit without its scale, and of dz.
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
        sums += fill(part)
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


class Variant(NamedTuple):
    """A dtype, an embedding width and a precision of fp32 products, as `kernels/bench/resources.py` compiles them."""

    name: str
    dtype: str
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]


def variants() -> Iterator[Variant]:
    """The variants that each kernel is compiled for ahead of time.

    Widths of one block and of several, that fill their blocks or not, aligned or not. fp16 takes bf16's blocks and,
    on NVIDIA, exactly its registers: once.
    """
    widths = (512, 100, 80, 32, 16, 8)
    for dtype, itemsize, of in (("bf16", 2, widths), ("fp16", 2, (512,)), ("fp32", 4, widths)):
        for width in of:
            size = block_sizes(width, itemsize)
            for precision in precisions(dtype):
                yield Variant(
                    f"{dtype} D={width}{'' if precision == 'ieee' else f' {precision}'}",
                    dtype,
                    {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "scale_ptr": "*fp32"},
                    {
                        "x_sd": 1,
                        "y_sd": 1,
                        "D": width,
                        "BLOCK_I": size.i,
                        "BLOCK_J": size.j,
                        "BLOCK_D": size.d,
                        "ACC": tl.float32,
                        "PRECISION": precision,
                        "UPCAST": False,
                    },
                    {
                        "warps": size.warps,
                        "stages": size.stages,
                        "registers": size.registers,
                        "aligned": width % 16 == 0,
                    },
                )
