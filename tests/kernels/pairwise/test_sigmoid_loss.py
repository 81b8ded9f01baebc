"""`multi_view_sigmoid` against a loop over rows and columns of its definition in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from kernel_device import DEVICE, here, skip_float64_on_gpu, width_for
from tiers import cases_of
from torch import Tensor

from distill_kernels import multi_view_sigmoid
from distill_kernels.dispatch import BackendError, listing
from distill_kernels.pairwise import chunks
from distill_kernels.pairwise.sigmoid_loss import sigmoid_chunked, sigmoid_chunked_backward

BACKENDS = ("reference", "chunked", "triton")


def embeddings(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(here.randn(*shape, dtype=torch.float64), dim=-1).to(dtype).requires_grad_()


def term_by_term(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, offset: int) -> Tensor:
    """The definition, one dot product at a time, in float64."""
    a, b, scale, bias = (t.double() for t in (a, b, scale, bias))
    pairs = []
    for u in a:
        for v in b:
            total = a.new_zeros(())
            for i, row in enumerate(u):
                for j, column in enumerate(v):
                    sign = 1.0 if j == i + offset else -1.0
                    total = total + torch.log1p(torch.exp(-sign * (scale * (row @ column) + bias)))
            pairs.append(total / len(u))
    return torch.stack(pairs).view(len(a), len(b))


def check(loss: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Values and gradients of a weighted sum over pairs; fp32 rounding of logits up to 20."""
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    weight = here.randn(loss.shape, dtype=torch.float64)
    got = torch.autograd.grad((loss.double() * weight).sum(), inputs)
    true = torch.autograd.grad((expected * weight).sum(), inputs)
    for g, t in zip(got, true, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-4, atol=1e-5)


CHUNKS = ("one chunk", "many chunks")


@pytest.fixture(params=CHUNKS)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many chunks":
        monkeypatch.setattr(chunks, "numbers_for", lambda part, tensor: {"rows": 7, "columns": 4})


@pytest.mark.usefixtures("chunk", "poisoned_memory")
@pytest.mark.parametrize(("va", "vb", "n", "d"), [(1, 1, 1, 1), (2, 3, 5, 7), (3, 1, 13, 6)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_and_gradients(backend: str, va: int, vb: int, n: int, d: int) -> None:
    d = width_for(backend, d)
    a, b = embeddings(va, n, d), embeddings(vb, n, d)
    scale, bias = here.tensor(10.0, requires_grad=True), here.tensor(-10.0, requires_grad=True)
    loss = multi_view_sigmoid(a, b, scale, bias, backend=backend)
    check(loss, term_by_term(a, b, scale, bias, 0), [a, b, scale, bias])


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(
    ("backend", "chunk"),
    cases_of(itertools.product(BACKENDS, CHUNKS), lambda case: case != ("triton", "many chunks")),
    indirect=["chunk"],
)
def test_ranks_average_to_one_batch(backend: str) -> None:
    d = width_for(backend, 5)
    a, b = embeddings(2, 12, d), embeddings(3, 12, d)
    scale, bias = here.tensor(5.0, requires_grad=True), here.tensor(-2.0, requires_grad=True)
    parts = [slice(0, 4), slice(4, 8), slice(8, 12)]
    loss = torch.stack(
        [multi_view_sigmoid(a[:, p], b[:, p], scale, bias, b_all=b, offset=p.start, backend=backend) for p in parts]
    ).mean(0)
    check(loss, term_by_term(a, b, scale, bias, 0), [a, b, scale, bias])


@pytest.mark.parametrize("backend", BACKENDS)
def test_own_rows_against_gathered(backend: str) -> None:
    d = width_for(backend, 6)
    a, b, b_all = (embeddings(*s, d) for s in ((3, 5), (2, 5), (2, 11)))
    scale, bias = here.tensor(5.0, requires_grad=True), here.tensor(-2.0, requires_grad=True)
    loss = multi_view_sigmoid(a, b, scale, bias, b_all=b_all, offset=3, backend=backend)
    check(loss, term_by_term(a, b_all, scale, bias, 3), [a, b_all, scale, bias])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_gradcheck(backend: str) -> None:
    d = width_for(backend, 4)
    skip_float64_on_gpu(backend)
    a, b = embeddings(2, 3, d, dtype=torch.float64), embeddings(1, 3, d, dtype=torch.float64)
    scale, bias = (here.tensor(x, dtype=torch.float64, requires_grad=True) for x in (3.0, -1.0))
    fast = backend == "triton"  # of many inputs, one by one
    assert torch.autograd.gradcheck(
        lambda *x: multi_view_sigmoid(*x, backend=backend), (a, b, scale, bias), fast_mode=fast
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_opcheck(backend: str) -> None:
    d = width_for(backend, 6)
    from distill_kernels.triton.sigmoid_loss import sigmoid_triton, sigmoid_triton_backward

    forward, backward = {
        "chunked": (sigmoid_chunked, sigmoid_chunked_backward),
        "triton": (sigmoid_triton, sigmoid_triton_backward),
    }[backend]
    x, y = embeddings(2, 4, d), embeddings(3, 7, d)
    scale, bias = here.tensor(2.0, requires_grad=True), here.tensor(-2.0, requires_grad=True)
    torch.library.opcheck(forward, (x, y, scale, bias, 2))
    with torch.no_grad():
        torch.library.opcheck(backward, (here.randn(2, 3), x, y, scale, bias, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64(backend: str) -> None:
    d = width_for(backend, 5)
    skip_float64_on_gpu(backend)
    a, b = embeddings(2, 9, d, dtype=torch.float64), embeddings(2, 9, d, dtype=torch.float64)
    scale, bias = here.tensor(9.0, dtype=torch.float64), here.tensor(-10.0, dtype=torch.float64)
    loss = multi_view_sigmoid(a, b, scale, bias, backend=backend)
    torch.testing.assert_close(loss, term_by_term(a, b, scale, bias, 0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_small_terms_keep_their_digits(backend: str) -> None:
    # At bias -10 the negatives cost e^-10 each: log(1 + e) in fp32 would be off by .1 %, one by one.
    d = width_for(backend, 8)
    a, b = embeddings(1, 3, d), embeddings(1, 300, d)
    scale, bias = here.tensor(1.0), here.tensor(-10.0)
    loss = multi_view_sigmoid(
        a, b[:, :3], scale, bias, b_all=b, backend=backend
    ).double() + (a * b[:, :3]).sum(-1).mean().double() + bias.double()  # fmt: skip
    z = a.double()[0] @ b.double()[0].T + bias.double()
    torch.testing.assert_close(loss[0, 0], z.exp().log1p().sum(1).mean(), rtol=2e-4, atol=0)


@pytest.mark.slow
def test_triton_writes_every_element_and_no_other() -> None:
    from distill_kernels.triton.pairwise import Part, fill_gradient, reduce_rows

    x, y = embeddings(2, 67, 96).detach(), embeddings(3, 131, 96).detach()
    scale, bias, weight = here.tensor(3.0), here.tensor(-2.0), here.randn(2, 3)
    z = 3.0 * torch.einsum("uid,vjd->uvij", x.double(), y.double()) - 2.0

    def guarded(size: int) -> Tensor:
        memory = here.full((size + 64,), 777.0)
        memory[:size] = float("nan")
        return memory

    costs, size = guarded(2 * 3 * 67), 2 * 67 * 3 * 131
    reduce_rows(x, y, scale, bias, costs[:-64].view(2, 3, 67))
    torch.testing.assert_close(costs[:-64].view(2, 3, 67).double(), F.softplus(z).sum(3), rtol=1e-5, atol=1e-5)
    memory, whole = guarded(size), slice(None)
    part = Part(whole, whole, whole, whole, x, y, weight, 5, memory[:size].view(2 * 67, 3 * 131))
    sums = fill_gradient(part, scale, bias=bias)
    target = here.zeros(67, 131, dtype=torch.float64)
    target[here.arange(67), here.arange(67) + 5] = 1
    expected = weight[..., None, None] * (z.sigmoid() - target)
    torch.testing.assert_close(part.dz.view(2, 67, 3, 131).double(), expected.transpose(1, 2), rtol=1e-4, atol=1e-6)
    both = torch.stack([(expected * (z + 2) / 3).sum(), expected.sum()])
    torch.testing.assert_close(sums.double(), both, rtol=1e-4, atol=1e-4)
    assert (costs[-64:] == 777.0).all()
    assert (memory[-64:] == 777.0).all()


@pytest.mark.filterwarnings("ignore:overflow encountered")  # exp2 of a large -z is infinite, its inverse 0
@pytest.mark.parametrize("backend", cases_of(BACKENDS, lambda backend: backend == "chunked"))
def test_compile_autocast_checkpoint(backend: str) -> None:
    # The logits stay fp32 under bf16 autocast: at scale 100 bf16 ones would be off by .5.
    d = width_for(backend, 6)
    a, b = embeddings(2, 5, d), embeddings(3, 5, d)
    scale, bias = here.tensor(100.0, requires_grad=True), here.tensor(-60.0, requires_grad=True)

    def loss(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return multi_view_sigmoid(a * 1, b, scale, bias, backend=backend)

    inputs = (a, b, scale, bias)
    expected = term_by_term(*inputs, 0)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        outs = [torch.utils.checkpoint.checkpoint(loss, *inputs, use_reentrant=False)]
    # A compiled backward pass is traced under autocast and lowers plain matmuls, but not the custom ops.
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=backend != "reference"):
        outs.append(compiled(*inputs))
    weight = here.randn(2, 3, dtype=torch.float64)
    true = torch.autograd.grad((expected * weight).sum(), inputs)
    for out in outs:
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
        grads = torch.autograd.grad((out.double() * weight).sum(), inputs)
        for g, t in zip(grads, true, strict=True):
            torch.testing.assert_close(g, t, rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_inputs_keep_fp32_logits(backend: str, dtype: torch.dtype) -> None:
    # Gradients have the inputs' precision, those of scale and bias fp32's.
    d = width_for(backend, 16)
    a, b = embeddings(2, 9, d, dtype=dtype), embeddings(2, 9, d, dtype=dtype)
    scale, bias = here.tensor(100.0, requires_grad=True), here.tensor(-60.0, requires_grad=True)
    loss = multi_view_sigmoid(a, b, scale, bias, backend=backend)
    expected = term_by_term(a, b, scale, bias, 0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-4)
    inputs, eps = (a, b, scale, bias), torch.finfo(dtype).eps
    grads, true = (torch.autograd.grad(t.double().sum(), inputs) for t in (loss, expected))
    assert [g.dtype for g in grads] == [dtype, dtype, torch.float32, torch.float32]
    for g, t, relative in zip(grads, true, (4 * eps, 4 * eps, 1e-4, 1e-4), strict=True):
        torch.testing.assert_close(g, t, rtol=relative, atol=relative * t.abs().max().item())


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_propagate_to_their_view_only(backend: str, bad: float) -> None:
    """And there to what the reference has: the sigmoid of an infinite logit is 0 or 1, and so finite."""
    d = width_for(backend, 6)
    a, b = embeddings(2, 5, d), embeddings(3, 5, d)
    scale, bias = here.tensor(4.0, requires_grad=True), here.tensor(-1.0, requires_grad=True)
    with torch.no_grad():
        a[1, 2, 3] = bad
        b[..., 3] = here.tensor([0.5, -0.5, 0.5, -0.5, 0.5])  # infinite logits of both signs

    def finite(backend: str) -> list[Tensor]:
        loss = multi_view_sigmoid(a, b, scale, bias, backend=backend)
        return [t.isfinite() for t in (loss, *torch.autograd.grad(loss.sum(), (a, b, scale, bias)))]

    ours = finite(backend)
    loss, d_a, d_b, d_scale, _ = ours
    assert loss[0].all()
    assert d_a[0].all()
    for reached in (loss[1], d_b[..., 3], d_scale):
        assert not reached.any()
    for name, x, y in zip(("loss", "a", "b", "scale", "bias"), ours, finite("reference"), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_strides(backend: str) -> None:
    d = width_for(backend, 4)
    scale, bias = here.tensor(4.0), here.tensor(-1.0)
    a, b = here.randn(5, d, 2).permute(2, 0, 1), here.randn(1, d, 5).transpose(1, 2).expand(3, 5, d)
    loss = multi_view_sigmoid(a, b, scale, bias, backend=backend)
    torch.testing.assert_close(loss.double(), term_by_term(a, b, scale, bias, 0), rtol=1e-5, atol=1e-5)
    empty = here.randn(2, 0, d, requires_grad=True)
    every = embeddings(2, 5, d)
    loss = multi_view_sigmoid(empty, empty, scale, bias, b_all=every, offset=1, backend=backend)
    assert loss.isnan().all()
    assert (torch.autograd.grad(loss.sum(), every)[0] == 0).all()


def test_errors_say_what_is_wrong() -> None:
    a, scale = here.zeros(1, 5, 3), here.tensor(1.0)
    with pytest.raises(ValueError, match="bias must be a 0-dim"):
        multi_view_sigmoid(a, a, scale, here.zeros(1))
    with pytest.raises(ValueError, match="a and b must be"):
        multi_view_sigmoid(a, a[0], scale, scale)
    with pytest.raises(BackendError, match="no backend named 'fast'; there are reference, chunked, triton, and auto"):
        multi_view_sigmoid(a, a, scale, scale, backend="fast")
    with pytest.raises(BackendError, match="'triton' cannot run this: needs one dtype"):
        multi_view_sigmoid(a, a.bfloat16(), scale, scale, backend="triton")


def test_listing_names_every_backend() -> None:
    rows = {backend: state for op, backend, state in listing() if op == "multi_view_sigmoid"}
    assert list(rows) == list(BACKENDS)
    assert rows["chunked"] == "yes"
