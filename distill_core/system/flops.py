"""FLOPs as torch counts them: 2 for each multiplication and addition of a product; all else is free."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.attention.varlen  # registers its operators
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def flop_counter() -> FlopCounterMode:
    """torch's counter, with attention on a CPU, which its own table lacks, and packed attention in one sum.

    Operators of plugins are counted where they have registered a formula (torch's `register_flop_formula`).
    """
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
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
    return operator in flop_registry or operator in _FORMULAS


def _attention(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]


def _attention_backward(grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, q, k, v))  # type: ignore[no-untyped-call]


def _packed(q: Tensor, k: Tensor, v: Tensor, bounds_q: Tensor, bounds_k: Tensor | None, *_: Any, **__: Any) -> int:
    return 2 * _pairs(bounds_q, bounds_k) * q.shape[1] * (q.shape[2] + v.shape[2])


def _packed_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds_q: Tensor,
    bounds_k: Tensor | None,
    *_: Any,
    **__: Any,
) -> int:
    """Weights again, their gradient, and those of queries, keys and values."""
    return 2 * _pairs(bounds_q, bounds_k) * q.shape[1] * (3 * q.shape[2] + 2 * v.shape[2])


def _pairs(bounds_q: Tensor, bounds_k: Tensor | None) -> int:
    """Of a query and a key of one sequence; sequences begin and end at bounds [N + 1]. torch's formulas add up the same
    sequence by sequence, which is most of the time of a step without values."""
    queries = np.diff(bounds_q.tolist())  # no tensors, which whoever counts memory would see
    keys = queries if bounds_k is None else np.diff(bounds_k.tolist())
    return int(queries @ keys)


_packed._get_raw = _packed_backward._get_raw = True  # type: ignore[attr-defined]  # for values, not shapes alone

_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.torch_attn._varlen_attn: _packed,
    torch.ops.torch_attn._varlen_attn_backward: _packed_backward,
}
