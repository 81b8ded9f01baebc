"""Multi-view sigmoid loss: every pair of views in one call, logits one chunk at a time.

Shape letters: Va, Vb views of the two sides, B rows of this rank, M rows of all ranks, D embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_kernels.dispatch import Backend, Op, choose
from distill_kernels.pairwise.chunks import Chunk, chunked_gradients, compute_dtype, sweep, target_mean
from distill_kernels.pairwise.operators import register_gradients
from distill_kernels.pairwise.pairs import Pairs, cases, why_not_kernels


def multi_view_sigmoid(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    b_all: Tensor | None = None,
    offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Sigmoid loss of every view of `a` against every view of `b`: [Va, B, D], [Vb, B, D] -> [Va, Vb].

    Entry (u, v) is the mean over rows i of the sum over columns j of
    -log sigmoid(t (scale a_i . b_j + bias)), t = +1 where j is i's own row, -1 elsewhere (SigLIP,
    arXiv 2303.15343, section 3.2). Embeddings are taken as they are: the caller normalises them. Logits are
    computed in at least fp32, whatever the input dtype and whether autocast is on; the result has that
    dtype. Over no rows the mean is NaN, as elsewhere in PyTorch.

    Args:
        a: [Va, B, D] this rank's rows.
        b: [Vb, B, D] this rank's rows.
        scale: 0-dim tensor, the inverse temperature; receives a gradient.
        bias: 0-dim tensor (SigLIP starts it at -10); receives a gradient.
        b_all: [Vb, M, D] the rows of all ranks, in rank order. The loss has one term for each entry of the
            M x M logits: the rows of `a` against `b_all` are this rank's share.
        offset: this rank's first row among the M.
        backend: "reference", "chunked" (memory grows as B), "triton" (the same on a GPU), or "auto".

    Raises:
        ValueError: shapes that do not fit; as `BackendError`, a backend that is unknown or cannot run this.
    """
    inputs = Pairs(a, b, (scale, bias), None, b_all, offset)
    inputs.check()
    out: Tensor = choose(OP, backend, inputs).run(inputs)
    return out


def _reference(x: Pairs) -> Tensor:
    """Plain maths; holds all Va x Vb logits matrices."""
    a, b, scale, bias, offset = _one_direction(x)
    dtype = compute_dtype(a, b)
    with torch.autocast(a.device.type, enabled=False):
        z = scale.to(dtype) * torch.einsum("uid,vjd->uvij", a.to(dtype), b.to(dtype)) + bias.to(dtype)
        rows = torch.arange(a.shape[1], device=z.device)
        sign = -torch.ones(z.shape[2:], dtype=dtype, device=z.device)
        sign[rows, offset + rows] = 1
        return -F.logsigmoid(sign * z).sum(3).mean(2)


def _one_direction(x: Pairs) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Rows, columns, scale, bias, offset: the other direction has the same logits."""
    scale, bias = x.scalars
    return x.a, x.b if x.b_all is None else x.b_all, scale, bias, x.offset


@torch.library.custom_op("distill::sigmoid_chunked", mutates_args=())
def sigmoid_chunked(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, offset: int) -> Tensor:
    """x [Va, B, D], y [Vb, M, D] -> [Va, Vb].

    With z the logits, each row costs the sum of softplus(z) over all columns, less z of its own column.
    """
    (va, n, _), vb = x.shape, y.shape[0]
    dtype = compute_dtype(x, y)
    with torch.autocast(x.device.type, enabled=False):
        # fp64: the sum over B * M terms, most of them tiny.
        total = x.new_zeros((va, vb), dtype=torch.float64)
        for chunk in sweep(x, y, scale, dtype):
            cost = F.softplus(chunk.z4.add_(bias.to(dtype)))
            total[chunk.us, chunk.vs] += cost.sum(3).sum(1)
        return (total / n - target_mean(x, y, scale, offset, dtype) - bias).to(dtype)


@sigmoid_chunked.register_fake
def _(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, offset: int) -> Tensor:
    return x.new_empty((x.shape[0], y.shape[0]), dtype=compute_dtype(x, y))


@torch.library.custom_op("distill::sigmoid_chunked_backward", mutates_args=())
def sigmoid_chunked_backward(
    grad: Tensor, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, offset: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `sigmoid_chunked` for x, y, scale and bias, of their dtypes; grad is [Va, Vb]."""
    dtype = compute_dtype(x, y)
    weight = grad.to(dtype) / max(x.shape[1], 1)  # [Va, Vb], each row's share
    d_bias = -(weight.double().sum() * x.shape[1])

    def dz(chunk: Chunk) -> Tensor:
        nonlocal d_bias
        dz4 = chunk.z4.add_(bias.to(dtype)).sigmoid_().mul_(weight[chunk.us, None, chunk.vs, None])
        d_bias = d_bias + dz4.sum()
        return dz4

    dx, dy, d_scale = chunked_gradients(grad, x, y, scale, offset, dz)
    return dx, dy, d_scale, d_bias.to(bias.dtype)


register_gradients(sigmoid_chunked, sigmoid_chunked_backward)


def _chunked(x: Pairs) -> Tensor:
    out: Tensor = sigmoid_chunked(*_one_direction(x))
    return out


def _triton(x: Pairs) -> Tensor:
    from distill_kernels.triton.sigmoid_loss import sigmoid_triton

    out: Tensor = sigmoid_triton(*_one_direction(x))
    return out


OP = Op(
    name="multi_view_sigmoid",
    backends=(
        Backend("reference", _reference),
        Backend("chunked", _chunked),
        Backend("triton", _triton, why_not_kernels, traceable=True),
    ),
    shape="dtype Va Vb B M D",
    cases=lambda device: cases(device, 10.0, -10.0),
)
