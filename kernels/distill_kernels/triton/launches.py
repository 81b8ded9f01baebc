"""What every launch of a Triton kernel shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **constants: Any) -> None:
    """`kernel[grid](*arguments, **constants)` on the device of the first argument.

    Triton launches on the current device, which need not be the tensors'.
    """
    first: Tensor = arguments[0]
    with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]  # nothing for tensors on the CPU
        kernel[tuple(grid)](*arguments, **constants)


def dot_precision() -> str:
    """tl.dot's input_precision for fp32 operands: "tf32x3" where torch's own products may be in TF32, else "ieee".

    Three TF32 products (Triton's split of both operands) keep fp32's precision on tensor cores; one would leave logits
    near 100 good to a few thousandths.
    """
    # allow_tf32 cannot be read once a user has set fp32_precision; this reads both. Few AMD cards have tf32.
    return "tf32x3" if not torch.version.hip and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
