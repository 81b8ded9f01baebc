"""Counts what ranks exchange."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collectives(TorchDispatchMode):
    """While it is entered, `calls` takes (name, bytes of its largest tensor) of each of this thread's collectives.

    For a gather that is what comes in, for a reduce-scatter what goes out: of all ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            name = func.overloadpacket.__name__.strip("_")
            self.calls.append((name, max((x.numel() * x.element_size() for x in tensors), default=0)))
        return func(*args, **(kwargs or {}))
