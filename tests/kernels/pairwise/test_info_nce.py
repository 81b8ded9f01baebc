"""`multi_view_info_nce` against a loop over pairs of `F.cross_entropy` in float64, for every backend."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from kernel_device import DEVICE, here, skip_float64_on_gpu, width_for
from tiers import cases_of
from torch import Tensor

from distill_kernels import info_nce_gradients, info_nce_sums, multi_view_info_nce
from distill_kernels.dispatch import BackendError
from distill_kernels.measure import peak_bytes
from distill_kernels.pairwise import chunks
from distill_kernels.pairwise.chunked_info_nce import info_nce_chunked, info_nce_chunked_backward

BACKENDS = ("reference", "chunked", "triton")
# (Va, Vb, B, D): one of each; odd; more columns than a block of a kernel; more views than rows.
SHAPES = ((1, 1, 1, 1), (2, 3, 5, 7), (1, 2, 67, 20), (8, 2, 3, 33))


def embeddings(*shape: int, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64, device=device), dim=-1).to(dtype).requires_grad_()


def pair_by_pair(a: Tensor, b: Tensor, scale: Tensor, a_all: Tensor, b_all: Tensor, offset: int) -> Tensor:
    """The definition: two cross-entropies a pair, in float64."""
    a, b, scale, a_all, b_all = (t.double() for t in (a, b, scale, a_all, b_all))
    target = here.arange(a.shape[1]) + offset
    losses = [
        F.cross_entropy(scale * a[u] @ b_all[v].T, target) / 2 + F.cross_entropy(scale * b[v] @ a_all[u].T, target) / 2
        for u, v in itertools.product(range(len(a)), range(len(b)))
    ]
    return torch.stack(losses).view(len(a), len(b))


def gradients(loss: Tensor, weight: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Of a weighted sum over pairs, so that no pair's gradient can stand for another's."""
    return list(torch.autograd.grad((loss.double() * weight).sum(), inputs))


CHUNKS = ("one chunk", "many chunks")


@pytest.fixture(params=CHUNKS)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many chunks":
        monkeypatch.setattr(chunks, "numbers_for", lambda part, tensor: {"rows": 17, "columns": 9})


@pytest.mark.usefixtures("chunk", "poisoned_memory")
@pytest.mark.parametrize(
    ("backend", "chunk", "shape"),
    cases_of(
        itertools.product(BACKENDS, CHUNKS, SHAPES),
        lambda case: case[:2] != ("triton", "many chunks") or case[2] in SHAPES[:2],
    ),
    indirect=["chunk"],
    ids=str,
)
def test_losses_and_gradients(backend: str, shape: tuple[int, int, int, int]) -> None:
    # fp32 rounding of logits up to 14 and sums of 67 terms.
    va, vb, n, d = shape
    d = width_for(backend, d)
    a, b = embeddings(va, n, d), embeddings(vb, n, d)
    scale = here.tensor(1 / 0.07, requires_grad=True)
    weight = here.randn(va, vb, dtype=torch.float64)
    loss = multi_view_info_nce(a, b, scale, backend=backend)
    expected = pair_by_pair(a, b, scale, a, b, 0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for got, true in zip(
        gradients(loss, weight, [a, b, scale]), gradients(expected, weight, [a, b, scale]), strict=True
    ):
        torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_columns_add_up(backend: str) -> None:
    """Catches sums of one block alone, softmaxes over one block, targets in a block that has none, and an axis of
    another backend's layout."""
    d = width_for(backend, 6)
    a, b, others = embeddings(3, 5, d), embeddings(2, 5, d), embeddings(2, 5, d)
    scale = here.tensor(5.0, requires_grad=True)
    weight = here.randn(3, 2)
    every = torch.cat([b, others], 1)
    logits = scale * torch.einsum("uid,vjd->uvij", a, every)
    loss = (logits.logsumexp(3) - logits.diagonal(dim1=2, dim2=3)).mean(2)
    expected = torch.autograd.grad((loss * weight).sum(), [a, b, others, scale])
    with torch.no_grad():
        (rows, columns), (more, theirs) = (info_nce_sums(a, x, scale, backend=backend) for x in (b, others))
        sums = torch.logaddexp(rows, more)
        torch.testing.assert_close(sums, logits.logsumexp(3))
        torch.testing.assert_close(torch.cat([columns, theirs], 2), logits.logsumexp(2))
        of_b = info_nce_gradients(weight, a, b, scale, sums, positives=True, backend=backend)
        of_others = info_nce_gradients(weight, a, others, scale, sums, positives=False, backend=backend)
    got = (of_b[0] + of_others[0], of_b[1], of_others[1], of_b[2] + of_others[2])
    for value, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_own_rows_against_gathered(backend: str) -> None:
    # Rows 3..8 of 11, every tensor a leaf of its own: a gradient sent to the wrong one shows.
    d = width_for(backend, 6)
    tensors = [embeddings(*s, d) for s in ((3, 5), (2, 5), (3, 11), (2, 11))]
    a, b, a_all, b_all = tensors
    scale = here.tensor(5.0, requires_grad=True)
    weight = here.randn(3, 2, dtype=torch.float64)
    loss = multi_view_info_nce(a, b, scale, a_all=a_all, b_all=b_all, offset=3, backend=backend)
    expected = pair_by_pair(a, b, scale, a_all, b_all, 3)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for got, true in zip(
        gradients(loss, weight, [*tensors, scale]), gradients(expected, weight, [*tensors, scale]), strict=True
    ):
        torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "ranks"), cases_of(itertools.product(BACKENDS, [2, 3]), lambda case: case != ("triton", 3))
)
def test_ranks_average_to_one_batch(backend: str, ranks: int) -> None:
    # The mean over ranks of the loss, and of its gradients summed over ranks, is the whole batch's.
    d = width_for(backend, 8)
    n = 4
    a, b = embeddings(2, ranks * n, d), embeddings(3, ranks * n, d)
    scale = here.tensor(7.0, requires_grad=True)
    weight = here.randn(2, 3, dtype=torch.float64)
    loss = torch.stack(
        [
            multi_view_info_nce(
                a[:, r * n : (r + 1) * n],
                b[:, r * n : (r + 1) * n],
                scale,
                a_all=a,
                b_all=b,
                offset=r * n,
                backend=backend,
            )
            for r in range(ranks)
        ]
    ).mean(0)
    expected = pair_by_pair(a, b, scale, a, b, 0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for got, true in zip(
        gradients(loss, weight, [a, b, scale]), gradients(expected, weight, [a, b, scale]), strict=True
    ):
        torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64(backend: str) -> None:
    d = width_for(backend, 5)
    skip_float64_on_gpu(backend)
    a, b = embeddings(2, 9, d, dtype=torch.float64), embeddings(2, 9, d, dtype=torch.float64)
    scale = here.tensor(9.0, dtype=torch.float64)
    loss = multi_view_info_nce(a, b, scale, backend=backend)
    torch.testing.assert_close(loss, pair_by_pair(a, b, scale, a, b, 0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_keep_fp32_logits(backend: str, dtype: torch.dtype) -> None:
    # Logits near 100 are good to .5 in bf16 and .06 in fp16; the loss is within 1e-4 of the exact one. Gradients
    # have the inputs' precision.
    d = width_for(backend, 16)
    a, b = embeddings(2, 40, d, dtype=dtype), embeddings(2, 40, d, dtype=dtype)
    scale = here.tensor(100.0, requires_grad=True)
    weight = here.randn(2, 2, dtype=torch.float64)
    loss = multi_view_info_nce(a, b, scale, backend=backend)
    expected = pair_by_pair(a, b, scale, a, b, 0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-4)
    grads, true = (gradients(x, weight, [a, b, scale]) for x in (loss, expected))
    eps = torch.finfo(dtype).eps
    for g, t in zip(grads[:2], true[:2], strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g, t, rtol=4 * eps, atol=4 * eps * t.abs().max().item())
    torch.testing.assert_close(grads[2], true[2], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # in what the kernel does not store
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_at_both_ends(backend: str) -> None:
    # Row and column sums differ by exp(200): a shift shared by a whole chunk would lose the smaller ones.
    a = here.zeros(1, 6, width_for(backend, 2))
    a[..., 0] = 1
    b = a * here.tensor([1.0, -1, 1, -1, -1, 1])[:, None]
    a, b = a.requires_grad_(), b.requires_grad_()
    scale = here.tensor(100.0, requires_grad=True)
    loss = multi_view_info_nce(a, b, scale, backend=backend)
    expected = pair_by_pair(a, b, scale, a, b, 0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    one = here.ones(1, 1, dtype=torch.float64)
    for got, true in zip(gradients(loss, one, [a, b, scale]), gradients(expected, one, [a, b, scale]), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", cases_of(["chunked", "triton"], lambda backend: backend == "chunked"))
@pytest.mark.parametrize("gathered", [False, True])
def test_gradcheck(backend: str, gathered: bool) -> None:
    d = width_for(backend, 3)
    skip_float64_on_gpu(backend)
    a, b = embeddings(2, 2, d, dtype=torch.float64), embeddings(1, 2, d, dtype=torch.float64)
    scale = here.tensor(3.0, dtype=torch.float64, requires_grad=True)
    check = functools.partial(torch.autograd.gradcheck, fast_mode=backend == "triton")  # of many inputs, one by one
    if not gathered:
        assert check(lambda a, b, s: multi_view_info_nce(a, b, s, backend=backend), (a, b, scale))
        return
    a_all, b_all = embeddings(2, 3, d, dtype=torch.float64), embeddings(1, 3, d, dtype=torch.float64)
    assert check(
        lambda a, b, s, x, y: multi_view_info_nce(a, b, s, a_all=x, b_all=y, offset=1, backend=backend),
        (a, b, scale, a_all, b_all),
    )


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_opcheck(backend: str, symmetric: bool) -> None:
    d = width_for(backend, 6)
    from distill_kernels.triton.info_nce import info_nce_triton, info_nce_triton_backward

    forward, backward = {
        "chunked": (info_nce_chunked, info_nce_chunked_backward),
        "triton": (info_nce_triton, info_nce_triton_backward),
    }[backend]
    x, y = embeddings(2, 4, d), embeddings(3, 4 if symmetric else 7, d)
    scale = here.tensor(2.0, requires_grad=True)
    offset = 0 if symmetric else 2
    torch.library.opcheck(forward, (x, y, scale, offset, symmetric))
    with torch.no_grad():
        _, row, column = forward(x, y, scale, offset, symmetric)
        torch.library.opcheck(backward, (here.randn(2, 3), x, y, scale, row, column, offset, symmetric))


@pytest.mark.parametrize("backend", cases_of(BACKENDS, lambda backend: backend == "chunked"))
def test_compile_in_one_graph(backend: str) -> None:
    d = width_for(backend, 6)
    a, b = embeddings(2, 5, d), embeddings(3, 5, d)
    scale = here.tensor(4.0, requires_grad=True)
    compiled = torch.compile(
        lambda a, b, s: multi_view_info_nce(a * 2, b, s, backend=backend), fullgraph=True, backend="aot_eager"
    )
    loss, expected = compiled(a, b, scale), pair_by_pair(a * 2, b, scale, a * 2, b, 0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    weight = here.randn(2, 3, dtype=torch.float64)
    for got, true in zip(
        gradients(loss, weight, [a, b, scale]), gradients(expected, weight, [a, b, scale]), strict=True
    ):
        torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_lower_the_logits(backend: str) -> None:
    # fp32 rounding of logits near 100 is 4e-6, and the scale multiplies it again in the gradients.
    d = width_for(backend, 16)
    a, b = embeddings(2, 9, d), embeddings(2, 9, d)
    scale = here.tensor(100.0, requires_grad=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = multi_view_info_nce(a, b, scale, backend=backend)
    expected = pair_by_pair(a, b, scale, a, b, 0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-4)
    weight = here.ones(2, 2, dtype=torch.float64)
    # A backward pass under autocast lowers plain matmuls whatever we do, but not the custom ops.
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=backend != "reference"):
        grads = gradients(loss, weight, [a, b, scale])
    for got, true in zip(grads, gradients(expected, weight, [a, b, scale]), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing(backend: str) -> None:
    d = width_for(backend, 6)
    a, b = embeddings(2, 5, d), embeddings(1, 5, d)
    scale = here.tensor(4.0, requires_grad=True)
    loss = torch.utils.checkpoint.checkpoint(
        lambda a, b, s: multi_view_info_nce(a.tanh(), b, s, backend=backend), a, b, scale, use_reentrant=False
    )
    expected = pair_by_pair(a.tanh(), b, scale, a.tanh(), b, 0)
    weight = here.randn(2, 1, dtype=torch.float64)
    for got, true in zip(
        gradients(loss, weight, [a, b, scale]), gradients(expected, weight, [a, b, scale]), strict=True
    ):
        torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_propagate_to_their_view_only(backend: str, bad: float) -> None:
    """And there to what the reference has."""
    d = width_for(backend, 6)
    a, b = embeddings(2, 5, d), embeddings(3, 5, d)
    scale = here.tensor(4.0, requires_grad=True)
    with torch.no_grad():
        a[1, 2, 3] = bad
        b[..., 3] = here.tensor([0.5, -0.5, 0.5, -0.5, 0.5])  # infinite logits of both signs

    def finite(backend: str) -> list[Tensor]:
        loss = multi_view_info_nce(a, b, scale, backend=backend)
        return [t.isfinite() for t in (loss, *torch.autograd.grad(loss.sum(), (a, b, scale)))]

    ours = finite(backend)
    loss, d_a, *_ = ours
    assert loss[0].all()
    assert d_a[0].all()
    assert not loss[1].any()
    for name, x, y in zip(("loss", "a", "b", "scale"), ours, finite("reference"), strict=True):
        # Where a column's log-sum-exp is Inf, Triton's is NaN, and more of the view's gradients with it.
        assert torch.equal(x, x & y if backend == "triton" else y), name


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str, gathered: bool) -> None:
    # The mean of nothing is NaN; the gathered rows of other ranks get zeros, not NaN.
    d = width_for(backend, 4)
    a, b = here.randn(2, 0, d, requires_grad=True), here.randn(3, 0, d, requires_grad=True)
    a_all, b_all = (embeddings(2, 5, d), embeddings(3, 5, d)) if gathered else (None, None)
    scale = here.tensor(4.0, requires_grad=True)
    loss = multi_view_info_nce(a, b, scale, a_all=a_all, b_all=b_all, offset=2 * gathered, backend=backend)
    assert loss.shape == (2, 3)
    assert loss.isnan().all()
    loss.sum().backward()
    assert a.grad is not None
    assert a.grad.shape == a.shape
    for every in (a_all, b_all):
        if every is not None and every.grad is not None:
            assert (every.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous(backend: str) -> None:
    d = width_for(backend, 7)
    a = here.randn(5, d, 4, 2)[..., 0].permute(2, 0, 1)  # [4, 5, D]
    b = here.randn(1, d, 5).transpose(1, 2).expand(3, 5, d)
    scale = here.tensor(0.7)
    loss = multi_view_info_nce(a, b, scale, backend=backend)
    torch.testing.assert_close(loss.double(), pair_by_pair(a, b, scale, a, b, 0), rtol=1e-5, atol=1e-5)


def test_chunked_memory_grows_as_rows() -> None:
    # 4 x 512 x 512 logits are 4 MiB, and the reference holds them three times. Gradients (32 KiB), log-sum-exps
    # (16 KiB) and two buffers of a 64 x 64 chunk (32 KiB) are all that grows here.
    def peak(backend: str) -> int:
        a, b = embeddings(2, 512, 4, device="cpu"), embeddings(2, 512, 4, device="cpu")
        call = functools.partial(multi_view_info_nce, a, b, torch.tensor(9.0), backend=backend)
        return peak_bytes(lambda: torch.autograd.grad(call().sum(), (a, b)), torch.device("cpu"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "numbers_for", lambda part, tensor: {"rows": 64, "columns": 64})
        assert peak("chunked") <= 200_000
    assert peak("reference") >= 8 * 2**20


@pytest.mark.slow
def test_triton_writes_every_element_and_no_other() -> None:
    from distill_kernels.triton.pairwise import Part, fill_gradient, reduce_rows

    x, y = embeddings(2, 67, 96).detach(), embeddings(3, 131, 96).detach()
    scale = here.tensor(3.0)
    z = 3.0 * torch.einsum("uid,vjd->uvij", x.double(), y.double())
    guarded = here.full((2 * 3 * 67 + 64,), 777.0)
    guarded[: 2 * 3 * 67] = float("nan")
    reduce_rows(x, y, scale, None, guarded[: 2 * 3 * 67].view(2, 3, 67))
    assert (guarded[2 * 3 * 67 :] == 777.0).all()
    torch.testing.assert_close(guarded[: 2 * 3 * 67].view(2, 3, 67).double(), z.logsumexp(3), rtol=1e-5, atol=1e-5)
    row, column, weight = z.logsumexp(3).float(), z.logsumexp(2).transpose(0, 1).float(), here.randn(2, 3)
    size = 2 * 67 * 3 * 131
    guarded = here.full((size + 64,), 777.0)
    guarded[:size] = float("nan")
    dz = guarded[:size].view(2 * 67, 3 * 131)
    whole = slice(None)
    part = Part(whole, whole, whole, whole, x, y, weight, 5, dz)
    (d_scale,) = fill_gradient(part, scale, row=row, column=column.contiguous())
    target = here.zeros(67, 131, dtype=torch.float64)
    target[here.arange(67), here.arange(67) + 5] = 2
    expected = weight[..., None, None] * (z.softmax(3) + z.softmax(2) - target)
    assert (guarded[size:] == 777.0).all()
    torch.testing.assert_close(dz.view(2, 67, 3, 131).double(), expected.transpose(1, 2), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(d_scale.double(), (expected * z / 3).sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.zeros(2, 4, 3)}, r"a and b must be"),
        ({"scale": torch.zeros(1)}, r"scale must be a 0-dim"),
        ({"a_all": torch.zeros(1, 8, 3)}, r"both a_all and b_all"),
        ({"offset": 1}, r"offset 1 needs"),
        ({"a_all": torch.zeros(1, 8, 3), "b_all": torch.zeros(2, 9, 3)}, r"b_all must be \[2, 8, 3\]"),
        ({"a_all": torch.zeros(1, 8, 3), "b_all": torch.zeros(2, 8, 3), "offset": 4}, r"rows 4..9"),
        ({"backend": "fast"}, r"no backend named 'fast'"),
    ],
)
def test_errors_say_what_is_wrong(change: dict[str, object], message: str) -> None:
    arguments = {"a": torch.zeros(1, 5, 3), "b": torch.zeros(2, 5, 3), "scale": torch.tensor(1.0)} | change
    with pytest.raises(ValueError, match=message):
        multi_view_info_nce(**arguments)  # type: ignore[arg-type]


def test_triton_refuses_what_it_was_not_compiled_for() -> None:
    """Its tiles take whole blocks of D: of other widths they would read beyond a row."""
    a, scale = here.zeros(1, 2, 64), here.tensor(1.0)
    with pytest.raises(BackendError, match="needs one dtype"):
        multi_view_info_nce(a, a.bfloat16(), scale, backend="triton")
    for d in (32, 80):
        with pytest.raises(BackendError, match=f"width that is a multiple of 32, 64 or more, got {d}"):
            multi_view_info_nce(here.zeros(1, 2, d), here.zeros(1, 2, d), scale, backend="triton")
