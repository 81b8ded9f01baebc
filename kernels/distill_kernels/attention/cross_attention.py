"""Cross-attention of a handful of queries over one sample's tokens.

Shape letters: B samples, H heads, V queries a sample (views), L tokens, K head width. V is about 8 and L
about 77 or 196 here: the keys and values of a sample are shared by its V queries and never repeated.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from distill_kernels.attention import memory_efficient
from distill_kernels.attention.self_attention import QKV, autocast, sdpa
from distill_kernels.dispatch import Backend, Op, choose
from distill_kernels.machine import interpreting, why_not_triton


@dataclass
class CrossAttentionInputs(QKV):
    """The arguments of `cross_attention`, cast for autocast; N is B."""

    lengths: Tensor | None  # [B] int
    mask: Tensor | None  # [B, L] bool
    scale: float

    @property
    def V(self) -> int:
        """Queries a sample."""
        return self.q.shape[2]

    @property
    def masked(self) -> bool:
        """Whether some tokens are hidden."""
        return self.lengths is not None or self.mask is not None

    @property
    def valid(self) -> Tensor | None:
        """[B, L] bool, True where a token is valid, or None when all are."""
        return key_mask(self.lengths, self.mask, self.L)


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale * q k^T) v over each sample's own tokens: -> [B, H, V, K] in q's dtype.

    Scores, softmax and sums are computed in at least fp32 by `reference` and `triton`; under autocast q, k
    and v are cast to its dtype first, as scaled_dot_product_attention does. A sample without any valid token
    gives zeros and sends zero gradients. Masked keys and values must be finite (pad with zeros): some
    backends multiply them by a probability of exactly zero.

    Args:
        q: [B, H, V, K] queries; any strides, like k and v.
        k: [B, H, L, K] keys.
        v: [B, H, L, K] values.
        lengths: [B] integers, the number of valid tokens of each sample, a prefix; not with `mask`.
        mask: [B, L] bool, True where a token may be attended to.
        scale: factor on the scores; K ** -0.5 when None.
        backend: auto, reference, matmul, sdpa, xformers or triton.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        BackendError: a backend that is unknown, or that cannot run these inputs.
    """
    _check(q, k, v, lengths, mask)
    q, k, v = autocast(q, k, v)
    inputs = CrossAttentionInputs(q, k, v, lengths, mask, q.shape[-1] ** -0.5 if scale is None else scale)
    chosen = choose(OP, backend, inputs)
    with torch.autocast(q.device.type, enabled=False):
        out: Tensor = chosen.run(inputs)
    return out


def key_mask(lengths: Tensor | None, mask: Tensor | None, tokens: int) -> Tensor | None:
    """[B, L] bool, True where a token is valid, or None when all are."""
    if lengths is not None:
        return torch.arange(tokens, device=lengths.device) < lengths[:, None]
    return mask


def check_valid_tokens(lengths: Tensor | None, mask: Tensor | None, tokens: Tensor) -> None:
    """Raise ValueError unless lengths or mask fit `tokens`, a tensor that starts [B] and has L at dim -2."""
    b, n = tokens.shape[0], tokens.shape[-2]
    if lengths is not None and mask is not None:
        raise ValueError("give lengths or mask, not both")
    if lengths is not None and (lengths.shape != (b,) or lengths.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"lengths must be [{b}] int32 or int64, got {[*lengths.shape]} {lengths.dtype}")
    if mask is not None and (mask.shape != (b, n) or mask.dtype != torch.bool):
        raise ValueError(f"mask must be [{b}, {n}] bool, got {[*mask.shape]} {mask.dtype}")
    for name, valid in (("lengths", lengths), ("mask", mask)):
        if valid is not None and valid.device != tokens.device:
            raise ValueError(f"{name} is on {valid.device}, the tokens on {tokens.device}")


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, mask: Tensor | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        shapes = f"{[*q.shape]}, {[*k.shape]}, {[*v.shape]}"
        raise ValueError(f"q, k and v must be [B,H,V,K], [B,H,L,K] and [B,H,L,K], got {shapes}")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {[*q.shape]} and k {[*k.shape]} must share B, H and K")
    if not (q.dtype == k.dtype == v.dtype) and not torch.is_autocast_enabled(q.device.type):
        raise ValueError(f"q, k and v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")
    check_valid_tokens(lengths, mask, k)


def _reference(x: CrossAttentionInputs) -> Tensor:
    """The plain formula, in fp32 or wider."""
    wide = torch.promote_types(x.q.dtype, torch.float32)
    return _explicit(x.q.to(wide), x.k.to(wide), x.v.to(wide), x.valid, x.scale).to(x.q.dtype)


def _matmul(x: CrossAttentionInputs) -> Tensor:
    """The plain formula with products in q's own dtype and the softmax in fp32.

    With so few queries the scores are small, and two batched products beat a flash kernel on CPU.
    """
    return _explicit(x.q, x.k, x.v, x.valid, x.scale)


def _explicit(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float) -> Tensor:
    # The keys come first: both they and their gradient then keep the layout that projections have, [.., L, K].
    scores = (k @ (q * scale).transpose(-1, -2)).transpose(-1, -2)  # [B, H, V, L]
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if valid is None:
        return scores.softmax(-1).to(v.dtype) @ v
    hidden = ~valid[:, None, None, :]
    # A row without valid keys is NaN after the softmax; the second fill makes it zero, and both fills stop
    # its gradient.
    p = scores.masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(hidden, 0.0)
    return p.to(v.dtype) @ v


def _sdpa(x: CrossAttentionInputs) -> Tensor:
    valid = x.valid
    return sdpa(x, None if valid is None else valid[:, None, None, :], scale=x.scale)


def _xformers_call(x: CrossAttentionInputs) -> memory_efficient.Call:
    valid, bias = x.valid, None
    if valid is not None:
        # xformers wants rows aligned to 8 elements: allocate wider and slice.
        padded = x.q.new_zeros(len(valid), 1, 1, -(-x.L // 8) * 8)
        padded[..., : x.L].masked_fill_(~(valid | ~valid.any(-1, keepdim=True))[:, None, None, :], float("-inf"))
        bias = padded.expand(*x.q.shape[:3], -1)[..., : x.L]
    return memory_efficient.Call(x.q.transpose(1, 2), x.k.transpose(1, 2), x.v.transpose(1, 2), bias, x.scale)


def _xformers(x: CrossAttentionInputs) -> Tensor:
    out, valid = memory_efficient.run(_xformers_call(x)).transpose(1, 2), x.valid
    return out if valid is None else out.masked_fill(~valid.any(-1)[:, None, None, None], 0.0)


def _triton(x: CrossAttentionInputs) -> Tensor:
    from distill_kernels.triton.cross_attention import triton_cross_attention

    return triton_cross_attention(x.q, x.k, x.v, x.lengths, x.mask, x.scale)


def _why_not_sdpa(x: CrossAttentionInputs | None) -> str | None:
    return "there are no tokens (L = 0)" if x is not None and x.L == 0 else None


def _why_not_xformers(x: CrossAttentionInputs | None) -> str | None:
    if x is None:
        return memory_efficient.why_not_here(None)
    return _why_not_sdpa(x) or memory_efficient.why_not_here(x.q) or memory_efficient.why_not_kernel(_xformers_call(x))


def _why_not_triton(x: CrossAttentionInputs | None) -> str | None:
    reason = why_not_triton(None if x is None else x.device)
    if reason is not None or x is None:
        return reason
    wide = interpreting() and x.products == torch.float64
    if x.products not in (torch.float16, torch.bfloat16, torch.float32) and not wide:
        return f"takes float16, bfloat16 or float32, got {x.products}"
    if x.K % 16 or not 16 <= x.K <= 128:
        return f"takes head widths that are multiples of 16 up to 128, got {x.K}"
    return None


def _cases(device: torch.device) -> Iterable[CrossAttentionInputs]:
    batch = 512 if device.type == "cuda" else 16
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (77, 196):
            new = functools.partial(torch.randn, device=device, dtype=dtype, requires_grad=True)
            q, k, v = (new(batch, 8, n, 64) for n in (8, tokens, tokens))
            lengths = torch.randint(1, tokens + 1, (batch,), device=device)
            yield CrossAttentionInputs(q, k, v, None, None, 0.125)
            yield CrossAttentionInputs(q, k, v, lengths, None, 0.125)


OP = Op(
    name="cross_attention",
    backends=(
        Backend("reference", _reference),
        Backend("matmul", _matmul),
        Backend("sdpa", _sdpa, _why_not_sdpa),
        Backend("xformers", _xformers, _why_not_xformers),
        Backend("triton", _triton, _why_not_triton, traceable=True),
    ),
    shape="dtype N<= V<= L<= K masked train",
    cases=_cases,
)
