"""Self-attention over packed sequences of unequal lengths, so that short captions pay for no padding.

Shape letters: T tokens of all sequences, one after the other, N sequences, H heads, K head width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from distill_kernels import memory_efficient
from distill_kernels.backends import Backend, Op, choose, why_not_gpu, why_not_new
from distill_kernels.self_attention import autocast, self_attention

# Lengths are grouped by multiples of this: fewer calls against less padding (measured from 1 to all at once).
_GROUP = 8


class PackedInputs(NamedTuple):
    """The arguments of `packed_attention`, with the lengths read."""

    q: Tensor  # [T, H, K]
    k: Tensor
    v: Tensor
    cu_lengths: Tensor  # [N + 1]
    lengths: tuple[int, ...]  # N
    causal: bool


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_lengths: Tensor,
    *,
    causal: bool = False,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v within each sequence: q, k, v [T, H, K] -> [T, H, K].

    The lengths are read on the host, once for a `cu_lengths` tensor: hand every layer the same one, on the CPU if it
    is known there, so that the host need not wait for a GPU. Under torch.compile the call is a graph break.

    Args:
        q: [T, H, K].
        k: [T, H, K].
        v: [T, H, K].
        cu_lengths: [N + 1] int, the first row of each sequence, then T; on any device. Sequences may be empty.
        causal: token i of a sequence attends to its tokens 0..i.
        backend: "reference", "loop" (a sequence at a time, no copies), "grouped" (sequences of like length
            padded to one `self_attention`), "varlen" (torch's flash kernel, GPU), "xformers" (block-diagonal
            mask, GPU), or "auto".

    Raises:
        ValueError: shapes or lengths that do not fit; as `BackendError`, a backend that is unknown or cannot
            run this.
    """
    if q.ndim != 3 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"q, k, v must be [T, H, K], got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}")
    out: Tensor = _packed_attention(q, k, v, cu_lengths, causal, backend)
    return out


@torch._disable_dynamo  # type: ignore[attr-defined]  # (torch.compiler.disable would import dynamo with this)
def _packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_lengths: Tensor, causal: bool, backend: str) -> Tensor:
    q, k, v = autocast(q, k, v)
    inputs = PackedInputs(q, k, v, cu_lengths, _lengths(cu_lengths, q.shape[0]), causal)
    chosen = choose(OP, backend, inputs)
    with torch.autocast(q.device.type, enabled=False):
        out: Tensor = chosen.run(inputs)
    return out


# cu_lengths -> (its version, the lengths): a copy from the device for each tensor, not for each layer.
_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _lengths(cu_lengths: Tensor, tokens: int) -> tuple[int, ...]:
    """The sequences' lengths. Raises ValueError when `cu_lengths` does not describe `tokens` rows."""
    if cu_lengths.ndim != 1 or cu_lengths.is_floating_point() or len(cu_lengths) == 0:
        raise ValueError(f"cu_lengths must be [N + 1] integers, got {cu_lengths.dtype} {[*cu_lengths.shape]}")
    version = None if cu_lengths.is_inference() else cu_lengths._version
    known = _read.get(cu_lengths) if version is not None else None  # type: ignore[no-untyped-call]
    if known is not None and known[0] == version:
        lengths: tuple[int, ...] = known[1]
    else:
        bounds = cu_lengths.tolist()
        lengths = tuple(b - a for a, b in pairwise(bounds))
        if bounds[0] != 0 or min(lengths, default=0) < 0:
            raise ValueError(f"cu_lengths must start at 0 and not fall, got {bounds[:16]}")
        if version is not None:
            _read[cu_lengths] = (version, lengths)
    if sum(lengths) != tokens:
        raise ValueError(f"cu_lengths ends at {sum(lengths)}, but there are {tokens} tokens")
    return lengths


def _one_by_one(x: PackedInputs, backend: str) -> Tensor:
    parts = []
    for q, k, v in zip(*(torch.split(t, list(x.lengths)) for t in (x.q, x.k, x.v)), strict=True):
        if len(q):
            q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # [1, H, L, K]
            parts.append(self_attention(q, k, v, causal=x.causal, backend=backend)[0].transpose(0, 1))
    return torch.cat(parts) if parts else x.q * x.k * x.v  # nothing, with a gradient


def _reference(x: PackedInputs) -> Tensor:
    return _one_by_one(x, "reference")


def _loop(x: PackedInputs) -> Tensor:
    return _one_by_one(x, "auto")


class _Group(NamedTuple):
    sequences: int
    length: int
    valid: Tensor | None  # [sequences, length], None when there is no padding


class _Layout(NamedTuple):
    """Where packed rows lie in the groups, and back."""

    groups: tuple[_Group, ...]
    source: Tensor | None  # [P] packed row of each padded row; None when packed and padded are the same
    place: Tensor  # [T] padded row of each packed row


# Kept tensors are made outside of inference mode, in which they could not take part in training later.
@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _layout(lengths: tuple[int, ...], device: torch.device) -> _Layout:
    """Group sequences whose lengths round up to the same multiple of _GROUP."""
    length = torch.tensor(lengths)
    start = length.cumsum(0) - length
    rounded = (length + _GROUP - 1) // _GROUP
    groups, sources, base = [], [], 0
    place = torch.empty(int(length.sum()), dtype=torch.long)
    for size in sorted({*rounded.tolist()} - {0}):
        members = (rounded == size).nonzero()[:, 0]
        longest = int(length[members].max())
        offset = torch.arange(longest)
        valid = offset < length[members, None]  # [sequences, longest]
        source = start[members, None] + offset.where(valid, 0)  # padding repeats a sequence's first token
        padded = base + torch.arange(source.numel()).view_as(source)
        place[source[valid]] = padded[valid]
        groups.append(_Group(len(members), longest, None if bool(valid.all()) else valid.to(device)))
        sources.append(source.flatten())
        base += source.numel()
    same = base == len(place) and bool((place == torch.arange(base)).all())
    return _Layout(tuple(groups), None if same else torch.cat(sources).to(device), place.to(device))


class _Pad(torch.autograd.Function):
    """Rows [T, ...] to padded rows [P, ...]. Padding gets no gradient, so backward is a gather as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, source)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return grad.index_select(0, place), None, None


class _Unpad(torch.autograd.Function):
    """Padded rows [P, ...] to rows [T, ...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.shape = x.shape
        return x.index_select(0, place)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(0, place, grad), None


def _grouped(x: PackedInputs) -> Tensor:
    heads, width = x.q.shape[1:]
    layout = _layout(x.lengths, x.q.device)
    if not layout.groups:
        return x.q * x.k * x.v  # nothing, with a gradient
    rows = [group.sequences * group.length for group in layout.groups]
    padded = [t.flatten(1) for t in (x.q, x.k, x.v)]  # 3 of [T, H * K]
    if layout.source is not None:
        padded = [_Pad.apply(t, layout.source, layout.place) for t in padded]  # type: ignore[no-untyped-call]
    outs = []
    for group, *qkv in zip(layout.groups, *(torch.split(t, rows) for t in padded), strict=True):
        q, k, v = (t.view(group.sequences, group.length, heads, width).transpose(1, 2) for t in qkv)
        # Causal attention never looks right, where the padding is.
        out = self_attention(q, k, v, causal=x.causal, mask=None if x.causal else group.valid)
        outs.append(out.transpose(1, 2).reshape(-1, heads * width))
    joined = outs[0] if len(outs) == 1 else torch.cat(outs)
    if layout.source is not None:
        joined = _Unpad.apply(joined, layout.place)  # type: ignore[no-untyped-call]
    return joined.view(x.q.shape)


def _varlen(x: PackedInputs) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds = x.cu_lengths.to(x.q.device, torch.int32, non_blocking=True)
    longest = max(x.lengths)
    if "window_size" in inspect.signature(varlen_attn).parameters:
        causal: dict[str, Any] = {"window_size": (-1, 0) if x.causal else (-1, -1)}
    else:  # torch 2.10
        causal = {"is_causal": x.causal}
    out = varlen_attn(x.q, x.k, x.v, bounds, bounds, longest, longest, **causal)
    assert isinstance(out, Tensor)
    return out


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _block_diagonal(lengths: tuple[int, ...], causal: bool, device: torch.device) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens([n for n in lengths if n], device=device)
    return mask.make_causal() if causal else mask


def _xformers_call(x: PackedInputs) -> memory_efficient.Call:
    mask = _block_diagonal(x.lengths, x.causal, x.q.device)
    return memory_efficient.Call(x.q[None], x.k[None], x.v[None], mask)


def _xformers(x: PackedInputs) -> Tensor:
    return memory_efficient.run(_xformers_call(x))[0]


def _runs(x: PackedInputs | None) -> str | None:
    return None


def _why_not_varlen(x: PackedInputs | None) -> str | None:
    device = None if x is None else x.q.device
    reason = why_not_gpu("torch.nn.attention.varlen", device) or why_not_new(device)
    if reason is not None or x is None:
        return reason
    if x.q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 or bfloat16, got {x.q.dtype}"
    if x.q.shape[2] % 8 or x.q.shape[2] > 256:
        return f"needs a head width that is a multiple of 8, up to 256, got {x.q.shape[2]}"
    if x.q.numel() == 0:
        return "no empty inputs"
    # Without a causal mask it has given NaN there (pytorch issue 173469).
    return "not on ROCm; use grouped or xformers" if torch.version.hip else None


def _why_not_xformers(x: PackedInputs | None) -> str | None:
    reason = memory_efficient.why_not_here(None if x is None else x.q)
    return reason or (None if x is None else memory_efficient.why_not_kernel(_xformers_call(x)))


def _order(x: PackedInputs) -> Sequence[str]:
    if x.q.is_cuda:
        return ("varlen", "grouped")
    if _layout(x.lengths, x.q.device).source is None:
        return ("grouped", "loop")  # nothing to copy
    # Measured (bench_packed_attention.py): copies cost more than calls when sequences are few or long, the
    # sooner the cheaper the attention itself is.
    if x.q.dtype.itemsize < 4:
        long = 96
    else:
        long = 48 if _trains(x) else 20
    few_or_long = len(x.lengths) <= 16 or len(x.q) >= long * len(x.lengths)
    return ("loop", "grouped") if few_or_long else ("grouped", "loop")


def _trains(x: PackedInputs) -> bool:
    return torch.is_grad_enabled() and (x.q.requires_grad or x.k.requires_grad or x.v.requires_grad)


def _bucket(x: PackedInputs) -> str:
    n, mean = len(x.lengths), len(x.q) // max(len(x.lengths), 1)
    sizes = f"N<={1 << max(n - 1, 0).bit_length()} mean<={1 << max(mean - 1, 0).bit_length()}"
    return f"{x.q.dtype} {sizes} K{x.q.shape[2]} causal={x.causal} train={_trains(x)}"


def _cases(device: torch.device) -> Iterable[PackedInputs]:
    for n, low, high, h, width, causal in (
        (48, 10, 42, 8, 64, True),
        (1024, 4, 16, 4, 32, True),
        (8, 100, 197, 12, 64, False),
    ):
        lengths = torch.randint(low, high, (n,))
        cu_lengths = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0))).to(device)
        for dtype in (torch.float32, torch.bfloat16):
            new = functools.partial(torch.randn, device=device, dtype=dtype, requires_grad=True)
            q, k, v = (new(int(lengths.sum()), h, width) for _ in range(3))
            yield PackedInputs(q, k, v, cu_lengths, tuple(lengths.tolist()), causal)


OP = Op(
    name="packed_attention",
    backends=(
        Backend("reference", _runs, _reference),
        Backend("loop", _runs, _loop),
        Backend("grouped", _runs, _grouped),
        Backend("varlen", _why_not_varlen, _varlen),
        Backend("xformers", _why_not_xformers, _xformers),
    ),
    order=_order,
    bucket=_bucket,
    cases=_cases,
    device=lambda x: x.q.device,
)
