"""The Triton backend of `cross_attention` as PyTorch operators, with fake and autograd implementations.

Shape letters: B samples, H heads, V queries, L tokens, K head width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from distill_kernels.triton.cross_attention_kernels import (
    Blocks,
    blocks,
    cross_attention_backward,
    cross_attention_forward,
)
from distill_kernels.triton.launches import dot_precision, launch


def triton_cross_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention of q [B, H, V, K] over k, v [B, H, L, K] -> [B, H, V, K], differentiable once in q, k, v."""
    out: Tensor
    out, _ = torch.ops.distill.cross_attention(q, k, v, lengths, mask, scale)
    return out


@torch.library.custom_op("distill::cross_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _forward_outputs(q)
    lengths = None if lengths is None else lengths.contiguous()
    launch_forward(q, k, v, lengths, mask, scale, out, lse)
    return out, lse


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _forward_outputs(q)


def _forward_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("distill::cross_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if q.shape[2] == 0:
        return dq, dk.zero_(), dv.zero_()
    lengths = None if lengths is None else lengths.contiguous()
    block = blocks(q.shape[2], q.shape[3], q.element_size(), dot_precision()).queries
    if q.shape[2] <= block:
        launch_backward(dout, q, k, v, out, lse, lengths, mask, scale, dq, dk, dv)
        return dq, dk, dv
    # Sums over blocks of queries are kept wide between launches.
    wide = torch.promote_types(k.dtype, torch.float32)
    dk_sum, dv_sum = torch.empty_like(k, dtype=wide), torch.empty_like(v, dtype=wide)
    for first in range(0, q.shape[2], block):
        launch_backward(dout, q, k, v, out, lse, lengths, mask, scale, dq, dk_sum, dv_sum, first)
    return dq, dk.copy_(dk_sum), dv.copy_(dv_sum)


@_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lengths, mask, scale = inputs
    ctx.save_for_backward(q, k, v, *output, lengths, mask)
    ctx.scale = scale
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, lengths, mask = ctx.saved_tensors
    dq, dk, dv = torch.ops.distill.cross_attention_backward(dout, q, k, v, out, lse, lengths, mask, ctx.scale)
    return dq, dk, dv, None, None, None


_forward.register_autograd(_gradient, setup_context=_keep)


@register_flop_formula(torch.ops.distill.cross_attention)
def _(q: torch.Size, k: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * _product(q, k)


@register_flop_formula(torch.ops.distill.cross_attention_backward)
def _(dout: torch.Size, q: torch.Size, k: torch.Size, *_: Any, **__: Any) -> int:
    return 5 * _product(q, k)  # the scores again, then of the weights, v, q and k


def _product(q: torch.Size, k: torch.Size) -> int:
    b, h, queries, width = q
    return 2 * b * h * queries * k[2] * width


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill out [B, H, V, K] and lse [B, H, V] (natural log; +inf where a sample has no valid token)."""
    b, h, queries, width = q.shape
    if out.numel() == 0:
        return
    size = blocks(queries, width, q.element_size(), dot_precision())
    launch(
        cross_attention_forward,
        (b * h, triton.cdiv(queries, size.queries)),
        q,
        k,
        v,
        out,
        lse,
        lengths,
        mask,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *out.stride(),
        *((0, 0) if mask is None else mask.stride()),
        h,
        queries,
        k.shape[2],
        scale,
        BLOCK_L=size.forward,
        **_constants(q, size, lengths, mask),
    )


def launch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    first: int = 0,
) -> None:
    """Fill dk and dv [B, H, L, K], and one block of dq's queries from `first`.

    With first > 0, dk and dv hold the sums of earlier blocks and are added to.
    """
    b, h, queries, width = q.shape
    if k.numel() == 0:
        dq.zero_()
        return
    size = blocks(queries, width, q.element_size(), dot_precision())
    launch(
        cross_attention_backward,
        (b * h,),
        dout,
        q,
        k,
        v,
        out,
        lse,
        lengths,
        mask,
        dq,
        dk,
        dv,
        *dout.stride(),
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *out.stride(),
        *((0, 0) if mask is None else mask.stride()),
        *dq.stride(),
        *dk.stride(),
        *dv.stride(),
        h,
        queries,
        k.shape[2],
        first,
        scale,
        BLOCK_L=size.backward,
        ADD=first > 0,
        **_constants(q, size, lengths, mask),
    )


def _constants(q: Tensor, size: Blocks, lengths: Tensor | None, mask: Tensor | None) -> dict[str, Any]:
    constants = {
        "WIDTH": q.shape[3],
        "BLOCK_V": size.queries,
        "BLOCK_K": size.width,
        "HAS_LENGTHS": lengths is not None,
        "HAS_MASK": mask is not None,
        "ACC": tl.float64 if q.dtype == torch.float64 else tl.float32,
        "PRECISION": dot_precision(),
        # The interpreter multiplies bf16 operands of a dot as raw bits (Triton 3.9).
        "UPCAST": triton.knobs.runtime.interpret and q.dtype == torch.bfloat16,
        "num_warps": size.warps,
        "num_stages": 2 if torch.version.hip else size.stages,
        "enable_fp_fusion": True,
    }
    return constants if torch.version.hip else constants | {"maxnreg": size.registers}
