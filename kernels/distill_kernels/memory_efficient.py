"""What the ops' xformers backends share: `memory_efficient_attention`, and whether xformers has a kernel for a call.

Which kernels it has depends on the card and on how xformers was built: on GPUs newer than compute capability 9.0,
for example, none takes float32 or a mask. So it is asked, by its own dispatcher.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill_kernels.backends import why_not_gpu


class Call(NamedTuple):
    """The arguments of `xformers.ops.memory_efficient_attention`."""

    q: Tensor  # [N, Lq, H, K]
    k: Tensor  # [N, Lk, H, K]
    v: Tensor  # [N, Lk, H, K]
    bias: Any = None  # None, [N, H, Lq, Lk], or an xformers AttentionBias
    scale: float | None = None


def run(call: Call) -> Tensor:
    """softmax(q k^T * scale + bias) v: [N, Lq, H, K]."""
    from xformers.ops import memory_efficient_attention

    out: Tensor = memory_efficient_attention(call.q, call.k, call.v, attn_bias=call.bias, scale=call.scale)
    return out


def why_not_here(q: Tensor | None) -> str | None:
    """What rules xformers out before it is imported; `q` is None to ask for this machine only."""
    reason = why_not_gpu("xformers", None if q is None else q.device)
    if reason is not None or q is None:
        return reason
    if q.numel() == 0:
        return "no empty inputs"
    if q.shape[-1] % 8:
        return f"needs a head width that is a multiple of 8, got {q.shape[-1]}"
    return None


def why_not_kernel(call: Call) -> str | None:
    """None when xformers has kernels for this call, its backward pass included where gradients are asked for."""
    from xformers.ops import fmha
    from xformers.ops.fmha import dispatch

    inputs = fmha.Inputs(query=call.q, key=call.k, value=call.v, attn_bias=call.bias, scale=call.scale)
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (call.q, call.k, call.v))
    part = "forward"
    try:
        forward = dispatch._dispatch_fw(inputs, trains)
        part = "backward"
        if trains:
            dispatch._dispatch_bw(inputs, forward.VARLEN_LSE_PACKED)
    except NotImplementedError:
        bias = "no mask" if call.bias is None else f"a {type(call.bias).__name__} as its mask"
        return (
            f"xformers has no {part} kernel for {call.q.dtype}, head width {call.q.shape[-1]} and {bias} on "
            f"{call.q.device}; `python -m xformers.info` lists those it has"
        )
    return None
