"""`self_attention` and `packed_attention` against softmax row by row in float64, for every CPU backend."""

from __future__ import annotations

import csv
import functools
import math
from pathlib import Path

import pytest
import torch
from kernel_device import DEVICE, here
from torch import Tensor

from distill_kernels import cross_attention, packed_attention, self_attention
from distill_kernels.attention.packed_attention import OP as PACKED
from distill_kernels.attention.packed_attention import PackedInputs
from distill_kernels.attention.self_attention import OP as DENSE
from distill_kernels.attention.self_attention import SelfAttention, split_heads
from distill_kernels.dispatch import BackendError, choose

DENSE_BACKENDS = ("reference", "explicit", "sdpa")
PACKED_BACKENDS = ("reference", "loop", "grouped")
# fp32: sums of at most 49 terms of order 1. bf16: scores and weights may be stored in bf16.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [here.randn(shape).to(dtype).requires_grad_() for _ in range(3)]


def row_by_row(q: Tensor, k: Tensor, v: Tensor, causal: bool, allowed: Tensor | None = None) -> Tensor:
    """The definition, one query at a time: q, k, v [L, K], allowed [L, L] -> [L, K] in float64."""
    q, k, v = q.double(), k.double(), v.double()
    rows = []
    for i, query in enumerate(q):
        keys = [j for j in range(len(k)) if (j <= i or not causal) and (allowed is None or bool(allowed[i, j]))]
        if keys:
            weights = (k[keys] @ query / math.sqrt(len(query))).softmax(0)
            rows.append(weights @ v[keys])
        else:
            rows.append(torch.zeros_like(query))
    return torch.stack(rows) if rows else v


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
    n, h = q.shape[:2]
    outs = [
        row_by_row(q[i, j], k[i, j], v[i, j], causal, None if mask is None else mask[i, j])
        for i in range(n)
        for j in range(h)
    ]
    return torch.stack(outs).view(q.shape)


def packed(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool) -> Tensor:
    sequences = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    outs = [
        torch.stack([row_by_row(a[:, h], b[:, h], c[:, h], causal) for h in range(q.shape[1])], 1)
        for a, b, c in sequences
    ]
    return torch.cat(outs)


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def check(out: Tensor, expected: Tensor, tensors: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Values and gradients under a random output gradient."""
    close = functools.partial(torch.testing.assert_close, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    close(out.double(), expected)
    weight = here.randn(out.shape, dtype=torch.float64)
    got = torch.autograd.grad((out.double() * weight).sum(), tensors)
    true = torch.autograd.grad((expected * weight).sum(), tensors, retain_graph=True)
    for g, t in zip(got, true, strict=True):
        close(g.double(), t.double(), atol=TOLERANCE[dtype] * max(1.0, t.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 5, 7), (1, 2, 49, 16)])
@pytest.mark.parametrize("backend", DENSE_BACKENDS)
def test_dense(backend: str, shape: tuple[int, ...], causal: bool, dtype: torch.dtype) -> None:
    tensors = inputs(*shape, dtype=dtype)
    out = self_attention(*tensors, causal=causal, backend=backend)
    assert out.dtype == dtype
    check(out, dense(*tensors, causal), tensors, dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ["keys", "pairs"])
@pytest.mark.parametrize("backend", DENSE_BACKENDS)
def test_masks(backend: str, form: str, causal: bool) -> None:
    # Sequence 1 has no key at all: zeros, and zero gradients instead of NaN.
    tensors = inputs(3, 2, 6, 4)
    if form == "keys":
        mask = here.rand(3, 6) > 0.4
        mask[1] = False
        full = mask[:, None, None, :].expand(3, 2, 6, 6)
    else:
        mask = here.rand(3, 1, 6, 6) > 0.4
        mask[1] = False
        full = mask.expand(3, 2, 6, 6)
    out = self_attention(*tensors, causal=causal, mask=mask, backend=backend)
    assert (out[1] == 0).all()
    check(out, dense(*tensors, causal, full), tensors)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck_of_the_written_out_gradient(causal: bool) -> None:
    q, k, v = (here.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = here.tensor([[True, False, True], [False, True, False]])
    for m in (None, mask):
        assert torch.autograd.gradcheck(
            lambda q, k, v, m=m: self_attention(q, k, v, causal=causal, mask=m, backend="explicit"), (q, k, v)
        )


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", DENSE_BACKENDS)
def test_compile_autocast_checkpoint(backend: str, causal: bool) -> None:
    tensors = inputs(2, 2, 5, 8)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self_attention(q * 1, k, v, causal=causal, backend=backend)

    expected = dense(*tensors, causal)
    check(torch.compile(attend, fullgraph=True, backend="aot_eager")(*tensors), expected, tensors)
    check(torch.utils.checkpoint.checkpoint(attend, *tensors, use_reentrant=False), expected, tensors)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = attend(*tensors)
    assert out.dtype == torch.bfloat16
    check(out, expected, tensors, torch.bfloat16)


@pytest.mark.parametrize("backend", DENSE_BACKENDS)
def test_strides_nan_and_empty(backend: str) -> None:
    # As a fused projection leaves them: [N, L, 3, H, K].
    qkv = here.randn(2, 5, 3, 2, 4, requires_grad=True)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    check(self_attention(q, k, v, backend=backend), dense(q, k, v, False), [qkv])
    poisoned = v.detach().clone()
    poisoned[1, 1, 2, 0] = float("nan")
    out = self_attention(q, k, poisoned, backend=backend)
    assert out[1, 1, :, 0].isnan().all()
    assert out[0].isfinite().all()
    nothing = here.randn(0, 2, 5, 4, requires_grad=True)
    out = self_attention(nothing, nothing, nothing, causal=True, backend=backend)
    assert out.shape == (0, 2, 5, 4)
    out.sum().backward()


@pytest.mark.slow
def test_split_heads() -> None:
    """Views of the rows; first and second derivatives, also where only some of the parts are used."""
    qkv = here.randn(3 * 5 + 2 * 4, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    shapes = [(3, 5), (2, 4)]
    for j, parts in enumerate(split_heads(qkv, shapes)):
        for part, rows, shape in zip(parts, qkv[:, j].split([15, 8]), shapes, strict=True):
            assert part.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
            torch.testing.assert_close(part.transpose(1, 2), rows.view(*shape, 2, 4), rtol=0, atol=0)

    def function(qkv: Tensor) -> Tensor:
        (q, _), (k, _), (_, v) = split_heads(qkv, shapes)
        return (q.sin() * k.exp()).sum() + v.pow(3).sum()

    assert torch.autograd.gradcheck(function, qkv)
    assert torch.autograd.gradgradcheck(function, qkv)


def test_split_heads_of_keys_and_values() -> None:
    """Two parts, as cross-attention projects them."""
    rows = here.randn(3 * 5, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    (k,), (v,) = split_heads(rows, [(3, 5)])
    for part, j in ((k, 0), (v, 1)):
        torch.testing.assert_close(part, rows[:, j].view(3, 5, 2, 4).transpose(1, 2), rtol=0, atol=0)
    weights = here.randn(2, 3, 2, 5, 4, dtype=torch.float64)
    (grad,) = torch.autograd.grad((torch.stack([k, v]) * weights).sum(), rows)
    torch.testing.assert_close(grad, weights.permute(1, 3, 0, 2, 4).reshape(rows.shape), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[7], [3, 0, 1, 17, 8, 3, 9], [4, 4, 4], [0, 0, 5]])
@pytest.mark.parametrize("backend", PACKED_BACKENDS)
def test_packed(backend: str, lengths: list[int], causal: bool, dtype: torch.dtype) -> None:
    tensors = inputs(sum(lengths), 2, 8, dtype=dtype)
    out = packed_attention(torch.stack(tensors, 1), bounds(lengths), causal=causal, backend=backend)
    assert out.dtype == dtype
    check(out, packed(*tensors, lengths, causal), tensors, dtype)


@pytest.mark.parametrize("backend", PACKED_BACKENDS)
def test_packed_compile_autocast_checkpoint_strides(backend: str) -> None:
    lengths = [3, 9, 1, 12]
    qkv = here.randn(25, 3, 2, 4, requires_grad=True)
    cu_lengths = bounds(lengths).int()

    def attend(qkv: Tensor) -> Tensor:
        return packed_attention(qkv * 1, cu_lengths, causal=True, backend=backend)

    expected = packed(*qkv.unbind(1), lengths, True)
    check(torch.compile(attend, backend="aot_eager")(qkv), expected, [qkv])
    check(torch.utils.checkpoint.checkpoint(attend, qkv, use_reentrant=False), expected, [qkv])
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = attend(qkv)
    assert out.dtype == torch.bfloat16
    check(out, expected, [qkv], torch.bfloat16)
    with torch.inference_mode():  # whose tensors have no version to key a cache on
        out = packed_attention(qkv, bounds(lengths), causal=True, backend=backend)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", PACKED_BACKENDS)
def test_packed_nan_stays_in_its_sequence(backend: str) -> None:
    qkv = here.randn(12, 3, 2, 4)
    qkv[5, 1, 0, 0] = float("nan")  # sequence 1: rows 3..8, padded beside rows 8..12 in `grouped`
    out = packed_attention(qkv, bounds([3, 5, 4]), backend=backend)
    assert out[3:8, 0].isnan().all()
    assert out[3:8, 1].isfinite().all()
    assert out[:3].isfinite().all()
    assert out[8:].isfinite().all()


@pytest.mark.parametrize("lengths", [[], [0, 0]])
@pytest.mark.parametrize("backend", PACKED_BACKENDS)
def test_packed_without_tokens(backend: str, lengths: list[int]) -> None:
    out = packed_attention(here.zeros(0, 3, 2, 4, requires_grad=True), bounds(lengths), causal=True, backend=backend)
    assert out.shape == (0, 2, 4)
    out.sum().backward()


@pytest.mark.parametrize("length", [1, 6, 15, 16, 40])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_auto_gives_nan_for_nan(where: int, trains: bool, length: int) -> None:
    """On a CPU, for a NaN in queries, keys or values; torch's flash kernel gives zeros for a query before few keys."""
    qkv = torch.randn(length, 3, 1, 8)
    qkv[0, where, 0, 0] = float("nan")
    out = packed_attention(qkv.requires_grad_(trains), bounds([length]))
    assert out[0].isnan().any()
    q, k, v = (t.transpose(0, 1)[None] for t in qkv.unbind(1))
    for out in (self_attention(q, k, v), cross_attention(q[:, :, :1], k, v)):
        assert out[0, 0, 0].isnan().any()


def test_gradcheck_of_padded_groups() -> None:
    qkv = here.randn(11, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    lengths = bounds([3, 0, 5, 1, 2])
    for causal in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, causal=causal: packed_attention(x, lengths, causal=causal, backend="grouped"), qkv
        )


def test_lengths_changed_in_place_are_read_again() -> None:
    qkv = here.randn(6, 3, 1, 4)
    cu_lengths = bounds([2, 4]).to(DEVICE)
    packed_attention(qkv, cu_lengths)
    cu_lengths[1] = 5
    out = packed_attention(qkv, cu_lengths)
    torch.testing.assert_close(out.double(), packed(*qkv.unbind(1), [5, 1], False), rtol=2e-5, atol=2e-5)


def test_auto_follows_the_measurements() -> None:
    """What it takes is never more than 15 % slower than the best one in kernels/bench/results.csv."""
    cases: dict[tuple[str, ...], dict[str, float]] = {}
    path = Path(__file__).resolve().parents[3] / "kernels" / "bench" / "results.csv"
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["op"] in (DENSE.name, PACKED.name):
                case = tuple(row[name] for name in ("op", "shape", "dtype", "training"))
                cases.setdefault(case, {})[row["backend"]] = float(row["ours_ms"])
    taken = set()
    for (op, shape, dtype, training), measured in cases.items():
        size = dict(part.split("=") for part in shape.split())
        n, heads, width, causal = (int(size[name]) for name in ("N", "H", "K", "causal"))
        low, high = int(size["L"].split("..")[0]), int(size["L"].split("..")[-1])
        new = functools.partial(torch.empty, dtype=getattr(torch, dtype), requires_grad=training == "1")
        if op == DENSE.name:
            x = new(n, heads, high, width)
            name = choose(DENSE, "auto", SelfAttention(x, x, x, bool(causal), None)).name
        else:
            lengths = tuple(torch.linspace(high, low, n).long().tolist())
            qkv = new(sum(lengths), 3, heads, width)
            name = choose(PACKED, "auto", PackedInputs(qkv, bounds(list(lengths)), lengths, bool(causal))).name
            measured = {other: time for other, time in measured.items() if other != "padded"}
        assert measured[name] <= 1.15 * min(measured.values()), (op, shape, dtype, training, measured)
        taken.add((op, name))
    assert taken == {(DENSE.name, "explicit"), (DENSE.name, "sdpa"), (PACKED.name, "loop"), (PACKED.name, "grouped")}


def test_auto_copies_nothing_where_nothing_is_padded() -> None:
    lengths = (37,) * 3 + (197,) * 2
    x = PackedInputs(torch.zeros(sum(lengths), 3, 1, 8), bounds(list(lengths)), lengths, True)
    assert choose(PACKED, "auto", x).name == "grouped"


def test_errors_say_what_is_wrong() -> None:
    x, y = torch.zeros(2, 2, 5, 8), torch.zeros(10, 3, 2, 8)
    with pytest.raises(ValueError, match=r"q, k, v must be \[N, H, L, K\]"):
        self_attention(x, x, x[:1])
    with pytest.raises(ValueError, match="mask must be bool"):
        self_attention(x, x, x, mask=torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"mask must be \[2, 5\] or broadcast to"):
        self_attention(x, x, x, mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(BackendError, match="needs tensors on a GPU"):
        self_attention(x, x, x, backend="xformers")
    with pytest.raises(ValueError, match=r"qkv must be \[T, 3, H, K\]"):
        packed_attention(y[:, :2], bounds([10]))
    with pytest.raises(ValueError, match="ends at 9, but there are 10 tokens"):
        packed_attention(y, bounds([4, 5]))
    with pytest.raises(ValueError, match="start at 0 and not fall"):
        packed_attention(y, torch.tensor([0, 7, 5, 10]))
    with pytest.raises(ValueError, match=r"must be \[N \+ 1\] integers"):
        packed_attention(y, torch.tensor([0.0, 10.0]))
    for backend in ("varlen", "xformers"):
        with pytest.raises(BackendError, match="needs tensors on a GPU"):
            packed_attention(y, bounds([10]), backend=backend)
