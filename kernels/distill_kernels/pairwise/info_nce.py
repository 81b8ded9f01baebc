"""Multi-view InfoNCE: every pair of views, both directions, in one call.

Shape letters: Va, Vb views of the two sides, B rows of this rank, M rows of all ranks, D embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_kernels.dispatch import Backend, Op, choose
from distill_kernels.machine import interpreting, why_not_triton
from distill_kernels.pairwise.chunked_info_nce import info_nce_chunked
from distill_kernels.pairwise.chunks import compute_dtype
from distill_kernels.triton.launches import dot_precision


class InfoNCEInputs(NamedTuple):
    """The arguments of `multi_view_info_nce`."""

    a: Tensor  # [Va, B, D]
    b: Tensor  # [Vb, B, D]
    scale: Tensor
    a_all: Tensor | None  # [Va, M, D]
    b_all: Tensor | None  # [Vb, M, D]
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
        return (self.a if self.a_all is None else self.a_all).shape[1]

    @property
    def D(self) -> int:
        """Embedding width."""
        return self.a.shape[2]

    @property
    def tensor_cores(self) -> bool:
        """Whether a GPU's products are on tensor cores: in half precision, or fp32 as three TF32 products."""
        return self.bytes < 4 or dot_precision() != "ieee"

    @property
    def logits(self) -> int:
        """Of one direction, over all pairs of views."""
        return self.Va * self.Vb * self.B * self.M

    @property
    def autocast(self) -> bool:
        """Whether it is on; a compiled backward pass would then lower the reference's matmuls."""
        return torch.is_autocast_enabled(self.device.type)


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
    check_inputs(a, b, scale, a_all, b_all, offset)
    inputs = InfoNCEInputs(a, b, scale, a_all, b_all, offset)
    out: Tensor = choose(OP, backend, inputs).run(inputs)
    return out


def check_inputs(a: Tensor, b: Tensor, scale: Tensor, a_all: Tensor | None, b_all: Tensor | None, offset: int) -> None:
    """Raise ValueError with what is wrong, in terms of the caller's arguments."""
    if a.ndim != 3 or b.ndim != 3 or a.shape[1:] != b.shape[1:]:
        raise ValueError(f"a and b must be [Va, B, D] and [Vb, B, D], got {[*a.shape]} and {[*b.shape]}")
    if scale.ndim != 0:
        raise ValueError(f"scale must be a 0-dim tensor, got shape {[*scale.shape]}")
    if (a_all is None) != (b_all is None):
        raise ValueError("give both a_all and b_all, or neither")
    if a_all is None or b_all is None:
        if offset:
            raise ValueError(f"offset {offset} needs a_all and b_all")
        return
    m = a_all.shape[1] if a_all.ndim == 3 else b_all.shape[1] if b_all.ndim == 3 else a.shape[1]
    for name, own, every in (("a", a, a_all), ("b", b, b_all)):
        expected = (own.shape[0], m, own.shape[2])
        if every.shape != expected:
            raise ValueError(f"{name}_all must be {[*expected]} to fit {name}, got {[*every.shape]}")
    if not 0 <= offset <= m - a.shape[1]:
        raise ValueError(f"rows {offset}..{offset + a.shape[1]} are not among the {m} gathered rows")


def _reference(x: InfoNCEInputs) -> Tensor:
    """Plain maths; holds all Va x Vb logits matrices."""
    dtype = compute_dtype(x.a, x.b)
    a, b, scale = x.a.to(dtype), x.b.to(dtype), x.scale.to(dtype)
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


def _chunked(x: InfoNCEInputs) -> Tensor:
    if x.a_all is None or x.b_all is None:
        loss: Tensor = info_nce_chunked(x.a, x.b, x.scale, 0, True)[0]
        return loss
    ab: Tensor = info_nce_chunked(x.a, x.b_all, x.scale, x.offset, False)[0]
    ba: Tensor = info_nce_chunked(x.b, x.a_all, x.scale, x.offset, False)[0]
    return 0.5 * (ab + ba.T)


def _triton(x: InfoNCEInputs) -> Tensor:
    from distill_kernels.triton.info_nce import info_nce_triton

    if x.a_all is None or x.b_all is None:
        loss: Tensor = info_nce_triton(x.a, x.b, x.scale, 0, True)[0]
        return loss
    ab: Tensor = info_nce_triton(x.a, x.b_all, x.scale, x.offset, False)[0]
    ba: Tensor = info_nce_triton(x.b, x.a_all, x.scale, x.offset, False)[0]
    return 0.5 * (ab + ba.T)


def _runs(x: InfoNCEInputs | None) -> str | None:
    return None


def why_not_pairwise(embeddings: Sequence[Tensor] = (), scalars: Sequence[Tensor] = ()) -> str | None:
    """Why the Triton kernels of pairs cannot take these, or, without any, why this machine cannot run them."""
    device = embeddings[0].device if embeddings else None
    reason = why_not_triton(device)
    if reason is not None:
        return reason
    dtypes = {t.dtype for t in embeddings}
    known = {torch.float32, torch.float16, torch.bfloat16} | ({torch.float64} if interpreting() else set())
    if embeddings and (len(dtypes) != 1 or not dtypes <= known):
        return f"needs one dtype among float32, float16 and bfloat16, got {sorted(map(str, dtypes))}"
    for scalar in scalars:
        if scalar.device != device:
            return f"scale or bias is on {scalar.device}, the embeddings on {device}"
    return None


def _why_not_triton(x: InfoNCEInputs | None) -> str | None:
    if x is None:
        return why_not_pairwise()
    return why_not_pairwise([t for t in (x.a, x.b, x.a_all, x.b_all) if t is not None], (x.scale,))


def _cases(device: torch.device) -> Iterable[InfoNCEInputs]:
    scale = torch.tensor(1 / 0.07, device=device)
    for va, vb, n, d in ((2, 8, 128, 128), (8, 2, 512, 512)):
        a, b = (F.normalize(torch.randn(v, n, d, device=device), dim=-1).requires_grad_() for v in (va, vb))
        yield InfoNCEInputs(a, b, scale, None, None, 0)


OP = Op(
    name="multi_view_info_nce",
    backends=(
        Backend("reference", _runs, _reference),
        Backend("chunked", _runs, _chunked),
        Backend("triton", _why_not_triton, _triton),
    ),
    shape="dtype Va Vb B M D",
    cases=_cases,
)
