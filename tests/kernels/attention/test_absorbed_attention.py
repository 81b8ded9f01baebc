"""absorbed_attention: the op behind the absorbed form of cross_attention_pool, on its own."""

import pytest
import torch
import torch.nn.functional as F
from kernel_device import DEVICE, here
from torch import Tensor
from torch.autograd import gradcheck

from distill_kernels.attention import absorbed_attention as module
from distill_kernels.attention.absorbed_attention import absorbed_attention


def some_valid() -> Tensor:
    """Of 3 samples' 5 tokens: all, none, and some."""
    return here.tensor([[1, 1, 1, 1, 1], [0] * 5, [0, 1, 1, 0, 1]]).bool()


def absorbed_inputs(v: int, b: int, n: int, d: int, dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = {"x": (v, b, d), "tokens": (b, n, d), "ln_weight": (d,), "ln_bias": (d,)}
    shapes |= {"in_proj_weight": (3 * d, d), "in_proj_bias": (3 * d,)}
    return {name: here.randn(*shape, dtype=dtype).div_(2).requires_grad_() for name, shape in shapes.items()}


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_absorbed_gradcheck(masked: bool) -> None:
    leaves, valid = absorbed_inputs(2, 3, 5, 6, torch.float64), some_valid() if masked else None

    def attend(*values: Tensor) -> Tensor:
        x, tokens, *weights = values
        return absorbed_attention(x, tokens, **dict(zip(list(leaves)[2:], weights, strict=True)), heads=2, valid=valid)

    assert gradcheck(attend, tuple(leaves.values()))


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_absorbed_opcheck(dtype: torch.dtype, strided: bool, masked: bool) -> None:
    x, tokens, *weights = (t.detach() for t in absorbed_inputs(2, 3, 5, 6, dtype).values())
    d_out = torch.randn_like(x)
    if strided:
        d_out, x, tokens = (t.mT.contiguous().mT for t in (d_out, x, tokens))
        weights[2] = weights[2].mT.contiguous().mT
    valid = some_valid() if masked else None
    leaves = [t.requires_grad_() for t in (x, tokens, *(w.float() for w in weights))]
    torch.library.opcheck(torch.ops.distill.absorbed_attention.default, (*leaves, valid, 2, 1e-5))
    with torch.no_grad():
        _, q, p = torch.ops.distill.absorbed_attention(*leaves, valid, 2, 1e-5)
        for wanted in ((True, True), (True, False), (False, True)):
            args = (d_out, *leaves[:5], valid, q, p, 2, 1e-5, *wanted)
            torch.library.opcheck(torch.ops.distill.absorbed_attention_backward.default, args)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("v", "b", "n"), [(0, 2, 3), (2, 0, 3), (2, 2, 0), (0, 0, 0)])
def test_absorbed_of_nothing(v: int, b: int, n: int, dtype: torch.dtype) -> None:
    leaves = absorbed_inputs(v, b, n, 8, dtype)
    out = absorbed_attention(**leaves, heads=2)
    assert torch.equal(out, here.zeros(v, b, 8, dtype=dtype))
    for t, g in zip(leaves.values(), torch.autograd.grad(out.sum(), list(leaves.values())), strict=True):
        assert g.dtype == t.dtype
        assert torch.equal(g, torch.zeros_like(t))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("samples", [1, 2, 3, 5])
def test_absorbed_works_in_chunks(samples: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five samples in chunks of equal size but for the last, against the formula in fp64; every element is written."""
    v, b, n, d, h = 3, 5, 7, 16, 2
    leaves = absorbed_inputs(v, b, n, d, dtype)
    x, tokens, ln_weight, ln_bias, w, bias = wide = [t.detach().double().requires_grad_() for t in leaves.values()]
    q = F.linear(x, w[:d], bias[:d]).view(v, b, h, -1).permute(1, 2, 0, 3)
    kv = F.linear(F.layer_norm(tokens, (d,), ln_weight, ln_bias), w[d:], bias[d:])
    k, values = kv.view(b, n, 2, h, d // h).permute(2, 0, 3, 1, 4)  # [B, H, L, K]
    expected = (q @ k.mT / (d // h) ** 0.5).softmax(-1) @ values
    expected = expected.permute(2, 0, 1, 3).reshape(v, b, d)
    grad = here.randn(v, b, d).to(dtype)
    truth = (expected, *torch.autograd.grad(expected, wide, grad.double()))

    size = samples * (n + 2 * h * v) * d * dtype.itemsize
    monkeypatch.setattr(module, "numbers_for", lambda part, tensor: {"chunk_bytes": size})
    out = absorbed_attention(**leaves, heads=h)
    ours = (out, *torch.autograd.grad(out, list(leaves.values()), grad))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for name, a, e in zip(("out", *leaves), ours, truth, strict=True):
        assert (a.double() - e).norm() <= tolerance * e.norm(), name


@pytest.mark.parametrize(
    "frozen", [("tokens",), ("ln_weight", "ln_bias", "in_proj_weight", "in_proj_bias"), ("ln_bias",)]
)
def test_absorbed_gradients_of_what_is_trained(frozen: tuple[str, ...]) -> None:
    """What is frozen costs others no bit of theirs and gets none."""
    leaves = absorbed_inputs(3, 5, 7, 16, torch.float32)
    absorbed_attention(**leaves, heads=2).square().sum().backward()
    truth = {name: t.grad for name, t in leaves.items()}
    for name, t in leaves.items():
        t.grad = None
        t.requires_grad_(name not in frozen)
    absorbed_attention(**leaves, heads=2).square().sum().backward()
    for name, t in leaves.items():
        if name in frozen:
            assert t.grad is None
        else:
            assert torch.equal(t.grad, truth[name])


def test_absorbed_backward_within_autocast() -> None:
    """It computes in the dtypes of its forward pass."""
    leaves = absorbed_inputs(2, 3, 5, 8, torch.float32)
    out = absorbed_attention(**leaves, heads=2)
    expected = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out), retain_graph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)
