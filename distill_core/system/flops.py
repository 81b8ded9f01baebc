"""FLOPs as torch counts them: 2 for each multiplication and addition of a product; all else is free."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def flop_counter() -> FlopCounterMode:
    """torch's counter, with attention on a CPU, which its own table lacks.

    Operators of plugins are counted where they have registered a formula (torch's `register_flop_formula`).
    """
    counter = FlopCounterMode(display=False, custom_mapping=_ON_CPU)
    # it has copied torch's table, and would miss an operator that is only imported when it is first called
    counter.flop_registry = ChainMap(counter.flop_registry, flop_registry)  # type: ignore[assignment]
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


class _NoModules:
    """In place of the tracker of modules, which holds the graph of what is computed again in a backward pass."""

    parents = ("Global",)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def has_formula(operator: Any) -> bool:
    """Whether the counter knows this operator (an `OpOverloadPacket`)."""
    return operator in flop_registry or operator in _ON_CPU


def _attention(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]


def _attention_backward(grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, q, k, v))  # type: ignore[no-untyped-call]


_ON_CPU: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
