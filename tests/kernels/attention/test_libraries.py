"""The backends whose kernels come from libraries and need a GPU: torch's varlen attention and xformers.

Without a GPU the library's function is replaced by plain maths of what it documents, taking only calls that fit its
signature: that checks layouts, bounds and masks, not the library. On a GPU the library itself runs.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_device import DEVICE
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from distill_kernels import cross_attention, machine, packed_attention, self_attention
from distill_kernels.attention import memory_efficient
from distill_kernels.attention.cross_attention import OP as CROSS
from distill_kernels.attention.cross_attention import CrossAttentionInputs
from distill_kernels.attention.cross_attention import _xformers_call as cross_call
from distill_kernels.attention.packed_attention import OP as PACKED
from distill_kernels.attention.packed_attention import PackedInputs
from distill_kernels.attention.packed_attention import _xformers_call as packed_call
from distill_kernels.attention.self_attention import OP as DENSE
from distill_kernels.attention.self_attention import SelfAttention
from distill_kernels.attention.self_attention import _xformers_call as dense_call
from distill_kernels.dispatch import BackendError, choose

GPU = DEVICE == "cuda"
DTYPE = torch.bfloat16
LENGTHS = (5, 1, 0, 12, 12)
# Both sides round their results to bf16 once (2^-8), and may round the probabilities.
TOLERANCE = 4e-2


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """q [..., Lq, K], k, v [..., Lk, K], bias [..., Lq, Lk]."""
    scores = q.float() @ k.float().mT * scale + bias.float()
    return (scores.softmax(-1) @ v.float()).to(q.dtype)


@pytest.fixture
def xformers() -> None:
    pytest.importorskip("xformers")


@pytest.fixture
def libraries(xformers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, `varlen_attn` and `memory_efficient_attention` as their documentation defines them."""
    if GPU:
        return
    import torch.nn.attention.varlen
    import xformers.ops
    from xformers.ops.fmha.attn_bias import AttentionBias

    takes = {
        "varlen": inspect.signature(torch.nn.attention.varlen.varlen_attn),
        "xformers": inspect.signature(xformers.ops.memory_efficient_attention),
    }

    def varlen_attn(*args: Any, **kwargs: Any) -> Tensor:
        given = takes["varlen"].bind(*args, **kwargs)
        given.apply_defaults()
        a = given.arguments
        bounds, window = a["cu_seq_q"], tuple(a["window_size"])
        assert bounds.dtype == torch.int32
        assert torch.equal(bounds, a["cu_seq_k"])
        assert window in {(-1, -1), (-1, 0)}
        outs = []
        for start, end in pairwise(bounds.tolist()):
            assert end - start <= min(a["max_q"], a["max_k"])
            q, k, v = (a[name][start:end].transpose(0, 1) for name in ("query", "key", "value"))  # [H, L, K]
            future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
            bias = torch.zeros(future.shape).masked_fill(future & (window == (-1, 0)), float("-inf"))
            scale = q.shape[-1] ** -0.5 if a["scale"] is None else a["scale"]
            outs.append(plain(q, k, v, bias, scale).transpose(0, 1))
        return torch.cat(outs)

    def memory_efficient_attention(*args: Any, **kwargs: Any) -> Tensor:
        given = takes["xformers"].bind(*args, **kwargs)
        given.apply_defaults()
        a = given.arguments
        q, k, v = (a[name].transpose(1, 2) for name in ("query", "key", "value"))  # [N, H, L, K]
        shape = (*q.shape[:3], k.shape[2])
        bias = a["attn_bias"]
        if bias is None:
            bias = torch.zeros(shape)
        elif isinstance(bias, AttentionBias):
            bias = bias.materialize(shape)
        assert bias.shape == shape
        scale = q.shape[-1] ** -0.5 if a["scale"] is None else a["scale"]
        return plain(q, k, v, bias, scale).transpose(1, 2)

    varlen_attn.__signature__ = takes["varlen"]  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(xformers.ops, "memory_efficient_attention", memory_efficient_attention)


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape).to(DEVICE, DTYPE).requires_grad_() for shape in shapes]


def compare(out: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    """Outputs and gradients agree."""
    dout = torch.randn_like(out)
    found = [out, *torch.autograd.grad(out, inputs, dout)]
    right = [expected, *torch.autograd.grad(expected, inputs, dout)]
    for a, b in zip(found, right, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE * max(b.abs().max().item(), 1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["varlen", "xformers"])
def test_packed(libraries: None, backend: str, causal: bool) -> None:
    (qkv,) = leaves((sum(LENGTHS), 3, 2, 16))
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(DEVICE)
    out = PACKED.get(backend).run(PackedInputs(qkv, bounds, LENGTHS, causal))
    compare(out, packed_attention(qkv, bounds, causal=causal, backend="reference"), qkv)


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention(libraries: None, causal: bool) -> None:
    q, k, v = leaves(*3 * [(3, 2, 20, 16)])
    out = DENSE.get("xformers").run(SelfAttention(q, k, v, causal, None))
    compare(out, self_attention(q, k, v, causal=causal, backend="reference"), q, k, v)


@pytest.mark.parametrize("valid", ["all", "lengths", "mask"])
def test_cross_attention(libraries: None, valid: str) -> None:
    """A sample without tokens gives zeros, as with every backend."""
    q, k, v = leaves((3, 2, 8, 16), (3, 2, 21, 16), (3, 2, 21, 16))
    lengths = torch.tensor([21, 0, 4], device=DEVICE) if valid == "lengths" else None
    mask = (torch.rand(3, 21) < 0.5).to(DEVICE) if valid == "mask" else None
    out = CROSS.get("xformers").run(CrossAttentionInputs(q, k, v, lengths, mask, 0.3))
    compare(out, cross_attention(q, k, v, lengths, mask, scale=0.3, backend="reference"), q, k, v)


@pytest.mark.skipif(GPU, reason="stands in for an older torch")
def test_varlen_of_torch_2_10(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has `is_causal` where later ones have `window_size`."""
    asked = []

    def varlen_attn(q: Tensor, k: Tensor, v: Tensor, *bounds: Any, is_causal: bool = False) -> Tensor:
        asked.append(is_causal)
        return q

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    qkv = torch.zeros(3, 3, 2, 16)
    for causal in (True, False):
        PACKED.get("varlen").run(PackedInputs(qkv, torch.tensor([0, 1, 3]), (1, 2), causal))
    assert asked == [True, False]


def test_varlen_fits_the_real_operator() -> None:
    """torch's own operator, on tensors without values: forward and backward take our arguments."""
    qkv = torch.empty(sum(LENGTHS), 3, 2, 16, dtype=DTYPE, device="meta", requires_grad=True)
    bounds = torch.empty(len(LENGTHS) + 1, dtype=torch.long, device="meta")
    out = PACKED.get("varlen").run(PackedInputs(qkv, bounds, LENGTHS, True))
    assert out.shape == (sum(LENGTHS), 2, 16)
    assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xformers_takes_our_layouts(xformers: None, dtype: torch.dtype) -> None:
    """Its kernels for CUDA refuse our calls for nothing but the missing GPU: biases of the right kind and alignment."""
    from xformers.ops import fmha
    from xformers.ops.fmha import cutlass, flash

    no_gpu = ("device=cpu", "operator wasn't built", "xFormers wasn't build", "bf16 is only supported")
    q, k = torch.zeros(3, 2, 8, 16, dtype=dtype), torch.zeros(3, 2, 21, 16, dtype=dtype)
    some = torch.ones(3, 21, dtype=torch.bool)
    x, bounds = torch.zeros(sum(LENGTHS), 3, 2, 16, dtype=dtype), torch.tensor([0, *LENGTHS]).cumsum(0)
    calls = {
        "cross": cross_call(CrossAttentionInputs(q, k, k, None, None, 0.3)),
        "cross, mask": cross_call(CrossAttentionInputs(q, k, k, None, some, 0.3)),
        "causal": dense_call(SelfAttention(q, q, q, True, None)),
        "packed": packed_call(PackedInputs(x, bounds, LENGTHS, False)),
        "packed, causal": packed_call(PackedInputs(x, bounds, LENGTHS, True)),
    }
    for name, call in calls.items():
        inputs = fmha.Inputs(query=call.q, key=call.k, value=call.v, attn_bias=call.bias, scale=call.scale)
        inputs.validate_inputs()
        kernels = [cutlass] if dtype == torch.float32 or "mask" in name else [cutlass, flash]
        for kernel in kernels:
            for operator in (kernel.FwOp, kernel.BwOp):
                reasons = [r for r in operator.not_supported_reasons(inputs) if not r.startswith(no_gpu)]
                assert not reasons, f"{name}: {operator.NAME}"


def test_xformers_is_asked_whether_it_has_a_kernel(xformers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card for which it has none: an explicit choice says so, before anything runs."""
    from xformers.ops import fmha
    from xformers.ops.fmha import dispatch

    asked = []

    def none(inputs: fmha.Inputs, needs_gradient: bool) -> None:
        asked.append(needs_gradient)
        raise NotImplementedError("No operator found")

    q = torch.zeros(1, 5, 2, 16, requires_grad=True)
    call = memory_efficient.Call(q, q, q, torch.zeros(1, 2, 5, 5))
    monkeypatch.setattr(memory_efficient, "_answers", {})
    monkeypatch.setattr(dispatch, "_dispatch_fw", none)
    reason = memory_efficient.why_not_kernel(call)
    assert reason is not None
    assert "no forward kernel for torch.float32, head width 16 and a Tensor as its mask" in reason
    with torch.no_grad():
        memory_efficient.why_not_kernel(call)
    assert memory_efficient.why_not_kernel(call) == reason
    assert asked == [True, False], "asked once for each kind of call"

    class Forward:
        VARLEN_LSE_PACKED = True

    monkeypatch.setattr(dispatch, "_dispatch_fw", lambda inputs, needs_gradient: Forward)
    monkeypatch.setattr(dispatch, "_dispatch_bw", none)
    monkeypatch.setattr(memory_efficient, "_answers", {})
    reason = memory_efficient.why_not_kernel(call._replace(bias=None))
    assert reason is not None
    assert "no backward kernel" in reason
    with torch.no_grad():
        assert memory_efficient.why_not_kernel(call) is None


def packed_on_gpu(dtype: torch.dtype) -> PackedInputs:
    """Tensors that say they are on a GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        qkv = torch.empty(sum(LENGTHS), 3, 2, 16, device="cuda", dtype=dtype)
    return PackedInputs(qkv, torch.tensor([0, *LENGTHS]).cumsum(0), LENGTHS, True)


@pytest.mark.parametrize(
    ("dtype", "capability", "loads", "expected"),
    [
        (torch.bfloat16, (8, 0), True, "varlen"),
        (torch.float32, (8, 0), True, "xformers"),
        (torch.float16, (7, 5), True, "xformers"),
        (torch.float32, (8, 0), False, "grouped"),
        (torch.float16, (7, 5), False, "grouped"),
    ],
)
def test_packed_attention_takes_xformers_where_flash_has_no_kernel(
    dtype: torch.dtype, capability: tuple[int, int], loads: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32, and before Ampere, where its build loads."""
    monkeypatch.setattr(machine, "assumed_capability", capability)
    monkeypatch.setattr(machine, "why_not_installed", lambda package: None)
    monkeypatch.setattr(memory_efficient, "why_not_here", lambda q: None if loads else "built for another torch")
    monkeypatch.setattr(memory_efficient, "why_not_kernel", lambda call: None)
    monkeypatch.setattr(sys.modules[PackedInputs.__module__], "_xformers_call", lambda x: None)
    assert choose(PACKED, "auto", packed_on_gpu(dtype)).name == expected


@pytest.mark.slow
def test_a_build_that_does_not_load_is_not_imported() -> None:
    """Importing xformers takes seconds, and warns where its build does not fit: its own note says so before."""
    program = """
import sys, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from distill_kernels.attention import memory_efficient
from distill_kernels.dispatch import choose
from distill_kernels.attention.packed_attention import OP, PackedInputs
memory_efficient.build = lambda: memory_efficient.Build("2.10.0+cu990", 99)
with FakeTensorMode(allow_non_fake_inputs=True):
    qkv = torch.empty(6, 3, 2, 16, device="cuda")
inputs = PackedInputs(qkv, torch.tensor([0, 2, 6]), (2, 4), True)
print(choose(OP, "auto", inputs).name, OP.get("xformers").why_not(inputs), "xformers" in sys.modules, sep="\\n")
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    name, reason, imported = done.stdout.splitlines()
    assert (name, imported) == ("grouped", "False")
    assert reason.startswith(f"its kernels are for CUDA 99 and do not load in torch {torch.__version__}, which")


@pytest.mark.parametrize(
    ("torch_version", "cuda", "reason"),
    [
        ("2.10.0+cu128", "12.8", None),
        ("2.13.0+cu126", "12.6", None),  # its ABI is stable: a later torch loads it
        ("2.13.0", "13.0", "for CUDA 12 and do not load in torch 2.13.0, which is for CUDA 13"),
        ("2.9.1+cu128", "12.8", "built for torch 2.10.0+cu128 and do not load in torch 2.9.1+cu128, which is older"),
        ("2.13.0+cpu", None, "do not load in torch 2.13.0+cpu, which has no CUDA"),
    ],
)
def test_which_torch_loads_xformers_kernels(
    torch_version: str, cuda: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_efficient, "build", lambda: memory_efficient.Build("2.10.0+cu128", 12))
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    machine.forget()
    answer = memory_efficient.why_not_built()
    machine.forget()
    assert answer is None if reason is None else reason in str(answer)


def test_the_extra_pins_a_pair_that_loads(xformers: None) -> None:
    """Its xformers is the installed one, whose own note says that it is for the pinned torch."""
    project = tomllib.loads((Path(__file__).resolve().parents[3] / "pyproject.toml").read_text())["project"]
    pins = dict(pin.split("==") for pin in project["optional-dependencies"]["gpu"])
    if version("xformers") != pins["xformers"]:
        pytest.skip(f"xformers {version('xformers')} is not the pinned {pins['xformers']}")
    built = memory_efficient.build()
    assert built is not None
    assert built.torch.startswith(pins["torch"].removesuffix("*"))


def test_named_backends_need_a_gpu() -> None:
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    y = torch.zeros(sum(LENGTHS), 3, 2, 16)
    for name in ("varlen", "xformers"):
        with pytest.raises(BackendError, match="needs tensors on a GPU, these are on cpu"):
            choose(PACKED, name, PackedInputs(y, bounds, LENGTHS, False))


def test_layouts_made_in_inference_mode_serve_training() -> None:
    """Kept layouts outlive the mode in which they were first asked for (evaluation, then training)."""
    lengths = (4, 9, 2)  # lengths of this test alone
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    qkv = torch.randn(sum(lengths), 3, 2, 8)
    with torch.inference_mode():
        first = packed_attention(qkv, bounds, backend="grouped")
    second = packed_attention(qkv.requires_grad_(), bounds, backend="grouped")
    torch.testing.assert_close(first, second)
    (gradient,) = torch.autograd.grad(second.square().sum(), qkv)
    assert (gradient.abs().sum((0, 2, 3)) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("statement", ["matmul.fp32_precision = 'tf32'", "torch.set_float32_matmul_precision('high')"])
def test_tf32_is_read_as_it_was_set(statement: str) -> None:
    """By either of torch's interfaces: reading the old one after setting the new one is an error in torch."""
    program = f"""
import torch
from distill_kernels.triton.launches import dot_precision
matmul = torch.backends.cuda.matmul
before = dot_precision()
{statement}
print(before, dot_precision())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["ieee", "tf32x3"], done.stderr
