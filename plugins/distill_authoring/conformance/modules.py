"""What the checks of all torch modules share."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill_authoring.conformance.suite import CheckFailed, require

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
        raise CheckFailed(
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


def require_true_gradients(module: nn.Module, run: Run, leaves: Sequence[Tensor], what: str) -> None:
    """Each output's gradient is that of finite differences, for every leaf, and for the trained parameters.

    Each moves in a direction drawn for it; parameters move a few at a time. A detached branch, and a backward pass of
    one's own that is wrong, are found; the module must be smooth, and in evaluation mode.
    """
    trained: list[tuple[str, Tensor]] = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    size = -(-len(trained) // _PARTS) or 1
    parts = [trained[i : i + size] for i in range(0, len(trained), size)]
    parts += [[(f"an input {list(leaf.shape)}", leaf)] for leaf in leaves]
    draw = torch.Generator().manual_seed(11)
    outputs = run(module)
    weights = [torch.randn(x.shape, generator=draw) for x in outputs]
    moved = [x for part in parts for _, x in part]
    expected = []
    for x, weight in zip(outputs, weights, strict=True):
        require(x.requires_grad, f"an output of shape {list(x.shape)} carries no gradient: something detaches it")
        found = torch.autograd.grad((x.float() * weight).sum(), moved, retain_graph=True, allow_unused=True)
        expected.append(dict(zip(map(id, moved), found, strict=True)))
    rounding = [3e-7 * float((x.detach().float() * w).norm()) for x, w in zip(outputs, weights, strict=True)]
    for part in parts:
        directions = [(x, torch.randn(x.shape, generator=draw) * _size(x)) for _, x in part]
        sides = [_moved(module, run, directions, sign * _STEP) for sign in (1, -1)]
        for plus, minus, weight, gradients, floor in zip(*sides, weights, expected, rounding, strict=True):
            slope = float(((plus - minus) * weight).sum()) / (2 * _STEP)
            along = [gradients[id(x)] * direction for x, direction in directions if gradients[id(x)] is not None]
            gradient = sum(float(x.sum()) for x in along)
            spread = sum(float(x.square().sum()) for x in along) ** 0.5
            require(
                abs(slope - gradient) <= 0.1 * max(abs(slope), abs(gradient), spread) + 10 * floor / _STEP,
                f"an output of shape {list(plus.shape)} moves by {slope:.3g} with {', '.join(n for n, _ in part[:3])}, "
                f"and its gradient says {gradient:.3g}: something detaches it on the way to {what}, or a backward pass "
                "is wrong",
            )


_STEP = 2e-3
"""Of finite differences, in units of a tensor's own size: fp32 leaves three digits."""
_PARTS = 12
"""Into which parameters are divided, each moved by itself."""


def _size(x: Tensor) -> float:
    return max(float(x.detach().square().mean().sqrt()), 0.1)


@torch.no_grad()
def _moved(module: nn.Module, run: Run, directions: Sequence[tuple[Tensor, Tensor]], step: float) -> list[Tensor]:
    """The outputs with tensors moved along their directions, which are put back."""
    before = [x.clone() for x, _ in directions]
    for x, direction in directions:
        x.add_(direction, alpha=step)
    found = [y.float().clone() for y in run(module)]
    for (x, _), old in zip(directions, before, strict=True):
        x.copy_(old)
    return found


def tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested mappings, sequences and dataclasses, and where it is; private fields are left out."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, np.ndarray):
        yield path, torch.from_numpy(value)
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from tensors(one, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, one in enumerate(value):
            yield from tensors(one, f"{path}[{i}]")
    elif is_dataclass(value):
        for part in fields(value):
            if not part.name.startswith("_"):
                yield from tensors(getattr(value, part.name), f"{path}.{part.name}")


@contextmanager
def untouched(value: Any, path: str, who: str) -> Iterator[None]:
    """Raises `CheckFailed` where the block changes a tensor of `value`, where it is, or whether it takes a gradient."""
    before = {where: (x, x.detach().clone(), x.requires_grad, x.grad) for where, x in tensors(value, path)}
    yield
    after = dict(tensors(value, path))
    require(
        not (odd := before.keys() ^ after.keys()), f"{who} adds or takes away {min(odd, default='')}: leave it alone"
    )
    for where, (same, copied, needed, gradient) in before.items():
        x = after[where]
        kept = x is same or isinstance(value, np.ndarray) or x.data_ptr() == same.data_ptr()
        require(
            kept and x.shape == copied.shape and torch.equal(x.detach(), copied),
            f"{who} changes {where} in place, which others read: copy what you change",
        )
        require(x.requires_grad == needed, f"{who} changes whether {where} takes a gradient: leave it alone")
        require(x.grad is gradient, f"{who} leaves a gradient on {where}: call no backward pass")


def state_of(module: nn.Module) -> dict[str, tuple[Tensor, bool, bool]]:
    """Every parameter and buffer by name: a copy, whether it takes a gradient, and whether it has one."""
    found = [*module.named_parameters(), *module.named_buffers()]
    return {name: (x.detach().clone(), x.requires_grad, x.grad is not None) for name, x in found}


@contextmanager
def unmoved(module: nn.Module, who: str, *, values: bool = True) -> Iterator[None]:
    """Raises `CheckFailed` where the block changes a module's tensors (`values`), their `requires_grad` or its mode."""
    before, modes = state_of(module), [part.training for part in module.modules()]
    yield
    after = state_of(module)
    require(not (odd := before.keys() ^ after.keys()), f"{who} adds or takes away {min(odd, default='')} of the model")
    for name, (value, needed, has) in before.items():
        now, needed_now, has_now = after[name]
        require(not values or torch.equal(value, now), f"{who} changes {name} of the model")
        require(needed == needed_now, f"{who} changes whether {name} takes a gradient")
        require(has == has_now, f"{who} leaves a gradient on {name}")
    require(modes == [part.training for part in module.modules()], f"{who} changes the mode (train, eval): put it back")


def require_lets_draw(run: Callable[[], Any]) -> None:
    """Whatever is drawn after a call goes on from where the generator was: nobody seeds it in a call."""
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        run()
        drawn.append(torch.rand(4))
    require(not torch.equal(*drawn), "it seeds torch's global generator: draw from a generator of its own instead")


def require_single(outputs: Iterable[Tensor], what: str) -> None:
    """fp32 in, fp32 out."""
    wrong = next((x.dtype for x in outputs if x.dtype != torch.float32), None)
    require(wrong is None, f"{what} is {wrong}, with weights and inputs in float32 and no autocast")


def require_state_dict(build: Callable[[], Any], run: Run, fresh: Callable[[], Any] | None = None) -> None:
    """A state dict that goes through a file makes another instance compute the same, after two calls in training.

    `fresh` builds the other instance, where `build` does more.
    """
    torch.manual_seed(1)
    one = generic(build()).train()
    for _ in range(2):
        run(one)
    one.eval()
    torch.manual_seed(2)
    other = (fresh or build)().eval()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    require(
        close(run(one), run(other)),
        "another instance with the same state dict computes something else: state outside of parameters and buffers",
    )


def require_copy(module: nn.Module, run: Run) -> None:
    """A deep copy after a step (which the teacher is) computes the same, shares nothing, and needs no gradient."""
    before = run(module)
    copied = copy.deepcopy(module).requires_grad_(False)
    require(close(before, run(copied)), "a deep copy computes something else; the teacher is such a copy")
    own = {p.data_ptr() for p in module.parameters() if p.numel()}
    shared = [name for name, p in copied.named_parameters() if p.numel() and p.data_ptr() in own]
    require(not shared, f"a deep copy shares {', '.join(shared[:3])} with the original")
    with torch.no_grad(), unmoved(copied, "a call without gradients, as the teacher's,"):
        found = run(copied)
        require(not any(x.requires_grad for x in found), "the teacher's outputs carry a gradient: turn none on")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        require(
            close(found, run(copied)),
            "a deep copy changes with the original: it still calls the original's modules (a closure, a bound method)",
        )
