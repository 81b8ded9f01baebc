"""Multi-head attention over layer-normalised tokens, without keys and values.

The absorbed form of `cross_attention_pool`: a head's query absorbs its W_k and attends to the normalised tokens
themselves, which are keys and values for every head; its W_v is applied to the sum.

Shape letters: V queries (views) of each of B samples, L tokens, D embedding, H heads, K = D / H, R = H V rows.

    q = (x W_q^T + b_q) / sqrt(K)              [V, B, D]
    t = LayerNorm(tokens), not scaled          [B, L, D]    g and b, its weight and bias, are absorbed too
    y = q (W_k g)  for each head               [B, R, D]
    p = softmax(y t^T)  over valid tokens      [B, R, L]
    z = p t                                    [B, R, D]
    out = z (W_v g)^T + W_v b + b_v            [V, B, D]    each head's rows of W_v

What adds one number to all scores of a row (b, b_k) leaves the softmax alone, and a row of p sums to one. The
normalised tokens t and the rows y and z exist for one chunk of samples at a time, in both passes: nothing of size
B x L x D or B x R x D is written but the tokens' own gradient. What the backward pass keeps is x, q and p. The
gradient of g comes from the weights', in at least fp32: torch's LayerNorm sums it over half-precision tokens in half
precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from distill_kernels.defaults import numbers_for


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

    Products are in x's dtype, statistics, softmax and what is summed over samples in at least fp32; normalised tokens
    are rounded to the tokens' dtype and x's. A sample without valid tokens gives zeros and sends zero gradients.

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
    with torch.autocast(x.device.type, enabled=False):
        (v, b, d), n = x.shape, tokens.shape[1]
        q = F.linear(x, in_proj_weight[:d].to(x.dtype), in_proj_bias[:d].to(x.dtype)).mul_((d // heads) ** -0.5)
        out, p = q.new_empty(q.shape), q.new_empty(b, heads * v, n)
        w = _scaled(in_proj_weight, ln_weight, heads, q.dtype)
        for c in _chunks(q, tokens, heads):
            _attend(q[:, c], tokens[c], w, None if valid is None else valid[c], eps, out[:, c], p[c])
        bias = torch.addmv(in_proj_bias[2 * d :], in_proj_weight[2 * d :], ln_bias)
        out += of_reached(bias, tokens, valid).to(out.dtype)
        return out, q, p


@_forward.register_fake
def _(x: Tensor, tokens: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    (v, b, _), (*_, heads, _) = x.shape, others
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(b, heads * v, tokens.shape[1])


def _unwritten(
    d_out: Tensor,
    x: Tensor,
    tokens: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    in_proj_weight: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_backward`'s results, not filled in: its fake implementation, and where it writes."""
    *_, for_tokens, for_weights = others

    def like(t: Tensor, wanted: bool) -> Tensor:
        return t.new_empty(t.shape if wanted else 0)

    return (
        like(x, True),
        like(tokens, for_tokens),
        like(ln_weight, for_weights),
        like(ln_bias, for_weights),
        like(in_proj_weight, for_weights),
        in_proj_weight.new_empty(len(in_proj_weight) if for_weights else 0),
    )


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
    with torch.autocast(x.device.type, enabled=False):
        (v, b, d), wide = q.shape, torch.promote_types(q.dtype, torch.float32)
        gradients = _unwritten(d_out, x, tokens, ln_weight, ln_bias, in_proj_weight, for_tokens, for_weights)
        dx, d_tokens, d_ln_weight, d_ln_bias, d_weight, d_bias = gradients
        w = _scaled(in_proj_weight, ln_weight, heads, q.dtype)
        total = d_weight if d_weight.dtype == wide else d_weight.new_empty(d_weight.shape, dtype=wide)  # [3D, D]
        dq, dw = torch.empty_like(q), total[d:].view(w.shape) if for_weights else None
        for c in _chunks(q, tokens, heads):
            d_chunk, first = d_tokens[c] if for_tokens else None, c.start == 0
            _attend_backward(d_out[:, c], q[:, c], tokens[c], w, p[c], eps, dq[:, c], d_chunk, dw, first)
        dq *= (d // heads) ** -0.5
        torch.matmul(dq, in_proj_weight[:d].to(q.dtype), out=dx)
        if dw is not None:
            del w  # its memory is for what follows
            if not b:  # no chunk has written it
                dw.zero_()
            _product(dq.view(1, v * b, d).mT, x.reshape(1, v * b, d), total[:d].view(1, d, d), add=False)
            d_b_v = of_reached(d_out.sum(0, dtype=wide), tokens, valid).sum(0)
            d_bias[:d] = dq.sum((0, 1), dtype=wide)
            d_bias[d : 2 * d] = 0.0
            d_bias[2 * d :] = d_b_v
            of_w_k, of_w_v = total[d:].chunk(2)
            w_k, w_v = in_proj_weight[d:].chunk(2)
            d_ln_weight.copy_((of_w_k * w_k).sum(0) + (of_w_v * w_v).sum(0))
            total[d:] *= ln_weight
            of_w_v.addr_(d_b_v, ln_bias.to(wide))
            d_ln_bias.copy_(w_v.mT.to(wide) @ d_b_v)
            if total is not d_weight:
                d_weight.copy_(total)
        return gradients


_backward.register_fake(_unwritten)


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


@register_flop_formula(torch.ops.distill.absorbed_attention)
def _(x: torch.Size, tokens: torch.Size, *others: Any, **out: Any) -> int:
    (v, b, d), heads = x, int(others[-2])
    return 6 * v * b * d * d + 4 * b * heads * v * tokens[1] * d  # q, y, out; scores, z


@register_flop_formula(torch.ops.distill.absorbed_attention_backward)
def _(d_out: torch.Size, x: torch.Size, tokens: torch.Size, *others: Any, **out: Any) -> int:
    (v, b, d), (for_tokens, for_weights) = x, map(bool, others[-2:])
    square, scores = 2 * v * b * d * d, 2 * b * int(others[-4]) * v * tokens[1] * d
    # y and dz, dq, dx; ds, dy and z; of the tokens; of W_k and W_v, of W_q
    return 4 * square + 3 * scores + for_tokens * 2 * scores + for_weights * 3 * square


def _attend(q: Tensor, tokens: Tensor, w: Tensor, valid: Tensor | None, eps: float, out: Tensor, p: Tensor) -> None:
    """One chunk of samples, into out [V, b, D] and p [b, R, L]."""
    (w_k, w_v), (v, b, d) = w.chunk(2), q.shape  # [H, K, D] each
    t, _, _ = _normalise(tokens, eps, q.dtype)
    y = torch.bmm(_split(q, len(w_k)), w_k).view(p.shape[1], b, d).transpose(0, 1)  # [b, R, D]
    p.copy_(_softmax(torch.bmm(y, t.mT), valid))
    z = torch.bmm(p, t, out=y).transpose(0, 1).view(len(w_v), v * b, d)  # [H, V b, D]
    _merge(torch.bmm(z, w_v.mT), out)


def _attend_backward(
    d_out: Tensor,
    q: Tensor,
    tokens: Tensor,
    w: Tensor,
    p: Tensor,
    eps: float,
    dq: Tensor,
    d_tokens: Tensor | None,
    dw: Tensor | None,
    first: bool,
) -> None:
    """One chunk of samples, into dq [V, b, D], d_tokens [b, L, D] and dw [2H, K, D]; added to dw if not the first."""
    (v, b, d), heads, r = q.shape, len(w) // 2, p.shape[1]
    t, mean, rstd = _normalise(tokens, eps, q.dtype)
    # What goes with W_k and what goes with W_v share their products: y and dz, ds and p, dy and z.
    q_do = torch.cat([_split(q, heads), _split(d_out, heads)])  # [2H, V b, K]
    y_dz = torch.bmm(q_do, w).view(2 * r, b, d).transpose(0, 1)  # [b, 2R, D]
    ds = torch._softmax_backward_data(torch.bmm(y_dz[:, r:], t.mT), p, -1, p.dtype)  # [b, R, L]
    ds_p = torch.cat([ds, p], 1)  # [b, 2R, L]
    del ds
    if d_tokens is not None:
        into = d_tokens if d_tokens.dtype == t.dtype else t.new_empty(t.shape)
        dt = torch.bmm(ds_p.mT, y_dz, out=into)  # [b, L, D]
    # y and dz are done with, so that dy and z take their place
    dy_z = torch.bmm(ds_p, t, out=y_dz).transpose(0, 1).view(2 * heads, v * b, d)  # [2H, V b, D]
    _merge(torch.bmm(dy_z[:heads], w[:heads].mT), dq)
    if dw is not None:
        _product(q_do.mT, dy_z, dw, add=not first)
    if d_tokens is not None:
        del t, y_dz, dy_z  # their memory is for what follows
        d_tokens.copy_(_normalise_backward(dt, tokens, mean, rstd))


def _product(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """a b, or what is there and a b, into out: [N, I, J], [N, J, K] -> [N, I, K]; out may be of a wider dtype."""
    if out.dtype == a.dtype:
        torch.baddbmm(out, a, b, beta=int(add), out=out)
    elif add:
        out += torch.bmm(a, b)
    else:
        out.copy_(torch.bmm(a, b))


def _scaled(in_proj_weight: Tensor, ln_weight: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """[2H, K, D], W_k g of each head, then W_v g of each."""
    d = len(ln_weight)
    return (in_proj_weight[d:] * ln_weight).to(dtype).view(2 * heads, d // heads, d)


def of_reached(of_samples: Tensor, tokens: Tensor, valid: Tensor | None) -> Tensor:
    """[D] or [B, D], zero for samples without valid tokens: the probabilities of a row sum to one, or to zero."""
    if valid is not None:
        return of_samples * valid.any(-1, keepdim=True)
    return of_samples if tokens.shape[1] else torch.zeros_like(of_samples)


def _chunks(q: Tensor, tokens: Tensor, heads: int) -> Iterator[slice]:
    """Chunks of samples, of equal size but for the last: the more tokens and rows at once, the fewer fixed costs."""
    (b, n, d), rows = tokens.shape, 2 * heads * q.shape[0]
    fitting = int(numbers_for("absorbed_attention", q)["chunk_bytes"]) // max((n + rows) * d * q.element_size(), 1)
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


def _normalise(tokens: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens in `dtype`, and their mean and 1 / standard deviation."""
    t, mean, rstd = torch.native_layer_norm(tokens, [tokens.shape[-1]], *unit_norm(tokens), eps)
    return t.to(dtype), mean, rstd


def _normalise_backward(dt: Tensor, tokens: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    d_tokens: Tensor = torch.ops.aten.native_layer_norm_backward(
        dt.to(tokens.dtype), tokens, [tokens.shape[-1]], mean, rstd, *unit_norm(tokens), [True, False, False]
    )[0]
    return d_tokens


def unit_norm(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a LayerNorm that scales nothing: the CPU's is slower without any.

    In fp32 for half-precision tokens on CPU, whose kernel then keeps fp32 statistics for its backward pass; GPU
    kernels always do.
    """
    half = tokens.dtype.itemsize < 4 and tokens.device.type == "cpu"
    dtype, width = torch.float32 if half else tokens.dtype, tokens.shape[-1]
    return tokens.new_ones(width, dtype=dtype), tokens.new_zeros(width, dtype=dtype)


def _softmax(scores: Tensor, valid: Tensor | None) -> Tensor:
    """[b, R, L] -> probabilities in the scores' dtype, summed in at least fp32; rows without valid tokens are zero."""
    if valid is None:
        return scores.softmax(-1)
    hidden = ~valid[:, None, :]
    return scores.masked_fill_(hidden, float("-inf")).softmax(-1).masked_fill_(hidden, 0.0)
