"""What the losses of all pairs of rows are given, and what they ask of it.

Shape letters: Va, Vb views of the two sides, B rows of this rank, M rows of all ranks, D embedding.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_kernels.dispatch import Inputs
from distill_kernels.machine import interpreting, why_not_triton
from distill_kernels.triton.launches import dot_precision


@dataclass
class Pairs(Inputs):
    """Embeddings whose rows are compared with one another, of this rank alone or with the rows of all."""

    a: Tensor  # [Va, B, D]
    b: Tensor  # [Vb, B, D]
    scalars: tuple[Tensor, ...]  # scale; scale and bias
    a_all: Tensor | None = None  # [Va, M, D]
    b_all: Tensor | None = None  # [Vb, M, D]
    offset: int = 0

    @property
    def leading(self) -> Tensor:
        """The first side."""
        return self.a

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
        return (self.b if self.b_all is None else self.b_all).shape[1]

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

    def check(self) -> None:
        """Raise ValueError with what is wrong, in terms of the op's arguments."""
        a, b, a_all, b_all = self.a, self.b, self.a_all, self.b_all
        if a.ndim != 3 or b.ndim != 3 or a.shape[1:] != b.shape[1:]:
            raise ValueError(f"a and b must be [Va, B, D] and [Vb, B, D], got {[*a.shape]} and {[*b.shape]}")
        for scalar, name in zip(self.scalars, ("scale", "bias"), strict=False):
            if scalar.ndim != 0:
                raise ValueError(f"{name} must be a 0-dim tensor, got shape {[*scalar.shape]}")
        if b_all is None:
            if self.offset:
                raise ValueError(f"offset {self.offset} needs the rows of all ranks")
            return
        sides = [(name, own, x) for name, own, x in (("a", a, a_all), ("b", b, b_all)) if x is not None]
        m = next((x.shape[1] for _, _, x in sides if x.ndim == 3), a.shape[1])
        for name, own, every in sides:
            expected = (own.shape[0], m, own.shape[2])
            if every.shape != expected:
                raise ValueError(f"{name}_all must be {[*expected]} to fit {name}, got {[*every.shape]}")
        if not 0 <= self.offset <= m - a.shape[1]:
            raise ValueError(f"rows {self.offset}..{self.offset + a.shape[1]} are not among the {m} gathered rows")


def why_not_kernels(x: Pairs | None) -> str | None:
    """Why the Triton kernels of pairs cannot take these; None asks for this machine only."""
    reason = why_not_triton(None if x is None else x.device)
    if reason is not None or x is None:
        return reason
    dtypes = {t.dtype for t in (x.a, x.b, x.a_all, x.b_all) if t is not None}
    known = {torch.float32, torch.float16, torch.bfloat16} | ({torch.float64} if interpreting() else set())
    if len(dtypes) != 1 or not dtypes <= known:
        return f"needs one dtype among float32, float16 and bfloat16, got {sorted(map(str, dtypes))}"
    if x.D % 32 or x.D < 64:
        return f"needs an embedding width that is a multiple of 32, 64 or more, got {x.D}"
    for scalar in x.scalars:
        if scalar.device != x.device:
            return f"scale or bias is on {scalar.device}, the embeddings on {x.device}"
    return None


def cases(device: torch.device, *scalars: float) -> Iterable[Pairs]:
    """The tiny recipes' size and a large one, for `tune`."""
    on_device = tuple(torch.tensor(scalar, device=device) for scalar in scalars)
    for va, vb, n, d in ((2, 8, 128, 128), (8, 2, 512, 512)):
        a, b = (F.normalize(torch.randn(v, n, d, device=device), dim=-1).requires_grad_() for v in (va, vb))
        yield Pairs(a, b, on_device)
