"""What the ops' xformers backends share: `memory_efficient_attention`, and whether xformers has a kernel for a call.

Which kernels it has depends on the card and on how xformers was built: on GPUs newer than compute capability 9.0,
for example, none takes float32 or a mask. So it is asked, by its own dispatcher.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill_kernels.machine import once, why_not_gpu


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


def built_for() -> str | None:
    """The torch that xformers' compiled part was built for, "2.10.0+cu128" say; None where it does not say.

    Read from its own note: importing it takes seconds, and warns where its kernels do not load.
    """
    spec = importlib.util.find_spec("xformers")
    note = Path(spec.origin).parent / "cpp_lib.json" if spec is not None and spec.origin else None
    if note is None or not note.is_file():
        return None
    built: str = json.loads(note.read_text(encoding="utf-8"))["version"]["torch"]
    return built


@once
def why_not_built() -> str | None:
    """Why xformers' kernels do not load in this torch: they fit the minor version that they were built for."""
    built = built_for()
    if built is None or built.split(".")[:2] == torch.__version__.split(".")[:2]:
        return None
    return f"its kernels were built for torch {built} and do not load in {torch.__version__}"


def why_not_here(q: Tensor | None) -> str | None:
    """What rules xformers out before it is imported; `q` is None to ask for this machine only."""
    reason = why_not_gpu("xformers", None if q is None else q.device) or why_not_built()
    if reason is not None or q is None:
        return reason
    if q.numel() == 0:
        return "no empty inputs"
    if q.is_cuda and not torch.cuda.is_available():
        return "it says which kernels it has only where there is a GPU"
    if q.shape[-1] % 8:
        return f"needs a head width that is a multiple of 8, got {q.shape[-1]}"
    return None


_answers: dict[tuple[Any, ...], str | None] = {}


def why_not_kernel(call: Call) -> str | None:
    """None when xformers has kernels for this call, its backward pass included where gradients are asked for.

    Its dispatcher is asked once for each device, dtype, widths, and kind and alignment of mask.
    """
    q, k, bias = call.q, call.k, call.bias
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, call.v))
    aligned = bias.stride(-2) % 8 if isinstance(bias, Tensor) else 0
    kind = (type(bias), getattr(bias, "dtype", None), aligned)
    key = (q.device, q.dtype, q.shape[-1], k.shape[-1], *kind, trains)
    if key not in _answers:
        _answers[key] = _ask(call, trains)
    return _answers[key]


def _ask(call: Call, trains: bool) -> str | None:
    from xformers.ops import fmha
    from xformers.ops.fmha import dispatch

    inputs = fmha.Inputs(query=call.q, key=call.k, value=call.v, attn_bias=call.bias, scale=call.scale)
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
