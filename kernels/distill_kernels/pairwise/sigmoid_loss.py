"""Multi-view sigmoid loss: every pair of views in one call, logits one chunk at a time.

Shape letters: Va, Vb views of the two sides, B rows of this rank, M rows of all ranks, D embedding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_kernels.dispatch import Backend, Op, choose
from distill_kernels.pairwise.chunks import Chunk, chunked_gradients, compute_dtype, sweep, target_mean
from distill_kernels.pairwise.info_nce import check_inputs, why_not_pairwise
from distill_kernels.pairwise.operators import register_gradients
from distill_kernels.triton.launches import dot_precision


class SigmoidInputs(NamedTuple):
    """The arguments of `multi_view_sigmoid`; `b` are the rows of all ranks."""

    a: Tensor  # [Va, B, D]
    b: Tensor  # [Vb, M, D]
    scale: Tensor
    bias: Tensor
    offset: int

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.a.device

    @property
    def dtype(self) -> str:
        """Of the products."""
        return str(self.a.dtype).removeprefix("torch.")

    @property
    def bytes(self) -> int:
        """Of an element."""
        return self.a.dtype.itemsize

    @property
    def Va(self) -> int:
        """Views of a."""
        return self.a.shape[0]

    @property
    def Vb(self) -> int:
        """Views of b."""
        return self.b.shape[0]

    @property
    def B(self) -> int:
        """This rank's rows."""
        return self.a.shape[1]

    @property
    def M(self) -> int:
        """The rows of all ranks."""
        return self.b.shape[1]

    @property
    def D(self) -> int:
        """Embedding width."""
        return self.a.shape[2]

    @property
    def tensor_cores(self) -> bool:
        """Whether a GPU's products are on tensor cores: in half precision, or fp32 as three TF32 products."""
        return self.bytes < 4 or dot_precision() != "ieee"


def multi_view_sigmoid(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    a_all: Tensor | None = None,
    b_all: Tensor | None = None,
    offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Sigmoid loss of every view of `a` against every view of `b`: [Va, B, D], [Vb, B, D] -> [Va, Vb].

    Entry (u, v) is the mean over rows i of the sum over columns j of
    -log sigmoid(t (scale a_i . b_j + bias)), t = +1 where j is i's own row, -1 elsewhere (SigLIP,
    arXiv 2303.15343, equation 1). Embeddings are taken as they are: the caller normalises them. Logits are
    computed in at least fp32, whatever the input dtype and whether autocast is on; the result has that
    dtype. Over no rows the mean is NaN, as elsewhere in PyTorch.

    Args:
        a: [Va, B, D] this rank's rows.
        b: [Vb, B, D] this rank's rows.
        scale: 0-dim tensor, the inverse temperature; receives a gradient.
        bias: 0-dim tensor (SigLIP starts it at -10); receives a gradient.
        a_all: [Va, M, D], accepted so that both losses take the same arguments. The loss has one term for
            each entry of the M x M logits, and the rows of `a` against `b_all` are this rank's share.
        b_all: [Vb, M, D] the rows of all ranks, in rank order; with `a_all`, or neither.
        offset: this rank's first row among the M.
        backend: "reference", "chunked" (memory grows as B), "triton" (the same on a GPU), or "auto".

    Raises:
        ValueError: shapes that do not fit; as `BackendError`, a backend that is unknown or cannot run this.
    """
    check_inputs(a, b, scale, a_all, b_all, offset)
    if bias.ndim != 0:
        raise ValueError(f"bias must be a 0-dim tensor, got shape {[*bias.shape]}")
    inputs = SigmoidInputs(a, b if b_all is None else b_all, scale, bias, offset)
    out: Tensor = choose(OP, backend, inputs).run(inputs)
    return out


def _reference(x: SigmoidInputs) -> Tensor:
    """Plain maths; holds all Va x Vb logits matrices."""
    dtype = compute_dtype(x.a, x.b)
    with torch.autocast(x.a.device.type, enabled=False):
        z = x.scale.to(dtype) * torch.einsum("uid,vjd->uvij", x.a.to(dtype), x.b.to(dtype)) + x.bias.to(dtype)
        rows = torch.arange(x.a.shape[1], device=z.device)
        sign = -torch.ones(z.shape[2:], dtype=dtype, device=z.device)
        sign[rows, x.offset + rows] = 1
        return -F.logsigmoid(sign * z).sum(3).mean(2)


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


def _chunked(x: SigmoidInputs) -> Tensor:
    out: Tensor = sigmoid_chunked(*x)
    return out


def _triton(x: SigmoidInputs) -> Tensor:
    from distill_kernels.triton.sigmoid_loss import sigmoid_triton

    out: Tensor = sigmoid_triton(*x)
    return out


def _why_not_triton(x: SigmoidInputs | None) -> str | None:
    return why_not_pairwise() if x is None else why_not_pairwise((x.a, x.b), (x.scale, x.bias))


def _runs(x: SigmoidInputs | None) -> str | None:
    return None


def _cases(device: torch.device) -> Iterable[SigmoidInputs]:
    scale, bias = torch.tensor(10.0, device=device), torch.tensor(-10.0, device=device)
    for va, vb, n, d in ((2, 8, 128, 128), (8, 2, 512, 512)):
        a, b = (F.normalize(torch.randn(v, n, d, device=device), dim=-1).requires_grad_() for v in (va, vb))
        yield SigmoidInputs(a, b, scale, bias, 0)


OP = Op(
    name="multi_view_sigmoid",
    backends=(
        Backend("reference", _runs, _reference),
        Backend("chunked", _runs, _chunked),
        Backend("triton", _why_not_triton, _triton),
    ),
    shape="dtype Va Vb B M D",
    cases=_cases,
)
