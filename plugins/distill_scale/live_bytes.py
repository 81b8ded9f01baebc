"""The memory that a block of code holds, counted by tensors: on any device, and for tensors without values too."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors that were made while it is on and are still alive; gradients of parameters by themselves.

    What an operator uses inside itself is not seen, nor what an allocator rounds up or leaves unused.
    """

    def __init__(self, parameters: Iterable[nn.Parameter] = (), known: Iterable[Tensor] = ()) -> None:
        """`known` are tensors from before; views of them are not counted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.gradients = 0
        self.history: list[tuple[int, int]] = []
        """(other bytes, gradients' bytes) whenever one of them has grown."""
        self._moved: set[int] = set()  # storages that are gradients by now
        parameters = list(parameters)
        self._known = {tensor.untyped_storage()._cdata for tensor in [*parameters, *known]}
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._is_gradient)  # type: ignore[no-untyped-call]
            for p in parameters
            if p.requires_grad
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes()
            self._known.add(key)
            self.now += size
            self.history.append((self.now, self.gradients))
            weakref.finalize(storage, self._free, key, size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def _is_gradient(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._moved:  # added to in place
            return
        self._moved.add(key)
        self.now -= size  # until it is freed: then `_free` has taken it off twice, and this gives it back
        self.gradients += size
        self.history.append((self.now, self.gradients))
        weakref.finalize(storage, self._gradient_freed, key, size).atexit = False

    def _gradient_freed(self, key: int, size: int) -> None:
        self._moved.discard(key)
        self.now += size
        self.gradients -= size
