"""cross_attention_pool: every form against nn.LayerNorm and nn.MultiheadAttention on repeated tokens."""

import csv
import math
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from distill_kernels import cross_attention_pool
from distill_kernels.absorbed_attention import CHUNK_BYTES, absorbed_attention
from distill_kernels.backends import BackendError
from distill_kernels.cross_attention_pool import absorbed_is_cheaper
from distill_kernels.measure import peak_bytes

FORMS = ("projected", "absorbed", "reference")

# V, B, L, D, H
SHAPES = [(8, 3, 77, 64, 4), (1, 2, 1, 32, 1), (3, 5, 49, 48, 6), (20, 2, 13, 24, 2)]

# Relative error (norms) of outputs and gradients against float64.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


class Modules(NamedTuple):
    ln_q: nn.LayerNorm
    ln_k: nn.LayerNorm
    attention: nn.MultiheadAttention

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            "ln_q_weight": self.ln_q.weight,
            "ln_q_bias": self.ln_q.bias,
            "ln_k_weight": self.ln_k.weight,
            "ln_k_bias": self.ln_k.bias,
            "in_proj_weight": self.attention.in_proj_weight,
            "in_proj_bias": self.attention.in_proj_bias,
            "out_proj_weight": self.attention.out_proj.weight,
            "out_proj_bias": self.attention.out_proj.bias,
        }


def make(width: int, heads: int, dtype: torch.dtype, seed: int = 0) -> Modules:
    """Modules whose every parameter is random: a fresh LayerNorm's ones and zeros would hide its weights."""
    torch.manual_seed(seed)
    modules = Modules(nn.LayerNorm(width), nn.LayerNorm(width), nn.MultiheadAttention(width, heads))
    for module in modules:
        for name, parameter in module.named_parameters():
            mean = 1.0 if name == "weight" else 0.0
            nn.init.normal_(parameter, mean, 0.3 if parameter.ndim == 1 else width**-0.5)
        module.to(dtype)
    return modules


def repeated_tokens(
    modules: Modules, queries: Tensor, tokens: Tensor, valid: Tensor | None, normalize: bool = True
) -> Tensor:
    """One query a sequence over its own copy of the tokens; a sample without tokens gets the output bias."""
    v, b, d = queries.shape
    copies = tokens.unsqueeze(0).expand(v, -1, -1, -1).reshape(v * b, -1, d).transpose(0, 1)  # [L, VB, D]
    keys = modules.ln_k(copies)
    some = torch.ones(b, dtype=torch.bool) if valid is None else valid.any(1)
    hidden = None if valid is None else (~valid & some[:, None]).repeat(v, 1)
    x = modules.ln_q(queries).reshape(1, v * b, d)
    out, _ = modules.attention(x, keys, keys, key_padding_mask=hidden)
    out = torch.where(some[None, :, None], out.reshape(v, b, d), modules.attention.out_proj.bias)
    return F.normalize(queries + out, dim=-1) if normalize else queries + out


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    v, b, n, d, _ = shape
    queries = torch.randn(v, b, d, dtype=dtype, requires_grad=True)
    tokens = (torch.randn(b, n, d, dtype=dtype) * 2 + 0.5).requires_grad_()
    return queries, tokens, torch.randn(v, b, d, dtype=dtype)


def pool_options(kind: str, b: int, n: int) -> tuple[dict[str, Tensor], Tensor | None]:
    if kind == "all":
        return {}, None
    lengths = torch.tensor([n, 0, 1, n // 2, n])[:b]
    valid = torch.arange(n) < lengths[:, None]
    return ({"lengths": lengths} if kind == "lengths" else {"mask": valid}), valid


def relative(a: Tensor, b: Tensor) -> float:
    """Of norms; absolute below 0.1, for the gradients that vanish when a sample has one token."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(0.1)).item()


def assert_same(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...], names: list[str], tolerance: float) -> None:
    for name, a, b in zip(names, ours, truth, strict=True):
        if name == "in_proj_bias":  # the key third is zero in mathematics and rounding noise in the modules
            d = b.shape[0] // 3
            assert b[d : 2 * d].abs().max() < 1e-3 * b.abs().max()
            a, b = (torch.cat([t[:d], t[2 * d :]]) for t in (a, b))
        error = relative(a, b)
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["all", "lengths", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, kind: str, form: str) -> None:
    v, b, n, d, heads = shape
    modules, exact = make(d, heads, dtype), make(d, heads, torch.float64)
    queries, tokens, grad = inputs(shape, dtype)
    options, valid = pool_options(kind, b, n)
    out = cross_attention_pool(
        queries, tokens, **modules.parameters, heads=heads, form=form, normalize=v != 3, **options
    )
    assert out.dtype == dtype
    ours = torch.autograd.grad(out, [queries, tokens, *modules.parameters.values()], grad)
    q64, t64 = (x.detach().double().requires_grad_() for x in (queries, tokens))
    expected = repeated_tokens(exact, q64, t64, valid, normalize=v != 3)
    truth = torch.autograd.grad(expected, [q64, t64, *exact.parameters.values()], grad.double())
    names = ["out", "queries", "tokens", *modules.parameters]
    assert_same((out, *ours), (expected, *truth), names, TOLERANCE[dtype])


@pytest.mark.parametrize("form", ["projected", "absorbed"])
@pytest.mark.parametrize("half_inputs", [True, False])
def test_autocast(half_inputs: bool, form: str) -> None:
    """bf16 autocast, against float64 on the same numbers: as near as the modules are, and LayerNorm in fp32.

    Tokens far from zero (mean 20, deviation 1) would lose their deviation to a bf16 LayerNorm.
    """
    shape = (8, 3, 40, 64, 4)
    modules, exact = make(64, 4, torch.float32), make(64, 4, torch.float64)
    queries, tokens, grad = inputs(shape, torch.float32)
    if half_inputs:
        queries, tokens = (x.detach().bfloat16().requires_grad_() for x in (queries, tokens))
    else:
        tokens = (torch.randn(3, 40, 64) + 20).requires_grad_()
    q64, t64 = (x.detach().double().requires_grad_() for x in (queries, tokens))
    lengths = torch.tensor([40, 0, 17])
    valid = torch.arange(40) < lengths[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        out = cross_attention_pool(queries, tokens, **modules.parameters, heads=4, form=form, lengths=lengths)
    assert out.dtype == torch.float32
    assert (out.norm(dim=-1) - 1).abs().max() < 1e-6  # normalised in fp32
    ours = torch.autograd.grad(out, [queries, tokens, *modules.parameters.values()], grad)
    expected = repeated_tokens(exact, q64, t64, valid)
    truth = torch.autograd.grad(expected, [q64, t64, *exact.parameters.values()], grad.double())
    names = ["out", "queries", "tokens", *modules.parameters]
    assert_same((out, *ours), (expected, *truth), names, 2e-2)
    assert [g.dtype for g in ours[:2]] == [queries.dtype, tokens.dtype]
    assert all(g.dtype == torch.float32 for g in ours[2:])


@pytest.mark.parametrize("form", ["projected", "absorbed"])
def test_pure_bf16(form: str) -> None:
    modules, exact = make(64, 4, torch.bfloat16), make(64, 4, torch.float32)
    for half, full in zip(modules.parameters.values(), exact.parameters.values(), strict=True):
        full.data.copy_(half.data)
    queries, tokens, _ = inputs((8, 3, 40, 64, 4), torch.bfloat16)
    out = cross_attention_pool(queries, tokens, **modules.parameters, heads=4, form=form)
    assert out.dtype == torch.bfloat16
    assert relative(out, repeated_tokens(exact, queries.float(), tokens.float(), None)) < 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_key_bias_has_no_gradient(form: str) -> None:
    """It moves all scores of a row alike: exactly zero, where rounding noise would become a step of Adam."""
    modules = make(32, 2, torch.float32)
    queries, tokens, grad = inputs((3, 2, 9, 32, 2), torch.float32)
    out = cross_attention_pool(queries, tokens, **modules.parameters, heads=2, form=form)
    (gradient,) = torch.autograd.grad(out, [modules.attention.in_proj_bias], grad)
    assert gradient[64:].abs().min() > 0
    if form == "reference":
        assert gradient[32:64].abs().max() < 1e-6
    else:
        assert gradient[32:64].eq(0).all()


@pytest.mark.parametrize("form", FORMS)
def test_without_tokens(form: str) -> None:
    """Length 0, or L = 0: the attention output is zero before the output projection; B = 0 works."""
    modules = make(32, 2, torch.float32)
    queries, tokens, grad = inputs((3, 2, 9, 32, 2), torch.float32)
    expected = F.normalize(queries + modules.attention.out_proj.bias, dim=-1)
    options = {"heads": 2, "form": form, **modules.parameters}
    out = cross_attention_pool(queries, tokens, lengths=torch.tensor([0, 0]), **options)
    torch.testing.assert_close(out, expected)
    everything = [tokens, *modules.parameters.values()]
    gradients = dict(zip(["tokens", *modules.parameters], torch.autograd.grad(out, everything, grad), strict=True))
    assert gradients.pop("out_proj_bias").abs().max() > 0
    assert all(g.eq(0).all() for g in gradients.values())
    if form != "reference":
        torch.testing.assert_close(cross_attention_pool(queries, tokens[:, :0], **options), expected)
        assert cross_attention_pool(queries[:, :0], tokens[:0], **options).shape == (3, 0, 32)


@pytest.mark.parametrize("form", ["projected", "absorbed"])
def test_nan_propagates_to_its_sample_only(form: str) -> None:
    modules = make(32, 2, torch.float32)
    queries, tokens, _ = inputs((3, 3, 9, 32, 2), torch.float32)
    with torch.no_grad():
        tokens[1, 4, 7] = math.nan
    out = cross_attention_pool(queries, tokens, **modules.parameters, heads=2, form=form)
    assert out[:, 1].isnan().all()
    assert out[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("form", ["projected", "absorbed"])
def test_compile_and_checkpoint(form: str) -> None:
    modules = make(32, 2, torch.float32)
    queries, tokens, grad = inputs((3, 2, 9, 32, 2), torch.float32)
    lengths = torch.tensor([9, 4])

    def layer(q: Tensor, t: Tensor) -> Tensor:
        return cross_attention_pool(q, t, **modules.parameters, heads=2, form=form, lengths=lengths)

    leaves = [queries, tokens, *modules.parameters.values()]
    eager = torch.autograd.grad(layer(queries, tokens), leaves, grad)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for out in (compiled(queries, tokens), checkpoint(layer, queries, tokens, use_reentrant=False)):
        for a, b in zip(eager, torch.autograd.grad(out, leaves, grad), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_absorbed_operator(masked: bool) -> None:
    q = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([[1, 1, 1, 1, 1], [0] * 5, [0, 1, 1, 0, 1]]).bool() if masked else None
    assert gradcheck(lambda *x: absorbed_attention(*x, valid), (q, tokens))
    torch.library.opcheck(torch.ops.distill.absorbed_attention.default, (q, tokens, valid, 1e-5))


def test_absorbed_works_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 1, 2 and 5 samples (the last one smaller) against the formula, every element written."""
    q = torch.randn(6, 5, 16, requires_grad=True)
    tokens = torch.randn(5, 7, 16, requires_grad=True)
    x = F.layer_norm(tokens, (16,))
    expected = ((q.transpose(0, 1) @ x.mT).softmax(-1) @ x).transpose(0, 1)
    truth = torch.autograd.grad(expected.square().sum(), (q, tokens))
    for samples in (1, 2, 5):
        monkeypatch.setitem(CHUNK_BYTES, "cpu", samples * 7 * 16 * 4)
        out = absorbed_attention(q, tokens)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        for a, b in zip(torch.autograd.grad(out.square().sum(), (q, tokens)), truth, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_absorbed_forward_makes_nothing_as_large_as_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is alive at once is smaller than the tokens; keys and values alone are twice as large."""
    b, n, d = 16, 256, 64
    monkeypatch.setitem(CHUNK_BYTES, "cpu", n * d * 4)
    modules = make(d, 2, torch.float32)
    queries, tokens = torch.randn(2, b, d), torch.randn(b, n, d)

    def peak(form: str) -> int:
        options = {"heads": 2, "form": form, **modules.parameters}
        return peak_bytes(lambda: cross_attention_pool(queries, tokens, **options), torch.device("cpu"))

    size = tokens.numel() * 4
    with torch.no_grad():
        assert peak("absorbed") < size
        assert peak("projected") > 2 * size  # the measure sees what is there


def test_cost_model_on_the_measured_grid() -> None:
    """The form that `auto` takes is never more than 10 % slower than the better one at any measured size."""
    path = Path(__file__).resolve().parents[2] / "kernels" / "bench" / "cross_attention_crossover.csv"
    losses, forms = [], set()
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            views, heads, tokens, width, batch = (
                int(row[name]) for name in ("views", "heads", "tokens", "width", "batch")
            )
            absorbed = absorbed_is_cheaper(views, heads, tokens, width, batch, getattr(torch, row["dtype"]).itemsize)
            milliseconds = {name: float(row[f"{name}_ms"]) for name in ("projected", "absorbed")}
            form = "absorbed" if absorbed else "projected"
            losses.append(milliseconds[form] / min(milliseconds.values()))
            forms.add(form)
    assert len(losses) > 300
    assert forms == {"projected", "absorbed"}
    assert max(losses) < 1.1
    assert sum(losses) / len(losses) < 1.005


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("tokens", [77, 196])
def test_cost_model_at_the_recipes(tokens: int, itemsize: int) -> None:
    assert absorbed_is_cheaper(8, 8, tokens, 512, 32, itemsize)
    assert not absorbed_is_cheaper(64, 8, tokens, 512, 32, itemsize)
    assert not absorbed_is_cheaper(8, 8, 1, 512, 32, itemsize)  # one token: nothing to share
    assert not absorbed_is_cheaper(8, 8, 0, 512, 0, itemsize)  # nothing at all


def test_cost_model_without_memory_is_the_stated_inequality(monkeypatch: pytest.MonkeyPatch) -> None:
    from distill_kernels.cross_attention_pool import BALANCE

    monkeypatch.setitem(BALANCE, 4, BALANCE[4]._replace(multiplications=0))
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        v, h, n, k = (int(torch.randint(1, high, (), generator=g)) for high in (100, 20, 300, 100))
        d = h * k
        margin = v * (h - 1) / d + v / n - 1
        if abs(margin) > 1e-9:
            assert absorbed_is_cheaper(v, h, n, d, 1, 4) is (margin < 0)


def test_auto_follows_the_cost_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` gives the bits of the form that the model picks; only the projected form has backends."""
    modules = make(32, 2, torch.float32)
    queries, tokens, _ = inputs((3, 2, 9, 32, 2), torch.float32)
    options = {"heads": 2, **modules.parameters}
    for wanted, cheaper in (("absorbed", True), ("projected", False)):
        monkeypatch.setattr(
            sys.modules["distill_kernels.cross_attention_pool"],
            "absorbed_is_cheaper",
            lambda *_, cheaper=cheaper: cheaper,
        )
        auto = cross_attention_pool(queries, tokens, **options)
        assert torch.equal(auto, cross_attention_pool(queries, tokens, **options, form=wanted))
    for form in ("absorbed", "reference"):
        with pytest.raises(BackendError, match=f"form '{form}' has no backends"):
            cross_attention_pool(queries, tokens, **options, form=form, backend="sdpa")
    with pytest.raises(BackendError, match="no backend named 'nope'"):
        cross_attention_pool(queries, tokens, **options, backend="nope")


def test_wrong_arguments() -> None:
    modules = make(32, 2, torch.float32)
    queries, tokens, _ = inputs((3, 2, 9, 32, 2), torch.float32)
    options = {"heads": 2, **modules.parameters}
    for match, wrong in (
        ("no form named 'best'", {"form": "best"}),
        ("heads must divide D = 32, got 5", {"heads": 5}),
        ("in_proj_weight must be \\(96, 32\\)", {"in_proj_weight": modules.attention.out_proj.weight}),
        ("not both", {"lengths": torch.tensor([1, 2]), "mask": torch.ones(2, 9).bool()}),
    ):
        with pytest.raises(ValueError, match=match):
            cross_attention_pool(queries, tokens, **(options | wrong))
    with pytest.raises(ValueError, match="queries must be \\[V,B,D\\]"):
        cross_attention_pool(queries[:, :1], tokens, **options)
