"""A GPU that is not there, for `pytest -p pretend_gpu tests/gpu`: what would fail on arrival fails here.

Tensors made on or copied to "cuda" lie in the CPU's memory, and say that they are on cuda:0; so do all computed from
them. What a GPU refuses is refused: an operator on tensors of both. torch's CUDA interface is stood in for, with its
signatures: streams and events order nothing, a graph runs its operators again, varlen attention is plain maths, NCCL is
gloo. Triton's kernels run in the interpreter. What it cannot show: kernels, their numbers, and races.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.attention.varlen
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ATEN = torch.ops.aten
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
COPIES = {ATEN.copy_, ATEN._to_copy, ATEN.set_}
INDEXING = {ATEN.index, ATEN.index_put, ATEN.index_put_}
"""Operators that take tensors of the host as well."""


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Memory(TorchDispatchMode):
    """Which storages are the GPU's."""

    def __init__(self) -> None:
        super().__init__()
        self.here: dict[int, Any] = {}  # kept, so that no address is used again
        self.called = False  # whether torch runs a function of tensors that lie here

    def holds(self, tensor: Tensor) -> bool:
        return storage(tensor) in self.here

    def take(self, *tensors: Tensor) -> None:
        self.here |= {storage(tensor): tensor.untyped_storage() for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = [x for x in tensors if self.holds(x)]
        if func.overloadpacket in INDEXING:
            tensors = tensors[:1] if self.holds(tensors[0]) else tensors
        elif func.overloadpacket in COPIES:
            tensors = ours
        strangers = [x for x in tensors if not self.holds(x) and x.ndim > 0]
        if ours and strangers:
            shapes = [tuple(x.shape) for x in strangers]
            raise RuntimeError(f"{func}: expected all tensors on one device, but {shapes} are on the CPU")
        if func.namespace == "distill":
            with self:  # its body is looked at as well
                out = OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        if (ours and func.overloadpacket is not ATEN.copy_) or (self.called and not tensors):
            self.take(*(x for x in tree_leaves(out) if isinstance(x, Tensor)))
        return out


memory = Memory()


def is_cuda(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.split(":")[0] == "cuda"
    )


class Devices(TorchFunctionMode):
    """Arguments that say "cuda" say "cpu" to torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.get_device:
            return 0 if memory.holds(args[0]) else -1
        if func is torch.mm and "out_dtype" in kwargs:
            dtype = kwargs.pop("out_dtype")
            return torch.mm(*(x.to(dtype) for x in args))
        if func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        moved = func in (Tensor.to, Tensor.cpu, Tensor.cuda)
        values = [*args[moved:], *kwargs.values()]
        where = _named(values)
        if moved:
            like = next((x for x in values if isinstance(x, Tensor)), None)
            where = {Tensor.cpu: CPU, Tensor.cuda: CUDA}.get(func, where if like is None else like.device)
        args = tuple(CPU if is_cuda(x) else x for x in args)
        kwargs = {name: CPU if is_cuda(x) else x for name, x in kwargs.items()}
        if moved and where is not None and where.type != args[0].device.type:
            args, kwargs = (args, kwargs) if func is Tensor.to else ((args[0], CPU), {})
            out = Tensor.to(*args, **kwargs | {"copy": True})
            memory.take(out) if where == CUDA else memory.here.pop(storage(out), None)
            return out
        if func in (Tensor.cpu, Tensor.cuda):
            return args[0]
        outer = memory.called
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        memory.called = where == CUDA or any(map(memory.holds, tensors))
        try:
            out = func(*args, **kwargs)
        finally:
            memory.called = outer
        for tensor in (x for x in tree_leaves(out) if isinstance(x, Tensor) and not moved):
            if where == CUDA:
                memory.take(tensor)
            elif where == CPU:
                memory.here.pop(storage(tensor), None)
        return out


def _named(values: list[Any]) -> torch.device | None:
    """The device among some arguments."""
    for value in values:
        if is_cuda(value):
            return CUDA
        if value == "cpu" if isinstance(value, str) else isinstance(value, torch.device):
            return CPU
    return None


class Stream:
    """Of `torch.cuda`, which orders nothing here."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        assert device is None or is_cuda(device)

    def wait_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)

    def synchronize(self) -> None: ...


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.recorded = False

    def record(self, stream: Stream | None = None) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded


class Graph(TorchDispatchMode):
    """A CUDA graph: the operators of its capture, which `replay` runs again into the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket is not ATEN._local_scalar_dense, "a captured graph reads no value"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, *tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}, out))))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and storage(old) != storage(new):
                    old.copy_(new)


def varlen_attn(*args: Any, **options: Any) -> Tensor:
    *qkv, bounds, of_keys, longest, _ = args
    assert {t.dtype for t in qkv} <= {torch.bfloat16, torch.float16}
    assert bounds.dtype == torch.int32
    assert bounds.device == of_keys.device == qkv[0].device
    outs = []
    for start, end in pairwise(bounds.tolist()):
        assert end - start <= longest
        q, k, v = (t[start:end].transpose(0, 1) for t in qkv)  # [H, L, K]
        causal = options["window_size"] == (-1, 0)
        outs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(0, 1))
    return torch.cat(outs)


def stand_in(module: Any, name: str, stand: Callable[..., Any]) -> None:
    """`stand` for a function of torch's, called only as that can be."""
    signature = inspect.signature(getattr(module, name))

    def checked(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)
        return stand(*args, **kwargs)

    checked.__signature__ = signature  # type: ignore[attr-defined]
    setattr(module, name, checked)


def on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda device, *args, **kwargs: function("cpu" if is_cuda(device) else device, *args, **kwargs)


@contextlib.contextmanager
def capture(cuda_graph: Graph, *args: Any, **kwargs: Any) -> Iterator[None]:
    with cuda_graph:
        yield


def named_launches() -> None:
    """Interpreted kernels are events of the profiler, as launched ones are."""
    import triton
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def named(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(self.fn.__name__):
            return run(self, *args, **kwargs)

    assert triton.knobs.runtime.interpret
    GridExecutor.__call__ = named


def install() -> None:
    stand_in(torch.cuda, "is_available", lambda: True)
    stand_in(torch.cuda, "device_count", lambda: 1)
    stand_in(torch.cuda, "current_device", lambda: 0)
    stand_in(torch.cuda, "set_device", lambda device: None)
    stand_in(torch.cuda, "synchronize", lambda device=None: None)
    stand_in(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    stand_in(torch.cuda, "get_device_name", lambda device=None: "a pretended GPU")
    stand_in(torch.cuda, "get_device_properties", lambda device=None: mock.Mock(total_memory=80 * 2**30))
    stand_in(torch.cuda, "current_stream", lambda device=None: Stream())
    stand_in(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    stand_in(torch.cuda, "get_rng_state", lambda device="cuda": torch.get_rng_state())
    stand_in(torch.cuda, "set_rng_state", lambda state, device="cuda": None)
    for name in ("max_memory_allocated", "memory_allocated", "max_memory_reserved", "memory_reserved"):
        stand_in(torch.cuda, name, lambda device=None: 0)
    stand_in(torch.cuda, "reset_peak_memory_stats", lambda device=None: None)
    stand_in(torch.cuda, "device_of", lambda obj: contextlib.nullcontext())
    for name, stand in (("Stream", Stream), ("Event", Event), ("CUDAGraph", Graph), ("graph", capture)):
        setattr(torch.cuda, name, stand)
    # the profiler of a torch without CUDA does not come back from being asked for it
    profile, cpu = torch.profiler.profile, [torch.profiler.ProfilerActivity.CPU]
    stand_in(torch.profiler, "profile", lambda *, activities, **options: profile(activities=cpu, **options))
    torch.version.cuda = "13.0"  # for which xformers was not built: it takes seconds to import
    stand_in(torch.nn.attention.varlen, "varlen_attn", varlen_attn)

    Tensor.record_stream = lambda self, stream: None if isinstance(stream, Stream) else 1 / 0  # type: ignore[assignment]
    Tensor.device = property(lambda self: CUDA if memory.holds(self) else CPU)  # type: ignore[assignment, misc]
    Tensor.is_cuda = property(memory.holds)  # type: ignore[assignment, arg-type]
    autocast = torch.amp.autocast_mode.autocast
    autocast.__init__ = functools.partialmethod(  # type: ignore[method-assign]
        lambda self, start, device_type, *args, **kwargs: start(
            self, "cpu" if is_cuda(device_type) else device_type, *args, **kwargs
        ),
        autocast.__init__,
    )
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        setattr(torch, name, on_cpu(getattr(torch, name)))
    start = dist.init_process_group

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        start("gloo" if backend and "nccl" in backend else backend, *args, **kwargs)

    init_process_group.__signature__ = inspect.signature(start)  # type: ignore[attr-defined]
    dist.init_process_group = init_process_group
    stand_in(dist, "is_nccl_available", lambda: True)
    named_launches()
    memory.__enter__()
    Devices().__enter__()


install()


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Few samples and layers: the interpreter is slow."""
    small = ["backbone.image.layers=2", "backbone.text.layers=1"]
    for module in {item.module for item in items}:
        if hasattr(module, "H"):
            module.H = 1
        if hasattr(module, "SAMPLES"):
            module.SAMPLES = 2
        if hasattr(module, "load_recipe"):
            module.load_recipe = lambda *args, overrides=(), load=module.load_recipe, **kwargs: load(
                *args, overrides=[*overrides, *small], **kwargs
            )
