"""The formulas that torch's counter lacks, or has slower, against its own."""

import pytest
import torch
from torch.nn.attention import varlen
from torch.utils.flop_counter import FlopCounterMode

from distill_core.system.flops import flop_counter


@pytest.mark.parametrize("width", [16, 32])
def test_packed_attention(width: int) -> None:
    """Forward and backward, over sequences of several lengths, one of them empty: what torch adds up one by one."""
    assert varlen is not None  # registers the operators
    bounds_q, bounds_k = torch.tensor([0, 3, 3, 10, 12]), torch.tensor([0, 5, 6, 8, 9])
    q, grad, out = (torch.randn(12, 4, width, device="meta") for _ in range(3))
    k, v = (torch.randn(9, 4, width, device="meta") for _ in range(2))
    lse = torch.randn(4, 12, device="meta")
    counts = []
    for counter in (FlopCounterMode(display=False), flop_counter()):
        for operator, arguments in (
            (torch.ops.torch_attn._varlen_attn, (q, k, v, bounds_q, bounds_k, 7, 5)),
            (
                torch.ops.torch_attn._varlen_attn_backward,
                (grad, q, k, v, out, lse, bounds_q, bounds_k, 7, 5, False, torch.empty(2)),
            ),
        ):
            counts.append(counter.flop_registry[operator](*arguments))
    assert counts[:2] == counts[2:]
    assert counts[0] == 4 * (3 * 5 + 7 * 2 + 2 * 1) * 4 * width
