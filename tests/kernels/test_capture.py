"""What a CUDA graph cannot hold, looked for without a GPU: reads on the host, copies between devices, results whose
size depends on values. Every op runs forward and backward on meta tensors, which have no values to read, the bodies of
custom operators too; Triton's kernels are launched into the void. Captured for real they never were."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill_kernels import cross_attention, cross_attention_pool, packed_attention, self_attention
from distill_kernels.pairwise.info_nce import multi_view_info_nce
from distill_kernels.pairwise.sigmoid_loss import multi_view_sigmoid

triton = pytest.importorskip("triton")


class NotCapturable(Exception):
    """An operator that a CUDA graph cannot hold."""


class Capture(TorchDispatchMode):
    """Runs our custom operators' own bodies in place of their fakes, and refuses what cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "distill":
            name = func._schema.name
            self.bodies.add(name)
            with self:
                return OPDEFS[name]._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)  # meta tensors themselves refuse .item(), and sizes that depend on values
        before, after = ({x.device.type for x in tree_leaves(part) if isinstance(x, Tensor)} for part in (args, out))
        if before and after - before:
            raise NotCapturable(f"{func} copies from {before} to {after}")
        return out


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of Triton's kernels that would have run."""
    names: list[str] = []
    kernels = type(triton.jit(lambda: None))  # compiled, or interpreted
    monkeypatch.setattr(kernels, "run", lambda kernel, *args, **kwargs: names.append(kernel.fn.__name__))
    return names


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Capture]:
    ops = ("attention.cross_attention", "attention.self_attention", "pairwise.info_nce", "pairwise.sigmoid_loss")
    for module in ops:  # the backend that is named
        chosen = importlib.import_module(f"distill_kernels.{module}")
        monkeypatch.setattr(chosen, "choose", lambda op, backend, inputs: op.get(backend))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # meta tensors know no autocast
    monkeypatch.setattr(torch, "autocast", lambda device, **options: nullcontext())
    for name in ("tensor", "as_tensor"):  # no mode sees what they copy
        monkeypatch.setattr(torch, name, functools.partial(copied, getattr(torch, name)))
    with Capture() as mode:
        yield mode


def copied(make: Callable[..., Tensor], values: Any, **options: Any) -> Tensor:
    if not isinstance(values, Tensor) and torch.device(options.get("device") or "cpu").type != "cpu":
        raise NotCapturable(f"{make.__name__} copies values to {options['device']}")
    return make(values, **options)


def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def attention(backend: str, valid: str) -> Tensor:
    q, k, v = new(4, 2, 8, 32), new(4, 2, 77, 32), new(4, 2, 77, 32)
    return cross_attention(q, k, v, **only(valid), backend=backend)


def only(valid: str) -> dict[str, Tensor]:
    if valid == "lengths":
        return {"lengths": torch.empty(4, dtype=torch.long, device="meta")}
    return {"mask": torch.empty(4, 77, dtype=torch.bool, device="meta")} if valid == "mask" else {}


def pool(backend: str, attention: str, valid: str) -> Tensor:
    d = 64
    shapes = {
        "ln_q_weight": (d,),
        "ln_q_bias": (d,),
        "ln_k_weight": (d,),
        "ln_k_bias": (d,),
        "in_proj_weight": (3 * d, d),
    }
    shapes |= {"in_proj_bias": (3 * d,), "out_proj_weight": (d, d), "out_proj_bias": (d,)}
    weights = {name: new(*shape, dtype=torch.float32) for name, shape in shapes.items()}
    return cross_attention_pool(
        new(8, 4, d), new(4, 77, d), **weights, heads=2, **only(valid), backend=backend, attention=attention
    )


def loss(op: Callable[..., Tensor], backend: str, gathered: bool) -> Tensor:
    a, b = new(2, 16, 64), new(8, 16, 64)
    scalars = [new(dtype=torch.float32) for _ in range(2 if op is multi_view_sigmoid else 1)]
    every = {"b_all": new(8, 32, 64), "offset": 16} if gathered else {}
    if gathered and op is multi_view_info_nce:
        every["a_all"] = new(2, 32, 64)
    return op(a, b, *scalars, backend=backend, **every)


CASES: dict[str, Callable[[], Tensor]] = {}
for valid in ("all", "lengths", "mask"):
    for backend in ("reference", "matmul", "sdpa", "triton"):
        CASES[f"cross_attention-{backend}-{valid}"] = functools.partial(attention, backend, valid)
    for form, backend in (("reference", "auto"), ("absorbed", "auto"), ("projected", "sdpa"), ("projected", "triton")):
        CASES[f"pool-{form}-{backend}-{valid}"] = functools.partial(pool, form, backend, valid)
for op in (multi_view_info_nce, multi_view_sigmoid):
    for backend in ("reference", "chunked", "triton"):
        for gathered in (False, True):
            CASES[f"{op.__name__}-{backend}-{gathered}"] = functools.partial(loss, op, backend, gathered)
for backend in ("reference", "explicit", "sdpa"):
    qkv = functools.partial(new, 4, 2, 77, 32)
    CASES[f"self_attention-{backend}"] = lambda qkv=qkv, backend=backend: self_attention(
        qkv(), qkv(), qkv(), causal=False, backend=backend
    )


@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_stay_on_the_device(case: str, capture: Capture, launched: list[str]) -> None:
    out = CASES[case]()
    assert out.device.type == "meta"
    out.float().sum().backward()
    if "triton" in case:
        assert len(launched) >= 2, "a kernel each way"
        assert len(capture.bodies) >= 2, "the operators' bodies were looked at"


def test_what_cannot_be_captured_is_seen(capture: Capture) -> None:
    """The test's own test: a copy to the host, a value read there, a size that depends on values; and the packed
    towers, whose lengths are read on the host, as docs/architecture.md says."""
    x = new(4, 8)
    with pytest.raises(NotImplementedError, match="meta"):
        x.cpu()
    with pytest.raises(RuntimeError, match="meta"):
        x.sum().item()
    with pytest.raises(NotImplementedError, match="nonzero"):
        x.detach().nonzero()
    with pytest.raises(NotCapturable, match=r"copies from {'cpu'} to {'meta'}"):
        x.detach() + torch.ones(4, 8).to("meta")
    with pytest.raises(NotCapturable, match="tensor copies values"):
        x.detach() + torch.tensor([0.0], device=x.device)
    qkv = new(20, 3, 2, 32)
    with pytest.raises(NotImplementedError, match="meta"):
        packed_attention(qkv, torch.empty(5, dtype=torch.int32, device="meta"))
