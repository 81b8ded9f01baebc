"""Multi-head attention over layer-normalised tokens, without keys and values.

The absorbed form of `cross_attention_pool`: a head's query absorbs its W_k and attends to the normalised tokens
themselves, which are keys and values for every head; its W_v is applied to the sum.

Shape letters: V queries (views) of each of B samples, L tokens, D embedding, H heads, K = D / H, R = H V rows.

    q = (x W_q^T + b_q) / sqrt(K)          [V, B, D]
    t = LayerNorm(tokens)                  [B, L, D]
    y = q W_k  for each head               [B, R, D]
    p = softmax(y t^T)  over valid tokens  [B, R, L]
    z = p t                                [B, R, D]
    out = z W_v^T + b_v  for each head     [V, B, D]

The key bias adds one number to all scores of a row and leaves the softmax alone. The normalised tokens t and the
rows y and z exist for one chunk of samples at a time, in both passes: nothing of size B x L x D or B x R x D is
written but the tokens' own gradient. What the backward pass keeps is q and p.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes of one chunk's tokens and rows, by device and element size: large enough that a product's fixed costs, which
# weigh more where products are fast, are small; on CPU not much more, for caches (measured: a third of this costs
# 10 to 20 %, twice as much 0 to 10 %). On a GPU enough work to fill it.
CHUNK_BYTES = {("cpu", 2): 7 << 20, ("cpu", 4): 5 << 20, ("cpu", 8): 5 << 20}
DEVICE_CHUNK_BYTES = 1 << 28


def absorbed_attention(
    x: Tensor,
    tokens: Tensor,
    *,
    ln_weight: Tensor,
    ln_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    heads: int,
    valid: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Multi-head attention of x over LayerNorm(tokens): [V, B, D], [B, L, D] -> [V, B, D], not projected yet.

    Products are in x's dtype, LayerNorm, softmax and what is summed over samples in at least fp32. A sample without
    valid tokens gives zeros and sends zero gradients.

    Args:
        x: [V, B, D] what W_q takes.
        tokens: [B, L, D] in any floating dtype.
        ln_weight: [D], LayerNorm of the tokens.
        ln_bias: [D].
        in_proj_weight: [3D, D], W_q, W_k and W_v stacked, in x's dtype or a wider one.
        in_proj_bias: [3D].
        heads: H, a divisor of D.
        valid: [B, L] bool, True where a token may be attended to; None when all are.
        eps: of the LayerNorm.
    """
    out: Tensor
    out, _, _ = torch.ops.distill.absorbed_attention(
        x, tokens, ln_weight, ln_bias, in_proj_weight, in_proj_bias, valid, heads, eps
    )
    return out


@torch.library.custom_op("distill::absorbed_attention", mutates_args=())
def _forward(
    x: Tensor,
    tokens: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    valid: Tensor | None,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (v, b, d), n = x.shape, tokens.shape[1]
    q = F.linear(x, in_proj_weight[:d].to(x.dtype), in_proj_bias[:d].to(x.dtype)).mul_((d // heads) ** -0.5)
    out, p = q.new_empty(q.shape), q.new_empty(b, heads * v, n)
    w, ln = _by_head(in_proj_weight, heads, q.dtype), _Norm(*norm_weights(tokens, ln_weight, ln_bias), eps)
    for c in _chunks(q, tokens, heads):
        _attend(q[:, c], tokens[c], ln, w, None if valid is None else valid[c], out[:, c], p[c])
    out += _of_reached(in_proj_bias[2 * d :], tokens, valid).to(out.dtype)
    return out, q, p


@_forward.register_fake
def _(
    x: Tensor,
    tokens: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    valid: Tensor | None,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    v, b, _ = x.shape
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(b, heads * v, tokens.shape[1])


@torch.library.custom_op("distill::absorbed_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    x: Tensor,
    tokens: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    in_proj_weight: Tensor,
    valid: Tensor | None,
    q: Tensor,
    p: Tensor,
    heads: int,
    eps: float,
    for_tokens: bool,
    for_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of x, tokens, ln_weight, ln_bias, in_proj_weight and in_proj_bias; empty where they are not asked for."""
    (v, b, d), wide = q.shape, torch.promote_types(q.dtype, torch.float32)
    gradients = _unwritten(x, tokens, ln_weight, ln_bias, in_proj_weight, for_tokens, for_weights)
    dx, d_tokens, d_ln_weight, d_ln_bias, d_weight, d_bias = gradients
    w, ln = _by_head(in_proj_weight, heads, q.dtype), _Norm(*norm_weights(tokens, ln_weight, ln_bias), eps)
    sums = _Sums(d_weight.to(wide), d_ln_weight.zero_().to(wide)) if for_weights else None
    dq = torch.empty_like(q)
    for c in _chunks(q, tokens, heads):
        into = d_tokens[c] if for_tokens else None
        _attend_backward(d_out[:, c], q[:, c], tokens[c], ln, w, p[c], dq[:, c], into, sums, first=c.start == 0)
    dq *= (d // heads) ** -0.5
    torch.matmul(dq, in_proj_weight[:d].to(q.dtype), out=dx)
    if sums is not None:
        if not b:  # no chunk has written it
            sums.weight.zero_()
        _product(dq.view(1, v * b, d).mT, x.reshape(1, v * b, d), sums.weight[:d].view(1, d, d), add=False)
        d_bias[:d] = dq.sum((0, 1), dtype=wide)
        d_bias[d : 2 * d] = 0.0
        d_bias[2 * d :] = d_b_v = _of_reached(d_out.sum(0, dtype=wide), tokens, valid).sum(0)
        # LayerNorm's bias adds the same to every token, which reaches the values alone, whose probabilities sum to
        # one: no sum of rounded gradients over all tokens.
        d_ln_bias.copy_(in_proj_weight[2 * d :].mT @ d_b_v.to(in_proj_weight.dtype))
        for of, total in ((d_weight, sums.weight), (d_ln_weight, sums.ln_weight)):
            if of is not total:
                of.copy_(total)
    return gradients


@_backward.register_fake
def _(
    d_out: Tensor,
    x: Tensor,
    tokens: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    in_proj_weight: Tensor,
    valid: Tensor | None,
    q: Tensor,
    p: Tensor,
    heads: int,
    eps: float,
    for_tokens: bool,
    for_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _unwritten(x, tokens, ln_weight, ln_bias, in_proj_weight, for_tokens, for_weights)


def _unwritten(
    x: Tensor,
    tokens: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    in_proj_weight: Tensor,
    for_tokens: bool,
    for_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(t: Tensor, wanted: bool) -> Tensor:
        return t.new_empty(t.shape if wanted else 0)

    return (
        like(x, True),
        like(tokens, for_tokens),
        like(ln_weight, for_weights),
        like(ln_bias, for_weights),
        like(in_proj_weight, for_weights),
        like(in_proj_weight[:, 0], for_weights),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, tokens, ln_weight, ln_bias, in_proj_weight, _, valid, ctx.heads, ctx.eps = inputs
    _, q, p = output
    ctx.save_for_backward(x, tokens, ln_weight, ln_bias, in_proj_weight, valid, q, p)
    ctx.mark_non_differentiable(q, p)


def _gradient(ctx: Any, d_out: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    for_tokens, for_weights = ctx.needs_input_grad[1], any(ctx.needs_input_grad[2:6])
    dx, d_tokens, *d_weights = torch.ops.distill.absorbed_attention_backward(
        d_out, *ctx.saved_tensors, ctx.heads, ctx.eps, for_tokens, for_weights
    )
    return (
        dx,
        d_tokens if for_tokens else None,
        *(d if wanted else None for d, wanted in zip(d_weights, ctx.needs_input_grad[2:6], strict=True)),
        None,
        None,
        None,
    )


_forward.register_autograd(_gradient, setup_context=_keep)


class _Norm(NamedTuple):
    weight: Tensor  # [D]
    bias: Tensor  # [D]
    eps: float

    def __call__(self, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """[b, L, D] in `dtype`, and what the backward pass takes of it."""
        t, mean, rstd = torch.native_layer_norm(tokens, [tokens.shape[-1]], self.weight, self.bias, self.eps)
        return t.to(dtype), mean, rstd


class _Sums(NamedTuple):
    """Gradients summed over samples, in at least fp32."""

    weight: Tensor  # [3D, D], of the input projection
    ln_weight: Tensor  # [D]


def _attend(q: Tensor, tokens: Tensor, ln: _Norm, w: Tensor, valid: Tensor | None, out: Tensor, p: Tensor) -> None:
    """One chunk of samples, into out [V, b, D] and p [b, R, L]."""
    (w_k, w_v), (v, b, d) = w.chunk(2), q.shape  # [H, K, D] each
    t, _, _ = ln(tokens, q.dtype)
    y = torch.bmm(_split(q, len(w_k)), w_k).view(p.shape[1], b, d).transpose(0, 1)  # [b, R, D]
    p.copy_(_softmax(torch.bmm(y, t.mT), valid))
    z = torch.bmm(p, t, out=y).transpose(0, 1).view(len(w_v), v * b, d)  # [H, V b, D]
    _merge(torch.bmm(z, w_v.mT), out)


def _attend_backward(
    d_out: Tensor,
    q: Tensor,
    tokens: Tensor,
    ln: _Norm,
    w: Tensor,
    p: Tensor,
    dq: Tensor,
    d_tokens: Tensor | None,
    sums: _Sums | None,
    first: bool,
) -> None:
    """One chunk of samples, into dq [V, b, D] and d_tokens [b, L, D]; added to sums, unless it is the first."""
    (v, b, d), heads, r = q.shape, len(w) // 2, p.shape[1]
    t, mean, rstd = ln(tokens, q.dtype)
    # What goes with W_k and what goes with W_v share their products: y and dz, ds and p, dy and z.
    q_do = torch.cat([_split(q, heads), _split(d_out, heads)])  # [2H, V b, K]
    y_dz = torch.bmm(q_do, w).view(2 * r, b, d).transpose(0, 1)  # [b, 2R, D]
    ds = torch._softmax_backward_data(torch.bmm(y_dz[:, r:], t.mT), p, -1, p.dtype)  # [b, R, L]
    ds_p = torch.cat([ds, p], 1)  # [b, 2R, L]
    del ds
    dt = None
    if d_tokens is not None or sums is not None:
        into = d_tokens if d_tokens is not None and d_tokens.dtype == t.dtype else None
        dt = torch.bmm(ds_p.mT, y_dz, out=into)  # [b, L, D]
    dy_z = torch.bmm(ds_p, t, out=y_dz).transpose(0, 1).view(2 * heads, v * b, d)  # [2H, V b, D]
    _merge(torch.bmm(dy_z[:heads], w[:heads].mT), dq)
    if sums is not None:
        _product(q_do.mT, dy_z, sums.weight[d:].view(w.shape), add=not first)
    if dt is None:
        return
    del t, y_dz, dy_z  # their memory is for what follows
    wanted = [d_tokens is not None, sums is not None, False]
    of_tokens, of_weight, _ = torch.ops.aten.native_layer_norm_backward(
        dt.to(tokens.dtype), tokens, [d], mean, rstd, ln.weight, ln.bias, wanted
    )
    if d_tokens is not None:
        d_tokens.copy_(of_tokens)
    if sums is not None:
        sums.ln_weight.add_(of_weight)


def _product(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """a b, or what is there and a b, into out: [N, I, J], [N, J, K] -> [N, I, K]; out may be of a wider dtype."""
    if out.dtype == a.dtype:
        torch.baddbmm(out, a, b, beta=int(add), out=out)
    elif add:
        out += torch.bmm(a, b)
    else:
        out.copy_(torch.bmm(a, b))


def _by_head(in_proj_weight: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """[2H, K, D], each head's W_k, then each head's W_v."""
    d = in_proj_weight.shape[1]
    return in_proj_weight[d:].to(dtype).view(2 * heads, d // heads, d)


def _of_reached(of_samples: Tensor, tokens: Tensor, valid: Tensor | None) -> Tensor:
    """[D] or [B, D], zero for samples without valid tokens: the probabilities of a row sum to one, or to zero."""
    if valid is not None:
        return of_samples * valid.any(-1, keepdim=True)
    return of_samples if tokens.shape[1] else torch.zeros_like(of_samples)


def _chunks(q: Tensor, tokens: Tensor, heads: int) -> Iterator[slice]:
    """Chunks of samples, of equal size but for the last."""
    (b, n, d), rows = tokens.shape, 2 * heads * q.shape[0]
    size = CHUNK_BYTES.get((q.device.type, q.element_size()), DEVICE_CHUNK_BYTES)
    fitting = size // max((n + rows) * d * q.element_size(), 1)
    step = math.ceil(b / math.ceil(b / max(fitting, 1))) if b else 1
    return (slice(i, i + step) for i in range(0, b, step))


def _split(x: Tensor, heads: int) -> Tensor:
    """[V, b, D] -> [H, V b, K]."""
    v, b, d = x.shape
    return x.reshape(v, b, heads, d // heads).permute(2, 0, 1, 3).reshape(heads, v * b, d // heads)


def _merge(x: Tensor, out: Tensor) -> None:
    """[H, V b, K] into out: [V, b, D]."""
    v, b, d = out.shape
    out.view(v, b, len(x), d // len(x)).copy_(x.view(len(x), v, b, d // len(x)).permute(1, 2, 0, 3))


def norm_weights(tokens: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A LayerNorm's weight and bias as its kernel takes them: in the tokens' dtype, or fp32 for half precision on CPU.

    With an fp32 weight the CPU kernel keeps fp32 statistics for its backward pass; GPU kernels always do.
    """
    half = tokens.dtype.itemsize < 4 and tokens.device.type == "cpu"
    dtype = torch.float32 if half else tokens.dtype
    return weight.to(dtype), bias.to(dtype)


def _softmax(scores: Tensor, valid: Tensor | None) -> Tensor:
    """[b, R, L] -> probabilities in the scores' dtype, summed in at least fp32; rows without valid tokens are zero."""
    if valid is None:
        return scores.softmax(-1)
    hidden = ~valid[:, None, :]
    return scores.masked_fill_(hidden, float("-inf")).softmax(-1).masked_fill_(hidden, 0.0)
