"""What the checks of all torch modules share."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distill_core.conformance.suite import Mend, require

Run = Callable[[nn.Module], list[Tensor]]
"""Calls a module on fixed inputs -> its outputs."""


def close(a: Iterable[Tensor], b: Iterable[Tensor], tolerance: float = 1e-4) -> bool:
    """Whether lists of tensors agree, relative to their size."""
    pairs = list(zip(a, b, strict=True))
    return all(
        x.shape == y.shape and torch.allclose(x.float(), y.float(), rtol=tolerance, atol=tolerance) for x, y in pairs
    )


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether nothing is NaN or infinite."""
    return all(bool(torch.isfinite(x.float()).all()) for x in tensors)


def generic(module: nn.Module) -> nn.Module:
    """Move the trained parameters off what they were started at: a gate of zero hides the gradient of all behind it."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype), alpha=0.02)
    return module


def require_weights(weights: Tensor, shape: list[int], mask: Tensor | None) -> None:
    """Attention weights [..., B, H, L] of this shape (0 for any H): not negative, one or less in sum, zero where the
    mask [B, L] is False."""  # fmt: skip
    wanted = [size or weights.shape[i] for i, size in enumerate(shape)] if weights.ndim == len(shape) else shape
    require(list(weights.shape) == wanted, f"attention is {list(weights.shape)}, not [..., B, H, L] = {shape} (0: any)")
    require(finite([weights]) and bool((weights >= 0).all()), "attention weights must be finite and not negative")
    require(bool((weights.sum(-1) < 1 + 1e-3).all()), "attention weights of a query are more than one in sum")
    hidden = 0.0 if mask is None else float(weights.masked_fill(mask[:, None], 0.0).abs().max())
    require(not hidden, "padded tokens have attention weights: they must be zero where the mask is False")


@contextmanager
def of_samples(batch: int) -> Iterator[None]:
    """An error of a batch of none says so."""
    try:
        yield
    except Exception as error:
        if batch:
            raise
        raise Mend(
            f"a batch of no sample (B = 0) raises {type(error).__name__}: {error}; name all sizes in a reshape, "
            "and take no maximum over samples"
        ) from error


def require_gradients(module: nn.Module, scalar: Tensor, what: str) -> None:
    """Backward from a 0-dim tensor: every trained parameter gets a finite gradient that is not all zero."""
    module.zero_grad(set_to_none=True)
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if trained:
        require(scalar.requires_grad, f"{what} carries no gradient: something detaches it (no_grad, detach, item)")
    if scalar.requires_grad:
        scalar.backward()  # type: ignore[no-untyped-call]
    unreached = [name for name, p in trained if p.grad is None or not bool((p.grad != 0).any())]
    require(
        not unreached,
        f"no gradient reaches {', '.join(unreached[:5])}: use it in {what}, or set requires_grad to False "
        "(a buffer, where it is never trained)",
    )
    broken = [name for name, p in trained if p.grad is not None and not finite([p.grad])]
    require(not broken, f"the gradient of {', '.join(broken[:5])} is not finite")


def require_state_dict(build: Callable[[], Any], run: Run) -> None:
    """A state dict that goes through a file makes another instance compute the same."""
    torch.manual_seed(1)
    one = generic(build()).eval()
    torch.manual_seed(2)
    other = build().eval()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    require(
        close(run(one), run(other)),
        "another instance with the same state dict computes something else: state outside of parameters and buffers",
    )


def require_copy(module: nn.Module, run: Run) -> None:
    """A deep copy after a step (which the teacher is) computes the same, and shares nothing."""
    before = run(module)
    copied = copy.deepcopy(module)
    require(close(before, run(copied)), "a deep copy computes something else; the teacher is such a copy")
    own = {p.data_ptr() for p in module.parameters() if p.numel()}
    shared = [name for name, p in copied.named_parameters() if p.numel() and p.data_ptr() in own]
    require(not shared, f"a deep copy shares {', '.join(shared[:3])} with the original")
