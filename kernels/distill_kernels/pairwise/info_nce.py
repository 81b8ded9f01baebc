"""Multi-view InfoNCE: every pair of views, both directions, in one call.

Shape letters: Va, Vb views of the two sides, B rows of this rank, M rows of all ranks, D embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from distill_kernels.dispatch import Backend, Op, choose
from distill_kernels.pairwise.chunked_info_nce import info_nce_chunked, info_nce_chunked_backward
from distill_kernels.pairwise.chunks import compute_dtype
from distill_kernels.pairwise.pairs import Pairs, cases, why_not_kernels


def multi_view_info_nce(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    *,
    a_all: Tensor | None = None,
    b_all: Tensor | None = None,
    offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """InfoNCE of every view of `a` against every view of `b`: [Va, B, D], [Vb, B, D] -> [Va, Vb].

    Entry (u, v) is the mean of two cross-entropies, a -> b and b -> a, of `scale * a[u] @ b[v].T` with row
    i's target on the diagonal (CLIP, arXiv 2103.00020, figure 3). Embeddings are taken as they are: the
    caller normalises them. Logits and log-sum-exp are computed in at least fp32, whatever the input dtype
    and whether autocast is on; the result has that dtype. Over no rows the mean is NaN, as elsewhere in
    PyTorch.

    Args:
        a: [Va, B, D] this rank's rows.
        b: [Vb, B, D] this rank's rows.
        scale: 0-dim tensor, exp(logit_scale); receives a gradient.
        a_all: [Va, M, D] the rows of all ranks, in rank order; with `b_all`, or neither. The result is then
            this rank's: its own rows against all columns. The mean over ranks is the loss of the whole batch.
        b_all: [Vb, M, D].
        offset: this rank's first row among the M.
        backend: "reference", "chunked" (memory grows as B), "triton" (the same on a GPU), or "auto".

    Raises:
        ValueError: shapes that do not fit; as `BackendError`, a backend that is unknown or cannot run this.
    """
    if (a_all is None) != (b_all is None):
        raise ValueError("give both a_all and b_all, or neither")
    inputs = Pairs(a, b, (scale,), a_all, b_all, offset)
    inputs.check()
    out: Tensor = choose(OP, backend, inputs).run(inputs)
    return out


def info_nce_sums(a: Tensor, b: Tensor, scale: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Log-sum-exps of the logits scale * a[u] @ b[v].T of some rows and some columns: [Va, Vb, B] each, of rows over
    these columns and of columns over these rows. InfoNCE over more columns is a `logaddexp` of such sums.

    Not differentiable: `info_nce_gradients` takes the sums over all columns.
    """
    inputs = Pairs(a, b, (scale,))
    inputs.check()
    if _on_triton(inputs, backend):
        from distill_kernels.triton.info_nce import info_nce_triton

        _, rows, columns = info_nce_triton(a, b, scale, 0, True)
        return rows, columns.transpose(0, 1)
    _, rows, columns = info_nce_chunked(a, b, scale, 0, True)
    return rows.transpose(1, 2), columns


def info_nce_gradients(
    grad: Tensor, a: Tensor, b: Tensor, scale: Tensor, sums: Tensor, *, positives: bool, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for a, b and scale of one direction a -> b: of grad [Va, Vb] times the mean over rows of `sums`, the
    log-sum-exps [Va, Vb, B] of a's rows over all columns, b's among them. With `positives`, b's rows are the targets.
    """
    inputs, grad, none = Pairs(a, b, (scale,)), grad.contiguous(), sums.new_empty(0)
    of_a: Tensor
    if _on_triton(inputs, backend):
        from distill_kernels.triton.info_nce import info_nce_triton_backward

        of_a, of_b, of_scale = info_nce_triton_backward(grad, a, b, scale, sums.contiguous(), none, 0, False)
    else:
        rows = sums.transpose(1, 2).contiguous()
        of_a, of_b, of_scale = info_nce_chunked_backward(grad, a, b, scale, rows, none, 0, False)
    if positives:
        return of_a, of_b, of_scale
    # the operators take each row's own place for its target: back with what that has taken off
    weight = grad.to(a.dtype) / max(a.shape[1], 1)
    pulled = torch.einsum("uv,vid->uid", weight, b)
    return (
        of_a + scale * pulled,
        of_b + scale * torch.einsum("uv,uid->vid", weight, a),
        of_scale + (a * pulled).sum().to(scale.dtype),
    )


def _on_triton(inputs: Pairs, backend: str) -> bool:
    return choose(OP, backend, inputs).name == "triton"


def _reference(x: Pairs) -> Tensor:
    """Plain maths; holds all Va x Vb logits matrices."""
    dtype = compute_dtype(x.a, x.b)
    a, b, scale = x.a.to(dtype), x.b.to(dtype), x.scalars[0].to(dtype)
    with torch.autocast(a.device.type, enabled=False):
        if x.a_all is None or x.b_all is None:
            z = scale * torch.einsum("uid,vjd->uvij", a, b)
            target = z.diagonal(dim1=2, dim2=3)  # [Va, Vb, B]
            return (0.5 * (z.logsumexp(3) + z.logsumexp(2)) - target).mean(-1)
        a_all, b_all = x.a_all.to(dtype), x.b_all.to(dtype)
        own = slice(x.offset, x.offset + a.shape[1])
        target_ab = scale * torch.einsum("uid,vid->uvi", a, b_all[:, own])
        target_ba = scale * torch.einsum("uid,vid->uvi", a_all[:, own], b)
        lse_ab = (scale * torch.einsum("uid,vjd->uvij", a, b_all)).logsumexp(3)
        lse_ba = (scale * torch.einsum("vid,ujd->uvij", b, a_all)).logsumexp(3)
        return 0.5 * (lse_ab - target_ab + lse_ba - target_ba).mean(-1)


def _directions(x: Pairs, of_one: CustomOpDef) -> Tensor:
    """The mean of both, by an operator that takes one direction's rows and columns, or one side's for both."""
    (scale,) = x.scalars
    if x.a_all is None or x.b_all is None:
        loss: Tensor = of_one(x.a, x.b, scale, 0, True)[0]
        return loss
    ab: Tensor = of_one(x.a, x.b_all, scale, x.offset, False)[0]
    ba: Tensor = of_one(x.b, x.a_all, scale, x.offset, False)[0]
    return 0.5 * (ab + ba.T)


def _chunked(x: Pairs) -> Tensor:
    return _directions(x, info_nce_chunked)


def _triton(x: Pairs) -> Tensor:
    from distill_kernels.triton.info_nce import info_nce_triton

    return _directions(x, info_nce_triton)


OP = Op(
    name="multi_view_info_nce",
    backends=(
        Backend("reference", _reference),
        Backend("chunked", _chunked),
        Backend("triton", _triton, why_not_kernels, traceable=True),
    ),
    shape="dtype Va Vb B M D",
    cases=lambda device: cases(device, 1 / 0.07),
)
