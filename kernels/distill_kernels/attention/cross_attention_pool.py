"""Cross-attention pooling: a sample's V pooled embeddings query one set of its tokens.

COSMOS (arXiv 2412.01814, cross-attention module) fuses modalities this way. Shape letters: V queries a
sample (views), B samples, L tokens, D embedding, H heads, K = D / H.

Two forms give the same numbers:

- *projected*: keys and values are made once a sample, V queries attend to them.
- *absorbed*: a score is (W_q x) . (W_k y) = (W_k^T W_q x) . y, so each head's query absorbs its W_k and
  attends to the normalised tokens themselves; a head's output is W_v (sum of p y), so W_v is applied after
  the sum. Keys and values never exist (`absorbed_attention`).

The cost model counts, for a sample's forward pass, multiplications and the elements moved to and from memory
(the backward pass about doubles every term; what both forms do alike is left out):

                multiplications                           elements
    projected   2 L D^2  (keys, values)                   5 L D    (LN(tokens); keys and values, out and in)
                + 2 V L D  (scores, sums)
    absorbed    2 V D^2  (absorb W_k, apply W_v)          m H V D  (queries out, in; sums out, in; and how the
                + 2 H V L D  (scores, sums over all D)              products' layouts are met)
                and a sixth of it: backward makes         + w D^2 / B  (once a batch)
                queries and sums again

An element costs as much as so many multiplications: this number, m and w are a device's, by element size of the
products (`numbers` in defaults.csv; on a CPU fitted to the 332 timings of the two in kernels/bench/results.csv, widths
of 64 to 768, batches of 1 to 256: the form that it picks costs .2 % more than the better one on average, and never more
than 10 %). With free memory, absorbed is cheaper when V (7 H / 6 - 1) / D + 7 V / (6 L) < 1; with fast matrix units
memory decides, and it is when m H V < 5 L.

The model is a CPU's. On a GPU the absorbed chain is bound by its launches, about 160 both ways and a millisecond of
the host's time for a sixth of that on the device; projected is two products and one kernel each way (estimated).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_kernels.attention.absorbed_attention import absorbed_attention, of_reached, unit_norm
from distill_kernels.attention.cross_attention import check_valid_tokens, cross_attention, key_mask
from distill_kernels.attention.self_attention import split_heads, tracing
from distill_kernels.dispatch import Backend, BackendError, Inputs, Op, choose


class _Attention(NamedTuple):
    ln_weight: Tensor  # [D], of the tokens' LayerNorm
    ln_bias: Tensor  # [D]
    in_proj_weight: Tensor  # [3D, D]
    in_proj_bias: Tensor  # [3D]


class _Keys(NamedTuple):
    tokens: Tensor  # [B, L, D], before LayerNorm
    lengths: Tensor | None  # [B] int
    mask: Tensor | None  # [B, L] bool
    eps: float  # of the LayerNorm

    @property
    def valid(self) -> Tensor | None:
        """[B, L] bool, True where a token is valid, or None when all are."""
        return key_mask(self.lengths, self.mask, self.tokens.shape[1])


@dataclass
class PoolInputs(Inputs):
    """What a form computes from: attention of x over LN(tokens), before the output projection."""

    x: Tensor  # [V, B, D], normalised queries
    keys: _Keys
    w: _Attention  # in at least fp32
    heads: int
    compute: torch.dtype  # of products
    attention: str  # the backend of `cross_attention`, in the projected form

    @property
    def leading(self) -> Tensor:
        """The queries, in the dtype of norms."""
        return self.x

    @property
    def products(self) -> torch.dtype:
        """`compute`."""
        return self.compute

    @property
    def V(self) -> int:
        """Queries a sample."""
        return self.x.shape[0]

    @property
    def B(self) -> int:
        """Samples."""
        return self.x.shape[1]

    @property
    def D(self) -> int:
        """Width."""
        return self.x.shape[2]

    @property
    def L(self) -> int:
        """Tokens a sample."""
        return self.keys.tokens.shape[1]

    @property
    def H(self) -> int:
        """Heads."""
        return self.heads

    @property
    def train(self) -> bool:
        """Whether a gradient is asked for."""
        x, tokens, weight = self.x, self.keys.tokens, self.w.in_proj_weight
        return torch.is_grad_enabled() and (x.requires_grad or tokens.requires_grad or weight.requires_grad)


class _Weights(NamedTuple):
    ln_q_weight: Tensor  # [D]
    ln_q_bias: Tensor  # [D]
    ln_k_weight: Tensor  # [D]
    ln_k_bias: Tensor  # [D]
    in_proj_weight: Tensor  # [3D, D]
    in_proj_bias: Tensor  # [3D]
    out_proj_weight: Tensor  # [D, D]
    out_proj_bias: Tensor  # [D]


def cross_attention_pool(
    queries: Tensor,
    tokens: Tensor,
    *,
    ln_q_weight: Tensor,
    ln_q_bias: Tensor,
    ln_k_weight: Tensor,
    ln_k_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    heads: int,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    normalize: bool = True,
    backend: str = "auto",
    attention: str = "auto",
) -> Tensor:
    """normalise(queries + attention(LN(queries), LN(tokens))): [V, B, D], [B, L, D] -> [V, B, D].

    Weights are as nn.LayerNorm and nn.MultiheadAttention hold them. LayerNorm, softmax, residual and
    normalisation are in at least fp32; products are in the dtype of `queries`, or in autocast's. The result
    is fp32 under autocast, else in the dtype of `queries`. A sample without any valid token attends to
    nothing: its attention output is zero before the output projection, and it sends no gradient to tokens.
    The gradient of the key bias (the middle third of `in_proj_bias`) is exactly zero, as in mathematics.
    Masked tokens must be finite.

    Args:
        queries: [V, B, D] pooled embeddings, not normalised.
        tokens: [B, L, D], one set a sample; may be of another dtype than `queries`.
        ln_q_weight: [D], LayerNorm of the queries.
        ln_q_bias: [D].
        ln_k_weight: [D], LayerNorm of the tokens.
        ln_k_bias: [D].
        in_proj_weight: [3D, D], W_q, W_k and W_v stacked.
        in_proj_bias: [3D].
        out_proj_weight: [D, D].
        out_proj_bias: [D].
        heads: H, a divisor of D.
        lengths: [B] integers, the number of valid tokens of each sample, a prefix; not with `mask`.
        mask: [B, L] bool, True where a token may be attended to.
        eps: of both LayerNorms.
        normalize: L2-normalise the result over D.
        backend: auto (on a CPU by the cost model; on a GPU, and in an exported or traced graph, projected), projected,
            absorbed or reference.
        attention: the backend of `cross_attention`, which the projected form calls; naming one makes `auto` projected.

    Raises:
        ValueError: shapes that do not fit.
        BackendError: a backend that is unknown, cannot run this, or has no `attention` to name.
    """
    weights = _Weights(
        ln_q_weight,
        ln_q_bias,
        ln_k_weight,
        ln_k_bias,
        in_proj_weight,
        in_proj_bias,
        out_proj_weight,
        out_proj_bias,
    )
    _check(queries, tokens, weights, heads, lengths, mask)
    if attention != "auto" and backend == "auto":
        backend = "projected"
    elif attention != "auto" and backend != "projected":
        raise BackendError(f"backend {backend!r} calls no attention; name one ({attention!r}) with 'projected'")

    device = queries.device.type
    wide, compute = _dtypes(queries)
    result = wide if torch.is_autocast_enabled(device) else queries.dtype
    weights = _Weights(*(w.to(wide) for w in weights))
    with torch.autocast(device, enabled=False):
        x = F.layer_norm(queries.to(wide), queries.shape[2:], weights.ln_q_weight, weights.ln_q_bias, eps)
        keys, w = _Keys(tokens, lengths, mask, eps), _Attention(*weights[2:6])
        values = _attend(PoolInputs(x, keys, w, heads, compute, attention), backend)
        attended = _linear(values, weights.out_proj_weight, weights.out_proj_bias)
        fused = queries.to(wide) + attended.to(wide)
        return (F.normalize(fused, dim=-1) if normalize else fused).to(result)


def attend_to_tokens(
    x: Tensor,
    tokens: Tensor,
    *,
    ln_weight: Tensor,
    ln_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    heads: int,
    lengths: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Multi-head attention of x over LN(tokens), before the output projection: [V, B, D], [B, L, D] -> [V, B, D].

    As `cross_attention_pool` has it, with its choice of forms, for blocks whose queries are normalised and whose
    output is projected by modules of their own: x is what W_q takes. The result has x's dtype, or autocast's.

    Args:
        x: [V, B, D] queries, normalised.
        tokens: [B, L, D], not normalised.
        ln_weight: [D], LayerNorm of the tokens.
        ln_bias: [D].
        in_proj_weight: [3D, D], W_q, W_k and W_v stacked.
        in_proj_bias: [3D].
        heads: H, a divisor of D.
        lengths: [B] integers, the number of valid tokens of each sample, a prefix.
        eps: of the LayerNorm.

    Raises:
        ValueError: shapes that do not fit.
    """
    w = _Attention(ln_weight, ln_bias, in_proj_weight, in_proj_bias)
    _check(x, tokens, w, heads, lengths, None)
    wide, compute = _dtypes(x)
    with torch.autocast(x.device.type, enabled=False):
        w = _Attention(*(t.to(wide) for t in w))
        return _attend(PoolInputs(x, _Keys(tokens, lengths, None, eps), w, heads, compute, "auto"), "auto")


def _dtypes(queries: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Of norms and sums, at least fp32, and of products."""
    device, wide = queries.device.type, torch.promote_types(queries.dtype, torch.float32)
    autocast = torch.is_autocast_enabled(device) and wide == torch.float32
    return wide, torch.get_autocast_dtype(device) if autocast else queries.dtype


def _attend(inputs: PoolInputs, backend: str) -> Tensor:
    """[V, B, D] attention output before the output projection."""
    if backend == "auto" and (torch.compiler.is_exporting() or tracing()):
        backend = "projected"  # a graph for other libraries, and for any batch size, has neither our ops nor the choice
    elif backend == "auto" and torch.compiler.is_compiling():  # which cannot trace the cost model
        backend = "absorbed" if inputs.device.type == "cpu" else "projected"
    out: Tensor = choose(OP, backend, inputs).run(inputs)
    return out


def cheapest(inputs: PoolInputs, *, multiplications: float, moved: float, weights: float) -> tuple[str, str]:
    """Both forms, the cheaper one first, by the cost model of this module's docstring.

    Args:
        inputs: of which V, B, L, D and H are read.
        multiplications: an element costs as much as these.
        moved: elements moved for each of H V D.
        weights: elements moved for each of D^2, once a batch.
    """
    v, n, d, h = inputs.V, inputs.L, inputs.D, inputs.H
    projected = 2 * n * d * d + 2 * v * n * d + multiplications * 5 * n * d
    absorbed = 7 / 6 * (2 * v * d * d + 2 * h * v * n * d)
    absorbed += multiplications * (moved * h * v * d + weights * d * d / max(inputs.B, 1))
    return ("absorbed", "projected") if absorbed < projected else ("projected", "absorbed")


def _projected(inputs: PoolInputs) -> Tensor:
    """`_attend` with keys and values made once a sample."""
    keys, w, heads = inputs.keys, inputs.w, inputs.heads
    x = inputs.x.to(inputs.compute)
    views, b, d = x.shape
    n = keys.tokens.shape[1]
    w_q, w_kv = torch.split(w.in_proj_weight, [d, 2 * d])
    b_q, _, b_v = w.in_proj_bias.chunk(3)
    # LayerNorm's weight and bias go into the weights: no sums of half-precision gradients over all tokens. What adds
    # the same to all keys of a sample leaves the softmax alone. What adds the same to all values goes to their mean:
    # a kernel that takes the softmax's gradient from its rounded output loses small differences of large values.
    # (Half of w_kv would cost zeros for its gradient.)
    b_v = b_v + torch.mv(w_kv, w.ln_bias)[d:]
    y = F.layer_norm(keys.tokens, (d,), *unit_norm(keys.tokens), keys.eps).to(x.dtype)
    q = _linear(x, w_q, b_q)
    kv = F.linear(y, (w_kv * w.ln_weight).to(y.dtype))
    if torch.compiler.is_exporting() or tracing():  # for any number of tokens
        k, v = kv.view(b, n, 2, heads, d // heads).permute(2, 0, 3, 1, 4)  # [B, H, L, K] each
    else:
        (k,), (v,) = split_heads(kv.view(b * n, 2, heads, d // heads), [(b, n)])
    q = q.view(views, b, heads, d // heads).permute(1, 2, 0, 3)
    out = cross_attention(q, k, v, keys.lengths, keys.mask, backend=inputs.attention)
    return out.permute(2, 0, 1, 3).reshape(views, b, d) + of_reached(b_v, keys.tokens, keys.valid).to(out.dtype)


def _absorbed(inputs: PoolInputs) -> Tensor:
    """`_attend` without keys and values."""
    x, keys, w = inputs.x.to(inputs.compute), inputs.keys, inputs.w._asdict()
    return absorbed_attention(x, keys.tokens, **w, heads=inputs.heads, valid=keys.valid, eps=keys.eps)


def _reference(inputs: PoolInputs) -> Tensor:
    """`_attend` as nn.MultiheadAttention has it, in at least fp32, with an output projection that changes nothing."""
    (_, b, d), keys, w = inputs.x.shape, inputs.keys, inputs.w
    x, tokens = inputs.x.to(w.in_proj_weight.dtype), keys.tokens.to(w.in_proj_weight.dtype)
    y = F.layer_norm(tokens, (d,), w.ln_weight, w.ln_bias, keys.eps).transpose(0, 1)  # [L, B, D]
    valid = keys.valid
    some = y.new_ones(b, dtype=torch.bool) if valid is None else valid.any(-1)
    out, _ = F.multi_head_attention_forward(
        x,
        y,
        y,
        d,
        inputs.heads,
        w.in_proj_weight,
        w.in_proj_bias,
        None,
        None,
        False,
        0.0,
        torch.eye(d, dtype=x.dtype, device=x.device),
        None,  # no output bias
        key_padding_mask=None if valid is None else ~valid & some[:, None],
        need_weights=False,
    )
    return out.masked_fill(~some[:, None], 0.0)


def _cases(device: torch.device) -> Iterable[PoolInputs]:
    """COSMOS's fusion, and the class token of a ViT-B's last block."""
    for views, batch, n, d, heads in ((8, 16, 77, 512, 8), (8, 16, 196, 512, 8), (1, 16, 197, 768, 12)):
        for dtype in (torch.float32, torch.bfloat16):
            new = functools.partial(torch.randn, device=device, requires_grad=True)
            keys = _Keys(new(batch, n, d, dtype=dtype), None, None, 1e-5)
            w = _Attention(new(d), new(d), new(3 * d, d), new(3 * d))
            yield PoolInputs(new(views, batch, d), keys, w, heads, dtype, "auto")


OP = Op(
    name="cross_attention_pool",
    backends=(
        Backend("reference", _reference),
        Backend("projected", _projected),
        Backend("absorbed", _absorbed),
    ),
    shape="dtype V B<= L<= D H train",
    cases=_cases,
    cheapest=cheapest,
)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def _check(
    queries: Tensor,
    tokens: Tensor,
    w: _Weights | _Attention,
    heads: int,
    lengths: Tensor | None,
    mask: Tensor | None,
) -> None:
    if queries.ndim != 3 or tokens.ndim != 3 or queries.shape[1:] != (tokens.shape[0], tokens.shape[2]):
        raise ValueError(f"queries must be [V,B,D], tokens [B,L,D]; got {[*queries.shape]}, {[*tokens.shape]}")
    d = queries.shape[2]
    if heads < 1 or d % heads:
        raise ValueError(f"heads must divide D = {d}, got {heads}")
    for name, weight in w._asdict().items():
        shape = {"in_proj_weight": (3 * d, d), "in_proj_bias": (3 * d,), "out_proj_weight": (d, d)}.get(name, (d,))
        if weight.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(weight.shape)}")
    check_valid_tokens(lengths, mask, tokens)
