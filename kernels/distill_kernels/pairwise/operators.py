"""How the custom operators of the pairwise losses are made differentiable: one registration for all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.utils.flop_counter import register_flop_formula


def register_gradients(forward: CustomOpDef, backward: CustomOpDef, *, sweep_a_side: bool = False) -> None:
    """Make `forward` differentiable by `backward`, give that its fake implementation, and both their FLOPs.

    forward(x, y, *scalars, *options) -> loss, or (loss, *saved); x and y are embeddings, scalars 0-dim tensors, options
    no tensors. backward(grad, x, y, *scalars, *saved, *options) -> gradients of x, y and the scalars, contiguous.

    FLOPs are those of products, as `torch.utils.flop_counter` counts: all logits once in the forward pass, or with
    `sweep_a_side` once for each side whose log-sum-exps are asked for (`symmetric`, the last option); in the backward
    pass all logits again, and one product for each side's gradient.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        ctx.options = inputs[len(tensors) :]
        saved = output[1:] if isinstance(output, tuple) else ()
        ctx.save_for_backward(*tensors, *saved)
        ctx.mark_non_differentiable(*saved)

    def gradients(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (*backward(grad, *ctx.saved_tensors, *ctx.options), *(None for _ in ctx.options))

    def fake(grad: Tensor, x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        scalars = [t for t in rest if isinstance(t, Tensor) and t.ndim == 0]
        return (x.new_empty(x.shape), y.new_empty(y.shape), *(torch.empty_like(t) for t in scalars))

    forward.register_autograd(gradients, setup_context=setup)
    backward.register_fake(fake)

    def logits(x: torch.Size, y: torch.Size) -> int:
        return 2 * x[0] * x[1] * y[0] * y[1] * x[2]

    @register_flop_formula(_packet(forward))
    def _(x: torch.Size, y: torch.Size, *rest: Any, **_: Any) -> int:
        return logits(x, y) * (2 if sweep_a_side and rest[-1] else 1)

    @register_flop_formula(_packet(backward))
    def _(grad: torch.Size, x: torch.Size, y: torch.Size, *rest: Any, **_: Any) -> int:
        return 3 * logits(x, y)


def _packet(operator: CustomOpDef) -> Any:
    namespace, name = operator._qualname.split("::")
    return getattr(getattr(torch.ops, namespace), name)
