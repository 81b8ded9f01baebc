"""cross_attention: every backend against the formula written out in float64, its gradients, and its contracts.

The Triton backend runs in Triton's interpreter when there is no GPU (kernel_device.py).
"""

import itertools
import math

import pytest
import torch
from kernel_device import DEVICE
from tiers import cases_of
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from distill_kernels import cross_attention
from distill_kernels.attention.cross_attention import OP, CrossAttentionInputs
from distill_kernels.dispatch import BackendError, choose, listing

BACKENDS = ("reference", "matmul", "sdpa", "xformers", "triton")

# Largest error allowed, relative to the largest entry of the float64 result. A half-precision result is rounded
# once (2^-8 in bf16, 2^-11 in fp16), and so are the probabilities on the way.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# B, H, V, L, K: the views and token counts of the recipes, and odd ones; K powers of two and not.
SHAPES = [
    (2, 2, 8, 77, 64),
    (3, 1, 1, 1, 16),
    (4, 1, 3, 49, 112),
    (2, 1, 64, 33, 32),
    (3, 1, 8, 196, 80),
    (2, 1, 3, 257, 128),
    (4, 1, 70, 20, 48),
    (4, 1, 35, 20, 96),
]


def written_out(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float, dout: Tensor) -> list[Tensor]:
    """Output, dq, dk, dv in float64, sample by sample over its valid tokens only, backward by hand."""
    q, k, v, dout = (t.detach().double() for t in (q, k, v, dout))
    out, dq, dk, dv = (torch.zeros_like(t) for t in (q, q, k, v))
    for b in range(q.shape[0]):
        keep = torch.arange(k.shape[2], device=k.device) if valid is None else valid[b].nonzero()[:, 0]
        for h in range(q.shape[1]):
            if len(keep) == 0:
                continue
            keys, values = k[b, h, keep], v[b, h, keep]
            scores = scale * q[b, h] @ keys.T
            weights = (scores - scores.amax(1, keepdim=True)).exp()
            p = weights / weights.sum(1, keepdim=True)
            out[b, h] = p @ values
            dp = dout[b, h] @ values.T
            ds = p * (dp - (p * dp).sum(1, keepdim=True)) * scale
            dq[b, h] = ds @ keys
            dk[b, h, keep] = ds.T @ q[b, h]
            dv[b, h, keep] = p.T @ dout[b, h]
    return [out, dq, dk, dv]


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    b, h, views, tokens, width = shape
    g = torch.Generator().manual_seed(seed)
    sizes = ((b, h, views, width), (b, h, tokens, width), (b, h, tokens, width))
    q, k, v = (torch.randn(s, generator=g).to(DEVICE, dtype).requires_grad_() for s in sizes)
    return q, k, v


def valid_tokens(kind: str, b: int, tokens: int) -> tuple[dict[str, Tensor], Tensor | None]:
    """Keyword arguments of a call, and the [B, L] mask that they mean."""
    if kind == "all":
        return {}, None
    g = torch.Generator().manual_seed(1)
    if kind == "mask":
        mask = (torch.rand(b, tokens, generator=g) < 0.6).to(DEVICE)
        return {"mask": mask}, mask
    # An odd one, then the full one: with one sample alone, or only zeros, a wrong length might not show.
    lengths = torch.tensor([(tokens - tokens // 3) | 1, tokens, 0, 1][:b]).to(DEVICE)
    assert 2 <= b == len(lengths)
    if kind == "int32":
        lengths = lengths.int()
    return {"lengths": lengths}, torch.arange(tokens, device=DEVICE) < lengths[:, None]


def run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, backend: str, **options: Tensor | float) -> list[Tensor]:
    out = cross_attention(q, k, v, backend=backend, **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def skip_unless(backend: str, inputs: CrossAttentionInputs) -> None:
    reason = OP.get(backend).why_not(inputs)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def assert_close(ours: list[Tensor], truth: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, truth, strict=True):
        # Absolute where the truth is zero: an only token's dq and dk are differences of equal numbers.
        error = (a.double() - b).abs().max().item() / max(b.abs().max().item(), 1.0)
        assert error <= tolerance, f"{name}: {error:.2e} > {tolerance}"


@pytest.mark.parametrize(
    ("shape", "kind", "backend"),
    cases_of(
        itertools.product(SHAPES, ["all", "lengths", "int32", "mask"], BACKENDS),
        # the interpreter takes up to half a second: each shape once, each kind at small ones
        lambda case: case[2] != "triton" or case[1] == "lengths" or case[0] in SHAPES[1:3],
    ),
    ids=str,
)
def test_output_and_gradients(shape: tuple[int, ...], kind: str, backend: str) -> None:
    q, k, v = make(shape, torch.float32)
    options, valid = valid_tokens(kind, shape[0], shape[3])
    scale = shape[4] ** -0.5
    skip_unless(backend, CrossAttentionInputs(q, k, v, options.get("lengths"), options.get("mask"), scale))
    dout = torch.randn_like(q)
    truth = written_out(q, k, v, valid, scale, dout)
    assert_close(run(q, k, v, dout, backend, **options), truth, TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("shape", "dtype", "backend"),
    cases_of(
        itertools.product(SHAPES[2:], [torch.float64, torch.float16, torch.bfloat16], BACKENDS),
        lambda case: case[2] != "triton" or case[0] in SHAPES[2:4],
    ),
    ids=str,
)
def test_dtypes(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    q, k, v = make(shape, dtype)
    options, valid = valid_tokens("lengths", shape[0], shape[3])
    skip_unless(backend, CrossAttentionInputs(q, k, v, options["lengths"], None, 0.1))
    dout = torch.randn_like(q)
    ours = run(q, k, v, dout, backend, scale=0.1, **options)
    assert [t.dtype for t in ours] == [dtype] * 4
    assert_close(ours, written_out(q, k, v, valid, 0.1, dout), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend: str) -> None:
    """The layouts of a module: q as [V, B, H, K], k and v interleaved, a broadcast and a reversed stride."""
    b, h, views, tokens, width = 2, 2, 5, 21, 16
    q = torch.randn(views, b, h, width, device=DEVICE, requires_grad=True)
    kv = torch.randn(b, tokens, 2, h, width, device=DEVICE, requires_grad=True)
    k, v = kv.permute(2, 0, 3, 1, 4)
    rows = q.permute(1, 2, 0, 3)
    skip_unless(backend, CrossAttentionInputs(rows, k, v, None, None, 0.25))
    dout = torch.randn(views, width, b, h, device=DEVICE).permute(2, 3, 0, 1)
    truth = written_out(rows, k, v, None, 0.25, dout)
    out = cross_attention(rows, k, v, backend=backend)
    dq, dkv = torch.autograd.grad(out, (q, kv), dout)
    ours = [out.detach(), dq.permute(1, 2, 0, 3), *dkv.permute(2, 0, 3, 1, 4)]
    assert_close(ours, truth, TOLERANCE[torch.float32])

    shared = torch.randn(1, h, 1, width, device=DEVICE).expand(b, h, tokens, width)  # strides of zero
    out = cross_attention(rows, shared, v, backend=backend)
    assert (out - written_out(rows, shared, v, None, 0.25, dout)[0]).abs().max() < 1e-5


@pytest.mark.parametrize("backend", ["reference", "matmul", "sdpa", "triton"])
def test_gradcheck(backend: str) -> None:
    q, k, v = make((2, 1, 3, 5, 16), torch.float64)
    skip_unless(backend, CrossAttentionInputs(q, k, v, None, None, 1.0))
    lengths = torch.tensor([5, 2], device=DEVICE)
    assert gradcheck(lambda *qkv: cross_attention(*qkv, lengths, backend=backend), (q, k, v), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_valid(backend: str) -> None:
    """A sample without valid tokens gives zeros and zero gradients, and leaves its neighbour alone."""
    q, k, v = make((2, 2, 3, 9, 16), torch.float32)
    mask = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    mask[0] = False
    skip_unless(backend, CrossAttentionInputs(q, k, v, None, mask, 0.25))
    dout = torch.randn_like(q)
    ours = run(q, k, v, dout, backend, mask=mask)
    assert all(t[0].eq(0).all() for t in ours)
    alone = [t[1:].detach().requires_grad_() for t in (q, k, v)]
    for a, b in zip(ours, run(*alone, dout[1:], "reference"), strict=True):
        torch.testing.assert_close(a[1:], b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: str) -> None:
    """No samples, or no tokens: shapes hold, and what is left is zero."""
    for b, tokens in ((0, 7), (2, 0)):
        q, k, v = make((b, 2, 3, tokens, 16), torch.float32)
        skip_unless(backend, CrossAttentionInputs(q, k, v, None, None, 0.25))
        ours = run(q, k, v, torch.ones_like(q), backend)
        assert [t.shape for t in ours] == [q.shape, q.shape, k.shape, v.shape]
        assert all(t.eq(0).all() for t in ours)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_nan_and_inf_propagate(where: int, value: float, backend: str) -> None:
    """A bad number in a valid place reaches the output and gradients of its sample, and no other's."""
    q, k, v = make((2, 1, 3, 40, 16), torch.float32)
    skip_unless(backend, CrossAttentionInputs(q, k, v, None, None, 0.25))
    with torch.no_grad():
        (q, k, v)[where][1, 0, 2, 5] = value
    ours = run(q, k, v, torch.ones_like(q), backend)
    assert all(t[0].isfinite().all() for t in ours)
    assert not ours[0][1].isfinite().all()
    assert not all(t[1].isfinite().all() for t in ours[1:])


def test_triton_does_not_read_masked_tokens() -> None:
    q, k, v = make((2, 1, 3, 40, 16), torch.float32)
    skip_unless("triton", CrossAttentionInputs(q, k, v, None, None, 0.25))
    lengths = torch.tensor([40, 11], device=DEVICE)
    with torch.no_grad():
        k[1, :, 11:] = math.nan
        v[1, :, 11:] = math.nan
    ours = run(q, k, v, torch.ones_like(q), "triton", lengths=lengths)
    assert all(t.isfinite().all() for t in ours)

    with torch.no_grad():
        v[1, 0, 3, 5] = math.nan  # a valid one: the sample's own gradients, but not its masked tokens'
    for lengths_or_mask in ({"lengths": lengths}, {"mask": torch.arange(40, device=DEVICE) < lengths[:, None]}):
        _, dq, dk, dv = run(q, k, v, torch.ones_like(q), "triton", **lengths_or_mask)
        assert dq[1].isnan().all()
        assert dk[1, :, 11:].eq(0).all()
        assert dv[1, :, 11:].eq(0).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all", "lengths", "mask"])
@pytest.mark.parametrize("shape", [(3, 2, 8, 77, 48), (3, 1, 70, 20, 16)], ids=str)
def test_triton_writes_every_element(shape: tuple[int, ...], kind: str) -> None:
    """Outputs are poisoned before the launch: what the kernel forgets stays NaN."""
    q, k, v = make(shape, torch.float32)
    skip_unless("triton", CrossAttentionInputs(q, k, v, None, None, 0.25))
    from distill_kernels.triton.cross_attention import launch_backward, launch_forward
    from distill_kernels.triton.cross_attention_kernels import blocks
    from distill_kernels.triton.launches import dot_precision

    options, _ = valid_tokens(kind, shape[0], shape[3])
    lengths, mask = options.get("lengths"), options.get("mask")
    q, k, v = q.detach(), k.detach(), v.detach()
    out, dq, dk, dv = (torch.full_like(t, math.nan) for t in (q, q, k, v))
    lse = torch.full(q.shape[:3], math.nan, device=DEVICE)
    launch_forward(q, k, v, lengths, mask, 0.25, out, lse)
    for first in range(0, shape[2], blocks(shape[2], shape[4], 4, dot_precision()).queries):
        launch_backward(torch.ones_like(q), q, k, v, out, lse, lengths, mask, 0.25, dq, dk, dv, first)
    for name, t in (("out", out), ("lse", lse), ("dq", dq), ("dk", dk), ("dv", dv)):
        assert not t.isnan().any(), name
    if kind == "lengths":
        assert lse[lengths == 0].eq(math.inf).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all", "lengths", "mask"])
def test_opcheck(kind: str) -> None:
    q, k, v = make((2, 1, 3, 20, 16), torch.float32)
    skip_unless("triton", CrossAttentionInputs(q, k, v, None, None, 0.25))
    import distill_kernels.triton.cross_attention  # noqa: F401  (registers the operators)

    options, _ = valid_tokens(kind, 2, 20)
    lengths, mask = options.get("lengths"), options.get("mask")
    torch.library.opcheck(torch.ops.distill.cross_attention.default, (q, k, v, lengths, mask, 0.25))
    q, k, v = q.detach().transpose(2, 3).contiguous().transpose(2, 3), k.detach(), v.detach()
    out, lse = torch.ops.distill.cross_attention(q, k, v, lengths, mask, 0.25)
    arguments = (torch.ones_like(q), q, k, v, out, lse, lengths, mask, 0.25)
    torch.library.opcheck(torch.ops.distill.cross_attention_backward.default, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_compile_and_checkpoint(backend: str) -> None:
    q, k, v = make((2, 2, 3, 20, 16), torch.float32)
    skip_unless(backend, CrossAttentionInputs(q, k, v, None, None, 0.25))
    lengths = torch.tensor([20, 7], device=DEVICE)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cross_attention(q.sin(), k, v, lengths, backend=backend).cos()

    eager = torch.autograd.grad(layer(q, k, v).sum(), (q, k, v))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for other in (
        torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v)),
        torch.autograd.grad(checkpoint(layer, q, k, v, use_reentrant=False).sum(), (q, k, v)),
    ):
        for a, b in zip(eager, other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str) -> None:
    """Under autocast fp32 inputs are cast once: the same bits as a call with bf16 inputs, gradients in fp32."""
    q, k, v = make((2, 2, 3, 20, 16), torch.float32)
    skip_unless(backend, CrossAttentionInputs(q, k, v, None, None, 0.25))
    with torch.autocast(DEVICE, torch.bfloat16):
        out = cross_attention(q, k, v, backend=backend)
    half = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]
    expected = cross_attention(*half, backend=backend)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("backend", ["reference", "matmul", "sdpa", "triton"])
def test_strided_lengths(backend: str) -> None:
    """A column of a table, say. Catches a kernel that takes its elements to stand side by side."""
    q, k, v = make((3, 1, 2, 20, 16), torch.float32)
    lengths = torch.tensor([[7, 20], [3, 20], [20, 20]], device=DEVICE)[:, 0]
    out = cross_attention(q, k, v, lengths, backend=backend)
    torch.testing.assert_close(out, cross_attention(q, k, v, lengths.contiguous(), backend="reference"))
    dout = torch.randn_like(out)
    right = torch.autograd.grad(cross_attention(q, k, v, lengths.contiguous(), backend="reference"), (q, k, v), dout)
    for found, expected in zip(torch.autograd.grad(out, (q, k, v), dout), right, strict=True):
        torch.testing.assert_close(found, expected)


def test_choice_is_explicit() -> None:
    q, k, v = make((2, 2, 3, 20, 16), torch.float32)
    with pytest.raises(BackendError, match="no backend named 'flash'; there are reference, matmul"):
        cross_attention(q, k, v, backend="flash")
    for width in (8, 72, 144):
        x = torch.zeros(1, 1, 1, width, device=DEVICE)
        with pytest.raises(BackendError, match=f"takes head widths that are multiples of 16 up to 128, got {width}"):
            cross_attention(x, x, x, backend="triton")
    if DEVICE == "cpu":
        with pytest.raises(BackendError, match="'xformers' cannot run this: needs tensors on a GPU"):
            cross_attention(q, k, v, backend="xformers")
        # The interpreter can run anything, slowly: it is never taken unasked.
        assert choose(OP, "auto", CrossAttentionInputs(q, k, v, None, None, 1.0)).name != "triton"


def test_listing_names_every_backend() -> None:
    rows = [(backend, state) for op, backend, state in listing() if op == "cross_attention"]
    assert [name for name, _ in rows] == list(BACKENDS)
    assert all(state for _, state in rows)
    assert dict(rows)["reference"] == "yes"


def test_wrong_arguments() -> None:
    q, k, v = make((2, 2, 3, 20, 16), torch.float32)
    lengths = torch.tensor([1, 2], device=DEVICE)
    for match, arguments, options in (
        ("must be \\[B,H,V,K\\]", (q, k, v[..., :5, :]), {}),
        ("must share B, H and K", (q[..., :8], k, v), {}),
        ("one dtype", (q.half(), k, v), {}),
        ("not both", (q, k, v, lengths, torch.ones(2, 20, dtype=torch.bool, device=DEVICE)), {}),
        ("lengths must be \\[2\\] int32 or int64", (q, k, v, lengths.float()), {}),
        ("mask must be \\[2, 20\\] bool", (q, k, v), {"mask": torch.ones(2, 3, device=DEVICE)}),
    ):
        with pytest.raises(ValueError, match=match):
            cross_attention(*arguments, **options)
