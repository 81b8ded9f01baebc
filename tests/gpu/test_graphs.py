"""Pool and losses in a real CUDA graph, forward and backward, and what their fp32 products are good to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill_core.system.process import set_matmul_precision
from distill_kernels import cross_attention_pool, multi_view_info_nce, multi_view_sigmoid

pytestmark = pytest.mark.usefixtures("ampere")

V, B, L, D, H = 4, 8, 21, 64, 4


def pool(form: str, backend: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    names = ("ln_q_weight", "ln_q_bias", "ln_k_weight", "ln_k_bias", "in_proj_weight", "in_proj_bias")
    shapes = dict.fromkeys(names, (D,)) | {"in_proj_weight": (3 * D, D), "in_proj_bias": (3 * D,)}
    shapes |= {"out_proj_weight": (D, D), "out_proj_bias": (D,)}
    weights = [torch.randn(shape, device="cuda") * D**-0.5 for shape in shapes.values()]
    lengths = torch.tensor([L, 0, 3, 7, L, 1, 9, L], device="cuda")

    def run(queries: Tensor, tokens: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(shapes, weights, strict=True))
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return cross_attention_pool(
                queries, tokens, **named, heads=H, lengths=lengths, backend=form, attention=backend
            )

    return run, [torch.randn(V, B, D, device="cuda"), torch.randn(B, L, D, device="cuda"), *weights]


def info_nce(backend: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    def run(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return multi_view_info_nce(a, b, scale, backend=backend)

    return run, [*embeddings(torch.float32), torch.tensor(9.0, device="cuda")]


def sigmoid(backend: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    def run(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return multi_view_sigmoid(a, b, scale, bias, backend=backend)

    return run, [*embeddings(torch.float32), torch.tensor(9.0, device="cuda"), torch.tensor(-5.0, device="cuda")]


def embeddings(dtype: torch.dtype) -> list[Tensor]:
    return [F.normalize(torch.randn(v, 32, D, device="cuda"), dim=-1).to(dtype) for v in (2, 3)]


CASES: dict[str, Callable[[], tuple[Callable[..., Tensor], list[Tensor]]]] = {
    "pool-projected-triton": lambda: pool("projected", "triton"),
    "pool-projected-sdpa": lambda: pool("projected", "sdpa"),
    "pool-absorbed": lambda: pool("absorbed", "auto"),
    "info_nce-triton": lambda: info_nce("triton"),
    "info_nce-chunked": lambda: info_nce("chunked"),
    "sigmoid-triton": lambda: sigmoid("triton"),
    "sigmoid-chunked": lambda: sigmoid("chunked"),
}


def outputs(run: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The result, and the gradients of its weighted sum."""
    out = run(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), device="cuda").view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


@pytest.mark.parametrize("case", CASES)
def test_replayed_on_other_numbers(case: str) -> None:
    """A graph that is captured once gives eager mode's numbers for inputs that it has not seen."""
    set_matmul_precision("high")
    torch.manual_seed(0)
    run, inputs = CASES[case]()
    static = [x.clone().requires_grad_() for x in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels, and lets libraries take their workspaces
        for _ in range(3):
            outputs(run, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs(run, static)

    fresh = CASES[case]()[1]
    with torch.no_grad():
        for x, new in zip(static, fresh, strict=True):
            x.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    eager = outputs(run, [x.detach().clone().requires_grad_() for x in fresh])
    for ours, expected in zip(captured, eager, strict=True):
        scale = max(expected.abs().max().item(), 1e-6)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_logits_keep_fp32_precision(precision: str) -> None:
    """Three TF32 products are as good as fp32's; one alone is off by some thousandths at this scale."""
    set_matmul_precision(precision)
    torch.manual_seed(0)
    a, b = (F.normalize(torch.randn(2, 96, 128, device="cuda"), dim=-1) for _ in range(2))
    scale, bias = torch.tensor(100.0, device="cuda"), torch.tensor(-50.0, device="cuda")
    exact = [x.double() for x in (a, b, scale, bias)]
    for loss, inputs in ((multi_view_info_nce, 3), (multi_view_sigmoid, 4)):
        ours = loss(*(a, b, scale, bias)[:inputs], backend="triton")
        truth = loss(*exact[:inputs], backend="reference")
        torch.testing.assert_close(ours.double(), truth, rtol=2e-5, atol=2e-4)
