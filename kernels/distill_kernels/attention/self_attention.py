"""Dense self-attention over short sequences: the towers' padded form.

Shape letters: N sequences, H heads, L tokens, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill_kernels.attention import memory_efficient
from distill_kernels.dispatch import Backend, Inputs, Op, choose


@dataclass
class QKV(Inputs):
    """What dense and cross-attention are asked of their arguments."""

    q: Tensor  # [N, H, queries, K]
    k: Tensor  # [N, H, L, K]
    v: Tensor  # [N, H, L, K]

    @property
    def leading(self) -> Tensor:
        """The queries."""
        return self.q

    @property
    def N(self) -> int:
        """Sequences."""
        return self.q.shape[0]

    @property
    def L(self) -> int:
        """Tokens that are attended to."""
        return self.k.shape[2]

    @property
    def K(self) -> int:
        """Head width."""
        return self.q.shape[3]

    @property
    def train(self) -> bool:
        """Whether a gradient is asked for."""
        return torch.is_grad_enabled() and (self.q.requires_grad or self.k.requires_grad or self.v.requires_grad)


@dataclass
class SelfAttention(QKV):
    """The arguments of `self_attention`, cast for autocast, with the mask broadcastable to [N, H, L, L]."""

    causal: bool
    mask: Tensor | None

    @property
    def masked(self) -> bool:
        """Whether there is a mask."""
        return self.mask is not None


def self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v of q, k, v [N, H, L, K] -> [N, H, L, K].

    A query that may attend to nothing gives zeros, and zero gradients.

    Args:
        q: [N, H, L, K].
        k: [N, H, L, K].
        v: [N, H, L, K].
        causal: token i attends to tokens 0..i.
        mask: bool, True where attention is allowed: [N, L] (the keys that exist) or four dimensions that
            broadcast to [N, H, L, L].
        backend: "reference", "explicit" (matmul, softmax, matmul; no second derivative), "sdpa", "xformers"
            (GPU, no mask), or "auto".

    Raises:
        ValueError: shapes that do not fit; as `BackendError`, a backend that is unknown or cannot run this.
    """
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"q, k, v must be [N, H, L, K], got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}")
    if mask is not None:
        mask = _four_dims(mask, q)
    q, k, v = autocast(q, k, v)
    inputs = SelfAttention(q, k, v, causal, mask)
    chosen = choose(OP, backend, inputs)
    with torch.autocast(q.device.type, enabled=False):
        out: Tensor = chosen.run(inputs)
    return out


def split_heads(rows: Tensor, shapes: Sequence[tuple[int, int]]) -> tuple[tuple[Tensor, ...], ...]:
    """Rows [R, P, H, K] -> for each of the P parts (q, k and v, say) a view [N, H, L, K] for every (N, L) of `shapes`.

    The shapes' rows come one after the other. Gradients are written into one tensor like `rows`: autograd's own would
    be collected by copies of their own.
    """
    trains = torch.is_grad_enabled() and rows.requires_grad and not tracing()
    views = _SplitHeads.apply(rows, shapes) if trains else _split_heads(rows, shapes)  # type: ignore[no-untyped-call]
    parts = rows.shape[1]
    return tuple(views[i::parts] for i in range(parts))


def _split_heads(rows: Tensor, shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    return tuple(part.transpose(1, 2) for sequences in _split(rows, shapes) for part in sequences.unbind(2))


class _SplitHeads(torch.autograd.Function):
    generate_vmap_rule = True

    forward = staticmethod(_split_heads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.shapes = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        rows, parts = sum(n * length for n, length in ctx.shapes), len(grads) // len(ctx.shapes)
        h, k = grads[0].shape[1], grads[0].shape[3]
        joint = grads[0].new_empty(rows, parts, h, k)
        for i, sequences in enumerate(_split(joint, ctx.shapes)):
            for j in range(parts):
                sequences[:, :, j].copy_(grads[parts * i + j].transpose(1, 2))
        return joint, None


def _split(rows: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """[R, P, H, K] -> a view [N, L, P, H, K] for each (N, L)."""
    parts, first = [], 0
    for n, length in shapes:  # not torch.split, whose views must not be written into
        parts.append(rows.narrow(0, first, n * length).view(n, length, *rows.shape[1:]))
        first += n * length
    return parts


def tracing() -> bool:
    """Whether torch.jit.trace makes a graph, which knows none of our functions."""
    return torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined, no-any-return]


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in autocast's dtype, as scaled_dot_product_attention casts them; unchanged when it is off."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _four_dims(mask: Tensor, q: Tensor) -> Tensor:
    n, h, length, _ = q.shape
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool (True where attention is allowed), got {mask.dtype}")
    if mask.shape == (n, length):
        return mask[:, None, None, :]
    fits = mask.ndim == 4 and all(m in (1, s) for m, s in zip(mask.shape, (n, h, length, length), strict=True))
    if not fits:
        raise ValueError(
            f"mask must be [{n}, {length}] or broadcast to [{n}, {h}, {length}, {length}], got {[*mask.shape]}"
        )
    return mask


def _allowed(x: SelfAttention) -> Tensor | None:
    """Mask and causality in one, [1 or N, 1 or H, 1 or L, L]; None when everything is allowed."""
    if not x.causal:
        return x.mask
    length = x.q.shape[2]
    below = torch.ones(length, length, dtype=torch.bool, device=x.q.device).tril()[None, None]
    return below if x.mask is None else below & x.mask


def _reference(x: SelfAttention) -> Tensor:
    """Plain maths in at least fp32, one step a line."""
    dtype = torch.promote_types(x.q.dtype, torch.float32)
    q, k, v = x.q.to(dtype), x.k.to(dtype), x.v.to(dtype)
    scores = torch.einsum("nhik,nhjk->nhij", q, k) / math.sqrt(q.shape[-1])
    allowed = _allowed(x)
    if allowed is None:
        weights = scores.softmax(-1)
    else:
        # A finite fill, then zeros: a row without any key has finite gradients.
        low = torch.finfo(dtype).min
        weights = scores.masked_fill(~allowed, low).softmax(-1).masked_fill(~allowed, 0.0)
    return torch.einsum("nhij,nhjk->nhik", weights, v).to(x.q.dtype)


class _Explicit(torch.autograd.Function):
    """softmax(q k^T / sqrt(K) + bias) v with the scale and the mask's bias inside the products.

    The gradient is written out because autograd scales and adds in passes of their own, which cost 15 to
    20 % at these lengths. Saved: q, k, v and the weights [N * H, L, L].
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, masked: bool) -> Tensor:
        n, h, length, width = q.shape
        q3, k3, v3 = (t.reshape(n * h, length, width) for t in (q, k, v))
        bias = q.new_zeros(())
        if allowed is not None:
            bias = q.new_zeros(allowed.shape).masked_fill_(~allowed, -math.inf)
        scores = torch.baddbmm(
            bias.expand(n, h, length, length).reshape(n * h, length, length),
            q3,
            k3.transpose(1, 2),
            beta=0.0 if allowed is None else 1.0,
            alpha=width**-0.5,
        )
        weights = scores.softmax(-1)
        if masked and allowed is not None:  # a query without keys has NaN here; causality alone leaves one
            weights.view(n, h, length, length).masked_fill_(~allowed, 0.0)
        ctx.save_for_backward(q3, k3, v3, weights)
        return torch.bmm(weights, v3).view(n, h, length, width)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        shape, width = grad.shape, grad.shape[-1]
        with torch.autocast(grad.device.type, enabled=False):
            g = grad.reshape(q.shape).to(q.dtype)
            dv = torch.bmm(weights.transpose(1, 2), g)
            d_weights = torch.bmm(g, v.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            nothing = q.new_zeros(()).expand(q.shape)
            dq = torch.baddbmm(nothing, d_scores, k, beta=0.0, alpha=width**-0.5)
            dk = torch.baddbmm(nothing, d_scores.transpose(1, 2), q, beta=0.0, alpha=width**-0.5)
        return dq.view(shape), dk.view(shape), dv.view(shape), None, None


def _explicit(x: SelfAttention) -> Tensor:
    """Three library calls; scores and weights are stored in the working dtype."""
    out: Tensor = _Explicit.apply(x.q, x.k, x.v, _allowed(x), x.mask is not None)  # type: ignore[no-untyped-call]
    return out


def without_cudnn(device: torch.device) -> AbstractContextManager[object]:
    """Leave cuDNN's kernel out of scaled_dot_product_attention on a GPU; torch 2.11 puts it first on the newest ones.

    It makes a plan for each new shape, which others saw take half a second, and its backward pass has given NaN under a
    mask (pytorch issue 196678).
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def sdpa(x: QKV, allowed: Tensor | None, *, causal: bool = False, scale: float | None = None) -> Tensor:
    """torch's scaled_dot_product_attention; `allowed`, without `causal`, broadcasts to [N, H, queries, L]."""
    with without_cudnn(x.device):
        if allowed is None:
            return F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=causal, scale=scale)
        # Kernels disagree about rows without keys, so such a row attends to everything and is then zeroed.
        some = allowed.any(-1, keepdim=True)
        out = F.scaled_dot_product_attention(x.q, x.k, x.v, attn_mask=allowed | ~some, scale=scale)
        return out.masked_fill(~some, 0.0)


def _sdpa(x: SelfAttention) -> Tensor:
    return sdpa(x, None, causal=x.causal) if x.mask is None else sdpa(x, _allowed(x))


def _xformers_call(x: SelfAttention) -> memory_efficient.Call:
    from xformers.ops import LowerTriangularMask

    q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))  # [N, L, H, K]
    return memory_efficient.Call(q, k, v, LowerTriangularMask() if x.causal else None)


def _xformers(x: SelfAttention) -> Tensor:
    return memory_efficient.run(_xformers_call(x)).transpose(1, 2)


def _why_not_xformers(x: SelfAttention | None) -> str | None:
    if x is None:
        return memory_efficient.why_not_here(None)
    if x.mask is not None:
        return "takes no mask; use sdpa"
    return memory_efficient.why_not_here(x.q) or memory_efficient.why_not_kernel(_xformers_call(x))


def _cases(device: torch.device) -> Iterable[SelfAttention]:
    for n, length, h, width, causal in (
        (256, 37, 4, 32, False),
        (8, 197, 12, 64, False),
        (32, 37, 12, 64, False),
        (256, 40, 4, 32, True),
        (32, 77, 8, 64, True),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            for training in (True, False):
                # Strided, as a fused projection leaves them.
                qkv = torch.randn(n, length, 3, h, width, device=device, dtype=dtype, requires_grad=training)
                q, k, v = qkv.permute(2, 0, 3, 1, 4)
                yield SelfAttention(q, k, v, causal, None)


OP = Op(
    name="self_attention",
    backends=(
        Backend("reference", _reference),
        Backend("explicit", _explicit),
        Backend("sdpa", _sdpa),
        Backend("xformers", _xformers, _why_not_xformers),
    ),
    shape="dtype N<= L<= K causal masked train",
    cases=_cases,
)
