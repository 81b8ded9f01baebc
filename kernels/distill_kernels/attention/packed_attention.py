"""Self-attention over packed sequences of unequal lengths, so that short captions pay for no padding.

Shape letters: T tokens of all sequences, one after the other, N sequences, H heads, K head width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from distill_kernels.attention import memory_efficient
from distill_kernels.attention.self_attention import autocast, self_attention, split_heads
from distill_kernels.defaults import numbers_for
from distill_kernels.dispatch import Backend, Inputs, Op, choose
from distill_kernels.machine import why_not_gpu, why_not_new


@dataclass
class PackedInputs(Inputs):
    """The arguments of `packed_attention`, cast for autocast, with the lengths read."""

    qkv: Tensor  # [T, 3, H, K]
    cu_lengths: Tensor  # [N + 1]
    lengths: tuple[int, ...]  # N
    causal: bool

    @property
    def leading(self) -> Tensor:
        """All rows."""
        return self.qkv

    @property
    def N(self) -> int:
        """Sequences."""
        return len(self.lengths)

    @property
    def mean(self) -> int:
        """Tokens a sequence, rounded down."""
        return len(self.qkv) // max(self.N, 1)

    @property
    def K(self) -> int:
        """Head width."""
        return self.qkv.shape[3]

    @property
    def copies(self) -> bool:
        """Whether `grouped` must copy: sequences of a group differ in length, or do not stand together."""
        return _layout_of(self).source is not None

    @property
    def train(self) -> bool:
        """Whether a gradient is asked for."""
        return torch.is_grad_enabled() and self.qkv.requires_grad


def packed_attention(qkv: Tensor, cu_lengths: Tensor, *, causal: bool = False, backend: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(K)) v within each sequence, qkv [T, 3, H, K] being q, k and v -> [T, H, K].

    The three come in one tensor, as a joint projection leaves them, and their gradients are written into one.

    The lengths are read on the host, and copied to a GPU that wants them, once for a `cu_lengths` tensor: hand every
    layer the same one, on the CPU if it is known there, so that the host need not wait for a GPU. Under torch.compile
    the call is one operator, for any lengths, whose backward pass computes the attention again.

    Args:
        qkv: [T, 3, H, K].
        cu_lengths: [N + 1] int, the first row of each sequence, then T; on any device. Sequences may be empty.
        causal: token i of a sequence attends to its tokens 0..i.
        backend: "reference", "loop" (a sequence at a time, no copies), "grouped" (sequences of like length
            padded to one `self_attention`), "varlen" (torch's flash kernel, GPU), "xformers" (block-diagonal
            mask, GPU), or "auto".

    Raises:
        ValueError: shapes or lengths that do not fit; as `BackendError`, a backend that is unknown or cannot
            run this.
    """
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be [T, 3, H, K], got {[*qkv.shape]}")
    (qkv,) = autocast(qkv)
    if torch.compiler.is_compiling():
        compiled: Tensor = torch.ops.distill.packed_attention(qkv, cu_lengths, causal, backend)
        return compiled
    return _packed_attention(qkv, cu_lengths, causal, backend)


def _packed_attention(qkv: Tensor, cu_lengths: Tensor, causal: bool, backend: str) -> Tensor:
    inputs = PackedInputs(qkv, cu_lengths, _lengths(cu_lengths, qkv.shape[0]), causal)
    chosen = choose(OP, backend, inputs)
    with torch.autocast(qkv.device.type, enabled=False):
        out: Tensor = chosen.run(inputs)
    return out


@torch.library.custom_op("distill::packed_attention", mutates_args=())
def _operator(qkv: Tensor, cu_lengths: Tensor, causal: bool, backend: str) -> Tensor:
    return _packed_attention(qkv, cu_lengths, causal, backend).clone()  # an operator returns no view of its inputs


@_operator.register_fake
def _(qkv: Tensor, cu_lengths: Tensor, causal: bool, backend: str) -> Tensor:
    tokens, _, heads, width = qkv.shape
    return qkv.new_empty(tokens, heads, width)


@torch.library.custom_op("distill::packed_attention_backward", mutates_args=())
def _backward_operator(grad: Tensor, qkv: Tensor, cu_lengths: Tensor, causal: bool, backend: str) -> Tensor:
    autograd = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(autograd, False), torch.enable_grad():  # operators run below autograd
        leaf = qkv.detach().requires_grad_()
        out = _packed_attention(leaf, cu_lengths, causal, backend)
        (gradient,) = torch.autograd.grad(out, leaf, grad)
    return gradient.clone(memory_format=torch.contiguous_format)


@_backward_operator.register_fake
def _(grad: Tensor, qkv: Tensor, cu_lengths: Tensor, causal: bool, backend: str) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.distill.packed_attention_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


_operator.register_autograd(_differentiate, setup_context=_keep)

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


# cu_lengths -> (its version, an int32 copy on the device that attends).
_copied: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _bounds(cu_lengths: Tensor, device: torch.device) -> Tensor:
    """`cu_lengths` as int32 on `device`; one copy, from pinned memory, for all layers."""
    version = None if cu_lengths.is_inference() else cu_lengths._version
    known = _copied.get(cu_lengths) if version is not None else None  # type: ignore[no-untyped-call]
    if known is not None and known[0] == version and known[1].device == device:
        copied: Tensor = known[1]
        return copied
    bounds = cu_lengths.to(torch.int32)
    if bounds.device.type == "cpu" and device.type == "cuda":
        bounds = bounds.pin_memory()
    copied = bounds.to(device, non_blocking=True)
    if version is not None and copied is not cu_lengths:  # which would hold itself
        _copied[cu_lengths] = (version, copied)
    return copied


def _attend(rows: Tensor, groups: Sequence[_Group], causal: bool, backend: str) -> Tensor:
    """Rows [P, 3, H, K] of groups of sequences, one after the other -> [P, H, K]."""
    if not groups:
        return rows.sum(1)  # nothing, with a gradient
    outs = []
    for group, q, k, v in zip(groups, *split_heads(rows, [group[:2] for group in groups]), strict=True):
        # Causal attention never looks right, where the padding is.
        out = self_attention(q, k, v, causal=causal, mask=None if causal else group.valid, backend=backend)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _one_by_one(x: PackedInputs, backend: str) -> Tensor:
    return _attend(x.qkv, [_Group(1, length, None) for length in x.lengths if length], x.causal, backend)


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


def _layout_of(x: PackedInputs) -> _Layout:
    return _layout(x.lengths, x.device, int(numbers_for("packed_groups", x.qkv)["multiple"]))


# Kept tensors are made outside of inference mode, in which they could not take part in training later.
@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _layout(lengths: tuple[int, ...], device: torch.device, multiple: int) -> _Layout:
    """Group sequences whose lengths round up to the same one of `multiple`'s."""
    length = torch.tensor(lengths)
    start = length.cumsum(0) - length
    rounded = (length + multiple - 1) // multiple
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
    layout = _layout_of(x)
    rows = x.qkv
    if layout.source is not None:
        rows = _Pad.apply(rows, layout.source, layout.place)  # type: ignore[no-untyped-call]
    out = _attend(rows, layout.groups, x.causal, "auto")
    if layout.source is not None:
        out = _Unpad.apply(out, layout.place)  # type: ignore[no-untyped-call]
    return out


@functools.cache
def _takes_window(varlen_attn: Callable[..., Any]) -> bool:
    return "window_size" in inspect.signature(varlen_attn).parameters


def _varlen(x: PackedInputs) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = x.qkv.unbind(1)
    bounds = _bounds(x.cu_lengths, q.device)
    longest = max(x.lengths)
    if _takes_window(varlen_attn):
        causal: dict[str, Any] = {"window_size": (-1, 0) if x.causal else (-1, -1)}
    else:  # torch 2.10
        causal = {"is_causal": x.causal}
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, **causal)
    assert isinstance(out, Tensor)
    return out


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _block_diagonal(lengths: tuple[int, ...], causal: bool, device: torch.device) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens([n for n in lengths if n], device=device)
    return mask.make_causal() if causal else mask


def _xformers_call(x: PackedInputs) -> memory_efficient.Call:
    q, k, v = (t[None] for t in x.qkv.unbind(1))
    return memory_efficient.Call(q, k, v, _block_diagonal(x.lengths, x.causal, q.device))


def _xformers(x: PackedInputs) -> Tensor:
    return memory_efficient.run(_xformers_call(x))[0]


def _why_not_varlen(x: PackedInputs | None) -> str | None:
    device = None if x is None else x.qkv.device
    reason = why_not_gpu("torch.nn.attention.varlen", device) or why_not_new(device)
    if reason is not None or x is None:
        return reason
    if x.qkv.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 or bfloat16, got {x.qkv.dtype}"
    if x.qkv.shape[3] % 8 or x.qkv.shape[3] > 256:
        return f"needs a head width that is a multiple of 8, up to 256, got {x.qkv.shape[3]}"
    if x.qkv.numel() == 0:
        return "no empty inputs"
    # Without a causal mask it has given NaN there (pytorch issue 173469).
    return "not on ROCm; use grouped or xformers" if torch.version.hip else None


def _why_not_xformers(x: PackedInputs | None) -> str | None:
    reason = memory_efficient.why_not_here(None if x is None else x.qkv)
    return reason or (None if x is None else memory_efficient.why_not_kernel(_xformers_call(x)))


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
            yield PackedInputs(new(int(lengths.sum()), 3, h, width), cu_lengths, tuple(lengths.tolist()), causal)


OP = Op(
    name="packed_attention",
    backends=(
        Backend("reference", _reference),
        Backend("loop", _loop),
        Backend("grouped", _grouped),
        Backend("varlen", _varlen, _why_not_varlen, traceable=True),
        Backend("xformers", _xformers, _why_not_xformers),
    ),
    shape="dtype N<= mean<= K causal train",
    cases=_cases,
)
