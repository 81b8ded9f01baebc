"""How the custom operators of the pairwise losses are made differentiable: one registration for all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef


def register_gradients(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Make `forward` differentiable by `backward`, and give that its fake implementation.

    forward(x, y, *scalars, *options) -> loss, or (loss, *kept); x and y are embeddings, scalars 0-dim tensors, options
    no tensors. backward(grad, x, y, *scalars, *kept, *options) -> gradients of x, y and the scalars, contiguous.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        ctx.options = inputs[len(tensors) :]
        kept = output[1:] if isinstance(output, tuple) else ()
        ctx.save_for_backward(*tensors, *kept)
        ctx.mark_non_differentiable(*kept)

    def gradients(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (*backward(grad, *ctx.saved_tensors, *ctx.options), *(None for _ in ctx.options))

    def fake(grad: Tensor, x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        scalars = [t for t in rest if isinstance(t, Tensor) and t.ndim == 0]
        return (x.new_empty(x.shape), y.new_empty(y.shape), *(torch.empty_like(t) for t in scalars))

    forward.register_autograd(gradients, setup_context=setup)
    backward.register_fake(fake)
