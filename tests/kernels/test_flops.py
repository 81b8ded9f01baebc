"""The FLOPs that our operators state, against torch's counter on what they call."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import distill_kernels.triton.cross_attention  # noqa: F401  # registers its operators
from distill_kernels import cross_attention, multi_view_info_nce
from distill_kernels.attention import absorbed_attention
from distill_kernels.pairwise import chunked_info_nce, sigmoid_loss
from distill_kernels.triton import info_nce as triton_info_nce


def counted(run: Callable[[], Any]) -> int:
    """By torch's counter, and a product that adds in place, which its table lacks."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_}) as counter:
        run()
    return counter.get_total_flops()


def addmm_(total: torch.Size, a: torch.Size, b: torch.Size, **_: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize("for_tokens", [True, False])
@pytest.mark.parametrize("for_weights", [True, False])
def test_absorbed_attention(for_tokens: bool, for_weights: bool) -> None:
    v, b, length, d, heads = 3, 5, 17, 32, 4
    x, tokens = torch.randn(v, b, d), torch.randn(b, length, d)
    arguments = (x, tokens, torch.ones(d), torch.zeros(d), torch.randn(3 * d, d), torch.zeros(3 * d))
    forward = (*arguments, None, heads, 1e-5)
    body = absorbed_attention._forward._init_fn
    assert counted(lambda: torch.ops.distill.absorbed_attention(*forward)) == counted(lambda: body(*forward))
    out, q, p = body(*forward)
    backward = (out, *arguments[:5], None, q, p, heads, 1e-5, for_tokens, for_weights)
    assert counted(lambda: torch.ops.distill.absorbed_attention_backward(*backward)) == counted(
        lambda: absorbed_attention._backward._init_fn(*backward)
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_chunked_info_nce(symmetric: bool) -> None:
    """But for the targets' products, which grow with rows and not with pairs of them."""
    b, m = 200, 200 if symmetric else 600
    x, y, scale = torch.randn(2, b, 16), torch.randn(3, m, 16), torch.tensor(10.0)
    _, rows, columns = chunked_info_nce.info_nce_chunked(x, y, scale, 0, symmetric)
    close_to_body(chunked_info_nce.info_nce_chunked, (x, y, scale, 0, symmetric))
    backward = (torch.ones(2, 3), x, y, scale, rows, columns, 0, symmetric)
    close_to_body(chunked_info_nce.info_nce_chunked_backward, backward)


def test_chunked_sigmoid() -> None:
    x, y, scale, bias = torch.randn(2, 200, 16), torch.randn(3, 600, 16), torch.tensor(10.0), torch.tensor(-10.0)
    close_to_body(sigmoid_loss.sigmoid_chunked, (x, y, scale, bias, 0))
    close_to_body(sigmoid_loss.sigmoid_chunked_backward, (torch.ones(2, 3), x, y, scale, bias, 0))


def close_to_body(operator: Any, arguments: tuple[Any, ...]) -> None:
    stated = counted(lambda: operator(*arguments))
    assert stated > 0
    assert stated == pytest.approx(counted(lambda: operator._init_fn(*arguments)), rel=0.02)


def test_triton_info_nce_sweeps_each_side() -> None:
    """Of one rank's rows for rows and for columns; over ranks each direction once, which are two calls."""
    x, y, scale = torch.randn(2, 8, 64), torch.randn(3, 8, 64), torch.tensor(1.0)
    pairs = 2 * 2 * 3 * 8 * 8 * 64
    assert counted(lambda: triton_info_nce.info_nce_triton(x, y, scale, 0, True)) == 2 * pairs
    assert counted(lambda: triton_info_nce.info_nce_triton(x, y, scale, 0, False)) == pairs
    x.requires_grad_()
    whole = counted(lambda: multi_view_info_nce(x, y, scale, backend="triton").sum().backward())
    assert whole == (2 + 3) * pairs


def test_triton_cross_attention() -> None:
    """As the plain formula, whose backward pass has the scores still."""
    q, k, v = (torch.randn(2, 3, n, 16, requires_grad=True) for n in (4, 9, 9))
    product = 2 * 2 * 3 * 4 * 9 * 16

    def step(backend: str) -> int:
        return counted(lambda: cross_attention(q, k, v, backend=backend).sum().backward())

    assert step("matmul") == 6 * product
    assert step("triton") == 7 * product
