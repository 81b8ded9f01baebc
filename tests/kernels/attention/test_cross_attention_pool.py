"""cross_attention_pool: every form against nn.LayerNorm and nn.MultiheadAttention on repeated tokens."""

import copy
import dataclasses
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from kernel_device import DEVICE, here
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill_kernels import cross_attention_pool
from distill_kernels.attention import absorbed_attention
from distill_kernels.attention import cross_attention_pool as pool
from distill_kernels.dispatch import BackendError
from distill_kernels.measure import peak_bytes

FORMS = ("projected", "absorbed", "reference")

# V, B, L, D, H
SHAPES = [
    (8, 3, 77, 64, 4),
    (1, 2, 1, 32, 1),
    (3, 5, 49, 48, 6),
    (20, 2, 13, 24, 2),
    (64, 3, 196, 32, 2),
    (2, 4, 257, 24, 3),
]

# Relative error (norms) of outputs and gradients against float64. In half precision, a few roundings of 2^-11 in
# fp16 and 2^-8 in bf16.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 2.5e-3, torch.bfloat16: 2e-2}


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


def make(width: int, heads: int, dtype: torch.dtype, seed: int = 0, device: str = DEVICE) -> Modules:
    """Modules whose every parameter is random: a fresh LayerNorm's ones and zeros would hide its weights."""
    torch.manual_seed(seed)
    modules = Modules(nn.LayerNorm(width), nn.LayerNorm(width), nn.MultiheadAttention(width, heads))
    for module in modules:
        for name, parameter in module.named_parameters():
            mean = 1.0 if name == "weight" else 0.0
            nn.init.normal_(parameter, mean, 0.3 if parameter.ndim == 1 else width**-0.5)
        module.to(device, dtype)
    return modules


def repeated_tokens(
    modules: Modules, queries: Tensor, tokens: Tensor, valid: Tensor | None, normalize: bool = True
) -> Tensor:
    """One query a sequence over its own copy of the tokens; a sample without tokens gets the output bias."""
    v, b, d = queries.shape
    copies = tokens.unsqueeze(0).expand(v, -1, -1, -1).reshape(v * b, -1, d).transpose(0, 1)  # [L, VB, D]
    keys = modules.ln_k(copies)
    some = here.ones(b, dtype=torch.bool) if valid is None else valid.any(1)
    hidden = None if valid is None else (~valid & some[:, None]).repeat(v, 1)
    x = modules.ln_q(queries).reshape(1, v * b, d)
    out, _ = modules.attention(x, keys, keys, key_padding_mask=hidden)
    out = torch.where(some[None, :, None], out.reshape(v, b, d), modules.attention.out_proj.bias)
    return F.normalize(queries + out, dim=-1) if normalize else queries + out


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    v, b, n, d, _ = shape
    queries = here.randn(v, b, d, dtype=dtype, requires_grad=True)
    tokens = (here.randn(b, n, d, dtype=dtype) * 2 + 0.5).requires_grad_()
    return queries, tokens, here.randn(v, b, d, dtype=dtype)


def pool_options(kind: str, b: int, n: int) -> tuple[dict[str, Tensor], Tensor | None]:
    if kind == "all":
        return {}, None
    lengths = here.tensor([n, 0, n // 2 | 1, 1, n])[:b]
    valid = here.arange(n) < lengths[:, None]
    return ({"lengths": lengths} if kind == "lengths" else {"mask": valid}), valid


def relative(a: Tensor, b: Tensor) -> float:
    """Of norms; absolute below 0.1, for the gradients that vanish when a sample has one token."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(0.1)).item()


# The output, and what has gradients.
NAMES = ("out", "queries", "tokens", "ln_q_weight", "ln_q_bias", "ln_k_weight", "ln_k_bias")
NAMES += ("in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias")


def without_key_bias(in_proj_bias: Tensor) -> Tensor:
    query, _, value = in_proj_bias.chunk(3)
    return torch.cat([query, value])


def assert_same(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...], tolerance: float) -> None:
    for name, a, b in zip(NAMES, ours, truth, strict=True):
        if name == "in_proj_bias":  # the key third is zero in mathematics and rounding noise in the modules
            d = b.shape[0] // 3
            assert b[d : 2 * d].abs().max() < 1e-3 * b.abs().max()
            a, b = map(without_key_bias, (a, b))
        error = relative(a, b)
        assert error < tolerance, f"{name}: {error:.1e}"


def check(
    modules: Modules,
    inputs: tuple[Tensor, Tensor, Tensor],
    valid: Tensor | None,
    tolerance: float,
    normalize: bool = True,
    autocast: bool = False,
    **options: Tensor | str,
) -> tuple[Tensor, ...]:
    """Output and gradients for (queries, tokens, *weights), held against those of float64 on the same numbers."""
    queries, tokens, grad = inputs
    heads = modules.attention.num_heads
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        out = cross_attention_pool(queries, tokens, **modules.parameters, heads=heads, normalize=normalize, **options)
    ours = torch.autograd.grad(out, [queries, tokens, *modules.parameters.values()], grad.to(out.dtype))
    exact = Modules(*(copy.deepcopy(module).double() for module in modules))
    q64, t64 = (x.detach().double().requires_grad_() for x in (queries, tokens))
    expected = repeated_tokens(exact, q64, t64, valid, normalize)
    truth = torch.autograd.grad(expected, [q64, t64, *exact.parameters.values()], grad.double())
    assert_same((out, *ours), (expected, *truth), tolerance)
    return out, *ours


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["all", "lengths", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, kind: str, form: str) -> None:
    v, b, n, d, heads = shape
    options, valid = pool_options(kind, b, n)
    modules = make(d, heads, dtype)
    out, *_ = check(modules, inputs(shape, dtype), valid, TOLERANCE[dtype], normalize=v != 3, backend=form, **options)
    assert out.dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
def test_pure_half(shape: tuple[int, ...], dtype: torch.dtype, form: str) -> None:
    """Weights, inputs and gradients in half precision, without autocast."""
    _, b, n, d, heads = shape
    options, valid = pool_options("lengths", b, n)
    ours = check(make(d, heads, dtype), inputs(shape, dtype), valid, TOLERANCE[dtype], backend=form, **options)
    assert {t.dtype for t in ours} == {dtype}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0)])
def test_strided_inputs(order: tuple[int, ...], dtype: torch.dtype, form: str) -> None:
    """As a tower's last block passes them (views second in memory), and with the embedding outermost."""

    def laid_out(x: Tensor) -> Tensor:
        return x.detach().permute(order).contiguous().permute(order)  # each order is its own inverse

    queries, tokens, grad = map(laid_out, inputs((3, 4, 9, 32, 2), dtype))
    assert not any(x.is_contiguous() for x in (queries, tokens, grad))
    options, valid = pool_options("lengths", 4, 9)
    strided = (queries.requires_grad_(), tokens.requires_grad_(), grad)
    check(make(32, 2, dtype), strided, valid, TOLERANCE[dtype], normalize=False, backend=form, **options)


@pytest.mark.parametrize("form", ["projected", "absorbed"])
@pytest.mark.parametrize("half_inputs", [True, False])
def test_autocast(half_inputs: bool, form: str) -> None:
    """bf16 autocast, against float64 on the same numbers: as near as the modules are, and LayerNorm in fp32.

    Tokens far from zero (mean 20, deviation 1) would lose their deviation to a bf16 LayerNorm.
    """
    modules = make(64, 4, torch.float32)
    queries, tokens, grad = inputs((8, 3, 40, 64, 4), torch.float32)
    if half_inputs:
        queries, tokens = (x.detach().bfloat16().requires_grad_() for x in (queries, tokens))
    else:
        tokens = (here.randn(3, 40, 64) + 20).requires_grad_()
    lengths = here.tensor([40, 0, 17])
    valid = here.arange(40) < lengths[:, None]
    out, *ours = check(modules, (queries, tokens, grad), valid, 2e-2, autocast=True, backend=form, lengths=lengths)
    assert out.dtype == torch.float32
    assert (out.norm(dim=-1) - 1).abs().max() < 1e-6  # normalised in fp32
    assert [g.dtype for g in ours[:2]] == [queries.dtype, tokens.dtype]
    assert all(g.dtype == torch.float32 for g in ours[2:])


@pytest.mark.parametrize("form", FORMS)
def test_key_bias_has_no_gradient(form: str) -> None:
    """It moves all scores of a row alike: exactly zero, where rounding noise would become a step of Adam."""
    modules = make(32, 2, torch.float32)
    queries, tokens, grad = inputs((3, 2, 9, 32, 2), torch.float32)
    out = cross_attention_pool(queries, tokens, **modules.parameters, heads=2, backend=form)
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
    options = {"heads": 2, "backend": form, **modules.parameters}
    out = cross_attention_pool(queries, tokens, lengths=here.tensor([0, 0]), **options)
    torch.testing.assert_close(out, expected)
    everything = [tokens, *modules.parameters.values()]
    gradients = dict(zip(["tokens", *modules.parameters], torch.autograd.grad(out, everything, grad), strict=True))
    assert gradients.pop("out_proj_bias").abs().max() > 0
    assert all(g.eq(0).all() for g in gradients.values())
    if form != "reference":
        torch.testing.assert_close(cross_attention_pool(queries, tokens[:, :0], **options), expected)
        assert cross_attention_pool(queries[:, :0], tokens[:0], **options).shape == (3, 0, 32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["queries", "tokens"])
def test_nan_and_inf_propagate_to_their_sample_only(where: str, value: float, form: str) -> None:
    """A query's to its own view, a token's to all; in the gradients, to the sample and, as the reference, the weights.

    40 tokens: of fewer than 16, PyTorch's fused attention on a CPU makes zeros of a row of NaN scores.
    """
    modules = make(32, 2, torch.float32)
    queries, tokens, grad = inputs((3, 3, 40, 32, 2), torch.float32)
    with torch.no_grad():
        (queries[2] if where == "queries" else tokens[:, 4])[1, 7] = value

    def finite(form: str) -> list[Tensor]:
        out = cross_attention_pool(queries, tokens, **modules.parameters, heads=2, backend=form)
        leaves = [queries, tokens, *modules.parameters.values()]
        return [t.isfinite() for t in (out, *torch.autograd.grad(out, leaves, grad))]

    ours = finite(form)
    out, d_queries, d_tokens, *_ = ours
    assert out[:, [0, 2]].all()
    assert d_queries[:, [0, 2]].all()
    assert d_tokens[[0, 2]].all()
    reached = slice(2, 3) if where == "queries" else slice(None)
    for of_views in (out, d_queries):
        assert not of_views[reached, 1].any()
        assert of_views[:2, 1].all() == (where == "queries")
    assert not d_tokens[1].any()
    for name, a, b in zip(NAMES, ours, finite("reference"), strict=True):
        if name == "in_proj_bias":
            a, b = map(without_key_bias, (a, b))
        assert torch.equal(a, b), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "attention"),
    [("projected", "matmul"), ("projected", "sdpa"), ("projected", "triton"), ("absorbed", "auto")],
)
def test_half_precision_tokens_do_not_spoil_their_norm(form: str, attention: str) -> None:
    """Its weight's gradient is not summed over thousands of tokens in bf16, nor is a large bias in scores or values.

    torch's LayerNorm, asked for that sum, is 10 % off here and 40 % at 50,000 tokens.
    """
    d, b, n = 32, 32, 196
    modules = make(d, 2, torch.float32)
    with torch.no_grad():
        modules.parameters["ln_k_bias"].normal_(std=10.0)
    queries, tokens, _ = inputs((8, b, n, d, 2), torch.float32)
    tokens = tokens.detach().bfloat16()
    leaves = [modules.parameters[name] for name in ("ln_k_weight", "ln_q_weight")]

    def gradients(form: str, attention: str, bf16: bool) -> tuple[Tensor, ...]:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            options = {"heads": 2, "normalize": False, "backend": form, "attention": attention, **modules.parameters}
            out = cross_attention_pool(queries, tokens if bf16 else tokens.float(), **options)
        return torch.autograd.grad((out - queries.detach()).square().sum(), leaves)

    for ours, truth in zip(gradients(form, attention, True), gradients("reference", "auto", False), strict=True):
        assert (ours - truth).norm() < 2e-2 * truth.norm()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["projected", "auto"])
def test_exports_with_any_number_of_tokens(form: str) -> None:
    class Pool(torch.nn.Module):
        def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
            return cross_attention_pool(queries, tokens, **parameters, heads=4, backend=form)

    parameters = {name: t.detach() for name, t in make(32, 4, torch.float32).parameters.items()}
    b, n = torch.export.Dim("b", min=2, max=1000), torch.export.Dim("n", min=16, max=1000)
    shapes = {"queries": {1: b}, "tokens": {0: b, 1: n}}
    examples = (here.randn(3, 4, 32), here.randn(4, 20, 32))
    exported = torch.export.export(Pool(), examples, dynamic_shapes=shapes, strict=False).module()
    queries, tokens = here.randn(3, 7, 32), here.randn(7, 53, 32)
    torch.testing.assert_close(exported(queries, tokens), Pool()(queries, tokens), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["projected", "absorbed"])
def test_compile_and_checkpoint(form: str) -> None:
    modules = make(32, 2, torch.float32)
    queries, tokens, grad = inputs((3, 2, 9, 32, 2), torch.float32)
    lengths = here.tensor([9, 4])

    def layer(q: Tensor, t: Tensor) -> Tensor:
        return cross_attention_pool(q, t, **modules.parameters, heads=2, backend=form, lengths=lengths)

    leaves = [queries, tokens, *modules.parameters.values()]
    eager = torch.autograd.grad(layer(queries, tokens), leaves, grad)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for out in (compiled(queries, tokens), checkpoint(layer, queries, tokens, use_reentrant=False)):
        for a, b in zip(eager, torch.autograd.grad(out, leaves, grad), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_absorbed_forward_makes_nothing_as_large_as_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is alive at once is smaller than the tokens; keys and values alone are twice as large."""
    b, n, d = 16, 256, 64
    monkeypatch.setattr(absorbed_attention, "numbers_for", lambda part, tensor: {"chunk_bytes": n * d * 4})
    modules = make(d, 2, torch.float32, device="cpu")
    queries, tokens = torch.randn(2, b, d), torch.randn(b, n, d)

    def peak(form: str) -> int:
        options = {"heads": 2, "backend": form, **modules.parameters}
        return peak_bytes(lambda: cross_attention_pool(queries, tokens, **options), torch.device("cpu"))

    size = tokens.numel() * 4
    with torch.no_grad():
        assert peak("absorbed") < size
        assert peak("projected") > 2 * size  # the measure sees what is there


def test_auto_follows_the_cost_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU `auto` gives the bits of the form that the model picks; only the projected form calls an attention."""
    modules = make(32, 2, torch.float32, device="cpu")
    queries, tokens, _ = (t.detach().cpu() for t in inputs((3, 2, 9, 32, 2), torch.float32))
    options = {"heads": 2, **modules.parameters}
    for wanted in ("absorbed", "projected"):
        op = dataclasses.replace(pool.OP, cheapest=lambda inputs, wanted=wanted, **coefficients: (wanted,))
        monkeypatch.setattr(pool, "OP", op)
        auto = cross_attention_pool(queries, tokens, **options)
        assert torch.equal(auto, cross_attention_pool(queries, tokens, **options, backend=wanted))
    for form in ("absorbed", "reference"):
        with pytest.raises(BackendError, match=f"backend '{form}' calls no attention; name one \\('sdpa'\\)"):
            cross_attention_pool(queries, tokens, **options, backend=form, attention="sdpa")
    with pytest.raises(BackendError, match="cross_attention: no backend named 'nope'"):
        cross_attention_pool(queries, tokens, **options, attention="nope")


def test_wrong_arguments() -> None:
    modules = make(32, 2, torch.float32)
    queries, tokens, _ = inputs((3, 2, 9, 32, 2), torch.float32)
    options = {"heads": 2, **modules.parameters}
    for match, wrong in (
        ("no backend named 'best'; there are reference, projected", {"backend": "best"}),
        ("heads must divide D = 32, got 5", {"heads": 5}),
        ("in_proj_weight must be \\(96, 32\\)", {"in_proj_weight": modules.attention.out_proj.weight}),
        ("not both", {"lengths": here.tensor([1, 2]), "mask": here.ones(2, 9).bool()}),
    ):
        with pytest.raises(ValueError, match=match):
            cross_attention_pool(queries, tokens, **(options | wrong))
    with pytest.raises(ValueError, match="queries must be \\[V,B,D\\]"):
        cross_attention_pool(queries[:, :1], tokens, **options)
