"""Attention over a sample's layer-normalised tokens themselves, which are both keys and values.

The core of the absorbed form of `cross_attention_pool`: with W_k absorbed into the queries and W_v into the
output, keys and values are the tokens, normalised and without affine map, for every head.

Shape letters: R rows (queries of all heads and views: H x V), B samples, L tokens, D embedding.

    x = LayerNorm(tokens)  without weight and bias      [B, L, D]
    p = softmax(q x^T)  over valid tokens               [B, R, L]
    z = p x                                             [B, R, D]

The normalised tokens exist for one chunk of samples at a time, in both passes: nothing of size B x L x D is
written but the tokens' own gradient. What the backward pass keeps is p.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Bytes of one chunk of normalised tokens: half a core's second-level cache (measured: 4 MiB costs 15 to 25 %
# more in fp32, everything at once 30 to 60 %), or enough work to fill a GPU.
CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}


def absorbed_attention(q: Tensor, tokens: Tensor, valid: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """softmax(q x^T) x with x = LayerNorm(tokens), without affine: [R, B, D], [B, L, D] -> [R, B, D].

    Products are in q's dtype, LayerNorm and softmax in at least fp32. A sample without valid tokens gives
    zeros and sends zero gradients.

    Args:
        q: [R, B, D] queries, already scaled.
        tokens: [B, L, D] in any floating dtype.
        valid: [B, L] bool, True where a token may be attended to; None when all are.
        eps: of the LayerNorm.
    """
    z: Tensor
    z, _ = torch.ops.distill.absorbed_attention(q, tokens, valid, eps)
    return z


@torch.library.custom_op("distill::absorbed_attention", mutates_args=())
def _forward(q: Tensor, tokens: Tensor, valid: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    (r, b, d), n = q.shape, tokens.shape[1]
    z = q.new_empty(r, b, d)
    p = q.new_empty(b, r, n)
    rows, z_rows = q.transpose(0, 1), z.transpose(0, 1)  # [B, R, D]
    for chunk in _chunks(tokens, q.element_size()):
        x, _, _ = _normalise(tokens[chunk], eps, q.dtype)
        p[chunk] = _softmax(torch.bmm(rows[chunk], x.mT), None if valid is None else valid[chunk])
        torch.bmm(p[chunk], x, out=z_rows[chunk])
    return z, p


@_forward.register_fake
def _(q: Tensor, tokens: Tensor, valid: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    r, b, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(b, r, tokens.shape[1])


@torch.library.custom_op("distill::absorbed_attention_backward", mutates_args=())
def _backward(dz: Tensor, q: Tensor, tokens: Tensor, p: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dtokens = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    rows, dz_rows, dq_rows = q.transpose(0, 1), dz.transpose(0, 1), dq.transpose(0, 1)  # [B, R, D]
    for chunk in _chunks(tokens, q.element_size()):
        x, mean, rstd = _normalise(tokens[chunk], eps, q.dtype)
        pc, qc, dzc = p[chunk], rows[chunk], dz_rows[chunk]
        dp = torch.bmm(dzc, x.mT)  # [b, R, L]
        ds = torch._softmax_backward_data(dp, pc, -1, pc.dtype)
        torch.bmm(ds, x, out=dq_rows[chunk])
        dx = torch.baddbmm(torch.bmm(pc.mT, dzc), ds.mT, qc)  # [b, L, D]
        dtokens[chunk] = _normalise_backward(dx, tokens[chunk], mean, rstd)
    return dq, dtokens


@_backward.register_fake
def _(dz: Tensor, q: Tensor, tokens: Tensor, p: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), tokens.new_empty(tokens.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, tokens, _, eps = inputs
    ctx.save_for_backward(q, tokens, output[1])
    ctx.eps = eps
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, dz: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, tokens, p = ctx.saved_tensors
    dq, dtokens = torch.ops.distill.absorbed_attention_backward(dz, q, tokens, p, ctx.eps)
    return dq, dtokens, None, None


_forward.register_autograd(_gradient, setup_context=_keep)


def _chunks(tokens: Tensor, itemsize: int) -> Iterator[slice]:
    b, n, d = tokens.shape
    samples = CHUNK_BYTES.get(tokens.device.type, 1 << 26) // max(n * d * itemsize, 1)
    step = max(samples, 1)
    return (slice(i, i + step) for i in range(0, b, step))


def _normalise(tokens: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm without affine map: tokens in `dtype`, mean and 1/std in at least fp32."""
    shape = [tokens.shape[-1]]
    x, mean, rstd = torch.native_layer_norm(tokens, shape, unit_weight(tokens), None, eps)
    return x.to(dtype), mean, rstd


def _normalise_backward(dx: Tensor, tokens: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    unit = unit_weight(tokens)
    dtokens: Tensor = torch.ops.aten.native_layer_norm_backward(
        dx.to(tokens.dtype), tokens, [tokens.shape[-1]], mean, rstd, unit, None, [True, False, False]
    )[0]
    return dtokens


def unit_weight(tokens: Tensor) -> Tensor | None:
    """The weight of a LayerNorm without affine map: fp32 ones for half-precision tokens on CPU, else None.

    With an fp32 weight the CPU kernel keeps fp32 statistics for its backward pass; GPU kernels always do.
    """
    if tokens.dtype.itemsize >= 4 or tokens.device.type != "cpu":
        return None
    return torch.ones(tokens.shape[-1], dtype=torch.float32)


def _softmax(scores: Tensor, valid: Tensor | None) -> Tensor:
    """[b, R, L] -> probabilities in the scores' dtype; rows without valid tokens are zero."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if valid is None:
        return wide.softmax(-1)
    hidden = ~valid[:, None, :]
    return wide.masked_fill_(hidden, float("-inf")).softmax(-1).masked_fill_(hidden, 0.0)
