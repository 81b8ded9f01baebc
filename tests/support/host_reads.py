"""What the host would read of a device, counted on a CPU.

Tensors that are marked stand for those of a GPU, and so does everything computed from one.
"""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ATEN = torch.ops.aten
WAITS = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal, ATEN._unique2, ATEN.bincount}
"""Operators whose result, or its shape, the host has to know."""
READS = {Tensor.tolist, Tensor.numpy, Tensor.item, Tensor.cpu, Tensor.__bool__, Tensor.__int__, Tensor.__float__}
READS |= {Tensor.__index__, Tensor.__array__, Tensor.__repr__}
"""What reads a tensor without an operator where it is on the CPU."""


class HostReads(TorchDispatchMode):
    """`with HostReads() as reads: reads.mark(tensor)`; then `reads.lines`, where in our code each read stands."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._memory: dict[int, Any] = {}  # storages of the "device", kept so that no address is used again
        self._methods = _Methods(self)

    def mark(self, *tensors: Tensor) -> None:
        """They are on the device."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._memory[storage._cdata] = storage

    def on_device(self, value: object) -> bool:
        """Whether it is marked, or computed from what is."""
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in self._memory

    def note(self) -> None:
        """A read, here."""
        frames = [f for f in traceback.extract_stack() if "site-packages" not in f.filename and f.filename != __file__]
        self.lines.append(f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}")

    def __enter__(self) -> HostReads:
        super().__enter__()
        self._methods.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._methods.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        marked = any(self.on_device(x) for x in tree_leaves((args, kwargs)))
        masks = func.overloadpacket in (ATEN.index, ATEN.index_put, ATEN.index_put_) and any(
            isinstance(x, Tensor) and x.dtype == torch.bool for x in args[1]
        )
        if marked and (masks or func.overloadpacket in WAITS):
            self.note()
        out = func(*args, **kwargs)
        if marked:
            self.mark(*(x for x in tree_leaves(out) if isinstance(x, Tensor)))
        return out


class _Methods(TorchFunctionMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS and self.reads.on_device(args[0]):
            before = len(self.reads.lines)
            out = func(*args, **(kwargs or {}))
            del self.reads.lines[before:]  # an operator of the same read
            self.reads.note()
            return out
        return func(*args, **(kwargs or {}))
