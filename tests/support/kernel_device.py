"""Where kernels are tested: on the GPU where there is one, else on the CPU, Triton's in its interpreter."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

# tests/conftest.py chooses the interpreter by the same question, before triton is imported
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class _Here:
    """torch's factories on `DEVICE`: `here.randn(2, 3)`, `here.tensor(1.0)`."""

    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        return partial(getattr(torch, name), device=DEVICE)


here = _Here()


def skip_float64_on_gpu(backend: str) -> None:
    """Triton's kernels take float64 in the interpreter alone."""
    if backend == "triton" and DEVICE == "cuda":
        pytest.skip("Triton's kernels take no float64 on a GPU")


def width_for(backend: str, width: int) -> int:
    """An embedding width, or what Triton's kernels of pairs take near it: multiples of 32 from 64 on."""
    return max(64, -(-width // 32) * 32) if backend == "triton" else width
