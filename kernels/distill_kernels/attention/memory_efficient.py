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


class Build(NamedTuple):
    """What xformers' compiled part was built against."""

    torch: str  # "2.10.0+cu128": the oldest in which it loads
    cuda: int | None  # major version


def build() -> Build | None:
    """Of the installed xformers; None where it does not say.

    Read from its own note: importing it takes seconds, and warns where its kernels do not load.
    """
    spec = importlib.util.find_spec("xformers")
    note = Path(spec.origin).parent / "cpp_lib.json" if spec is not None and spec.origin else None
    if note is None or not note.is_file():
        return None
    versions = json.loads(note.read_text(encoding="utf-8"))["version"]
    cuda: int | None = versions["cuda"]
    return Build(versions["torch"], cuda and cuda // 100)


@once
def why_not_built() -> str | None:
    """Why xformers' kernels do not load in this torch.

    From 0.0.34 on they use torch's stable ABI, and load in every later torch of the same major version of CUDA, whose
    libraries they are linked to. (Its attention then runs torch's own flash and memory-efficient kernels.)
    """
    built = build()
    if built is None or built.cuda is None:
        return None
    here = f"in torch {torch.__version__}"
    if torch.version.cuda is None:
        return f"its kernels are for CUDA {built.cuda} and do not load {here}, which has no CUDA"
    cuda = torch.version.cuda.split(".")[0]
    if cuda != str(built.cuda):
        return f"its kernels are for CUDA {built.cuda} and do not load {here}, which is for CUDA {cuda}"
    if _minor(torch.__version__) < _minor(built.torch):
        return f"its kernels were built for torch {built.torch} and do not load {here}, which is older"
    return None


def _minor(version: str) -> tuple[int, ...]:
    """(2, 10) of "2.10.0+cu128"."""
    return tuple(int(part) for part in version.split(".")[:2])


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
