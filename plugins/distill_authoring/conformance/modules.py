"""Helpers for the checks of torch modules: gradients, state, copies, and inputs that must not change."""

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
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from distill_authoring.conformance.suite import CheckFailed, NotApplicable, require
from distill_core import UserError
from distill_core.tools import compile_unit, one_graph_each

Run = Callable[[nn.Module], list[Tensor]]
"""Calls a module on fixed inputs -> its outputs."""


def close(a: Iterable[Tensor], b: Iterable[Tensor], tolerance: float = 1e-4) -> bool:
    """Whether lists of tensors agree in shape and, relative to their size, in value."""
    pairs = list(zip(a, b, strict=True))
    return all(
        x.shape == y.shape and torch.allclose(x.float(), y.float(), rtol=tolerance, atol=tolerance) for x, y in pairs
    )


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether nothing is NaN or infinite."""
    return all(bool(torch.isfinite(x.float()).all()) for x in tensors)


def generic(module: nn.Module) -> nn.Module:
    """Perturb the trained parameters: a gate that is initially zero hides the gradient of everything after it."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype), alpha=0.02)
    return module


def require_weights(weights: Tensor, shape: list[int], mask: Tensor | None) -> None:
    """Require attention weights [..., B, H, L] of this shape (0 for any H): not negative, sum at most 1, zero where
    the mask [B, L] is False."""  # fmt: skip
    expected = [size or weights.shape[i] for i, size in enumerate(shape)] if weights.ndim == len(shape) else shape
    require(
        list(weights.shape) == expected, f"attention is {list(weights.shape)}, not [..., B, H, L] = {shape} (0: any)"
    )
    require(finite([weights]) and bool((weights >= 0).all()), "attention weights must be finite and not negative")
    require(bool((weights.sum(-1) < 1 + 1e-3).all()), "the attention weights of a query sum to more than 1")
    hidden = 0.0 if mask is None else float(weights.masked_fill(mask[:, None], 0.0).abs().max())
    require(not hidden, "padded tokens have attention weights: they must be zero where the mask is False")


@contextmanager
def of_samples(batch: int) -> Iterator[None]:
    """Explains an error that occurs with a batch of no sample."""
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
        "(or make it a buffer, if it is never trained)",
    )
    broken = [name for name, p in trained if p.grad is not None and not finite([p.grad])]
    require(not broken, f"the gradient of {', '.join(broken[:5])} is not finite")


def require_true_gradients(module: nn.Module, run: Run, leaves: Sequence[Tensor], what: str) -> None:
    """Each output's gradient equals that of finite differences, for every leaf and the trained parameters.

    Each tensor moves in a random direction, parameters a few at a time. This finds a detached branch, and a wrong
    custom backward pass; the module must be smooth, and in evaluation mode.
    """
    trained: list[tuple[str, Tensor]] = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    size = -(-len(trained) // _PARTS) or 1
    parts = [trained[i : i + size] for i in range(0, len(trained), size)]
    parts += [[(f"an input {list(leaf.shape)}", leaf)] for leaf in leaves]
    draw = torch.Generator().manual_seed(11)
    outputs = run(module)
    weights = [torch.randn(x.shape, generator=draw) for x in outputs]
    tensors_moved = [x for part in parts for _, x in part]
    expected = []
    for x, weight in zip(outputs, weights, strict=True):
        require(x.requires_grad, f"an output of shape {list(x.shape)} carries no gradient: something detaches it")
        of_output = torch.autograd.grad((x.float() * weight).sum(), tensors_moved, retain_graph=True, allow_unused=True)
        expected.append(dict(zip(map(id, tensors_moved), of_output, strict=True)))
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
"""Step of finite differences, relative to a tensor's scale: fp32 leaves three digits."""
_PARTS = 12
"""Number of groups of parameters, each moved separately."""


def _size(x: Tensor) -> float:
    return max(float(x.detach().square().mean().sqrt()), 0.1)


@torch.no_grad()
def _moved(module: nn.Module, run: Run, directions: Sequence[tuple[Tensor, Tensor]], step: float) -> list[Tensor]:
    """The outputs with tensors moved along their directions; the tensors are restored."""
    originals = [x.clone() for x, _ in directions]
    for x, direction in directions:
        x.add_(direction, alpha=step)
    outputs = [y.float().clone() for y in run(module)]
    for (x, _), old in zip(directions, originals, strict=True):
        x.copy_(old)
    return outputs


def tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of every tensor in nested mappings, sequences and dataclasses, without private fields."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, np.ndarray):
        yield path, torch.from_numpy(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from tensors(item, f"{path}[{i}]")
    elif is_dataclass(value):
        for part in fields(value):
            if not part.name.startswith("_"):
                yield from tensors(getattr(value, part.name), f"{path}.{part.name}")


@contextmanager
def untouched(value: Any, path: str, who: str) -> Iterator[None]:
    """Raises `CheckFailed` if the block changes or replaces a tensor of `value`, or changes its `requires_grad`."""
    originals = {where: (x, x.detach().clone(), x.requires_grad, x.grad) for where, x in tensors(value, path)}
    yield
    after = dict(tensors(value, path))
    require(
        not (odd := originals.keys() ^ after.keys()),
        f"{who} adds or removes {min(odd, default='')}: leave it unchanged",
    )
    for where, (original, snapshot, requires_grad, gradient) in originals.items():
        x = after[where]
        in_place = x is original or isinstance(value, np.ndarray) or x.data_ptr() == original.data_ptr()
        require(
            in_place and x.shape == snapshot.shape and torch.equal(x.detach(), snapshot),
            f"{who} changes {where} in place, which others read: copy before you change",
        )
        require(x.requires_grad == requires_grad, f"{who} changes requires_grad of {where}: leave it unchanged")
        require(x.grad is gradient, f"{who} leaves a gradient on {where}: do not call backward")


def state_of(module: nn.Module) -> dict[str, tuple[Tensor, bool, bool]]:
    """Every parameter and buffer by name: a copy, its `requires_grad`, and whether it has a gradient."""
    tensors_by_name = [*module.named_parameters(), *module.named_buffers()]
    return {name: (x.detach().clone(), x.requires_grad, x.grad is not None) for name, x in tensors_by_name}


@contextmanager
def unmoved(module: nn.Module, who: str, *, values: bool = True) -> Iterator[None]:
    """Raises `CheckFailed` if the block changes a module's tensors (`values`), their `requires_grad` or its mode."""
    original, modes = state_of(module), [part.training for part in module.modules()]
    yield
    after = state_of(module)
    require(not (odd := original.keys() ^ after.keys()), f"{who} adds or removes {min(odd, default='')} of the model")
    for name, (value, requires_grad, has_gradient) in original.items():
        value_after, requires_grad_after, has_gradient_after = after[name]
        require(not values or torch.equal(value, value_after), f"{who} changes {name} of the model")
        require(requires_grad == requires_grad_after, f"{who} changes requires_grad of {name}")
        require(has_gradient == has_gradient_after, f"{who} leaves a gradient on {name}")
    require(modes == [part.training for part in module.modules()], f"{who} changes the mode (train, eval): restore it")


def require_lets_draw(run: Callable[[], Any]) -> None:
    """A call does not seed torch's global generator: draws after it continue from its state before."""
    draws = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        run()
        draws.append(torch.rand(4))
    require(not torch.equal(*draws), "it seeds torch's global generator: draw from a separate generator instead")


def weighted_sum(outputs: Iterable[Tensor]) -> Tensor:
    """A number that depends on every value of the outputs, with fixed random weights."""
    draw = torch.Generator().manual_seed(5)
    return torch.stack([(x.float() * torch.randn(x.shape, generator=draw)).mean() for x in outputs]).sum()


def require_autocast(run: Callable[[], list[Tensor]]) -> None:
    """bf16 autocast runs forward and backward, and each output stays near that of fp32, by the cosine of its values."""
    with torch.no_grad():
        full = run()
    with torch.autocast("cpu", torch.bfloat16):
        half = run()
    torch.stack([x.float().mean() for x in half]).sum().backward()  # type: ignore[no-untyped-call]
    require(finite(half), "an output is not finite under bf16 autocast")
    for a, b in zip(half, full, strict=True):
        require(a.shape == b.shape, "an output has another shape under bf16 autocast")
        cosine = float(nn.functional.cosine_similarity(a.float().flatten(), b.float().flatten(), dim=0))
        require(cosine > 0.98, f"bf16 autocast is far from fp32 (cosine {cosine:.3f})")


def require_units(module: Any, run: Callable[[], list[Tensor]]) -> None:
    """Each of `units()` is entered by `forward` alone, is one graph, computes the same compiled, and keeps its names.

    `run` calls the module (in evaluation mode) on fixed inputs. Raises `NotApplicable` where there are no units.
    """
    units, names = list(module.units()), {id(part): name or "itself" for name, part in module.named_modules()}
    if not units:
        raise NotApplicable("it has no units: it runs as it is under train.parallel.compile")
    strangers = [type(unit).__name__ for unit in units if id(unit) not in names]
    require(not strangers, f"`units` names {', '.join(strangers)}, which is no part of it")
    require(len({id(unit) for unit in units}) == len(units), "`units` names a part twice")
    with _Entries(units) as entries:
        expected = _outputs_and_gradients(module, run)
    for unit in units:
        name = f"unit {names[id(unit)]!r}"
        require(entries.count[id(unit)] > 0, f"{name} is not called in a step: call the module, not a method of it")
        used = entries.used_outside.get(id(unit))
        require(
            used is None, f"{name} has a parameter that is used outside its `forward` ({used}): enter it by `forward`"
        )
    parameters = list(module.state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        for unit in units:
            compile_unit(unit, "aot_eager")
        with one_graph_each():
            values, gradients = _outputs_and_gradients(module, run)
    except UserError as error:
        raise CheckFailed(str(error)) from error
    finally:
        breaks = dict(torch._dynamo.utils.counters["graph_break"])
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        torch._dynamo.reset()
    require(graphs > 0 and not breaks, f"the units are not one graph each: {breaks or 'no graph'}")
    require(list(module.state_dict()) == parameters, "compiling its units changes the names of its parameters")
    require(close(values, expected[0]), "compiled, its outputs differ")
    scale = max((float(gradient.norm()) for gradient in expected[1].values()), default=0.0)
    for name, gradient in expected[1].items():
        off = float((gradients[name] - gradient).norm())
        require(off <= 1e-3 * float(gradient.norm()) + 1e-6 * scale, f"compiled, the gradient of {name!r} differs")


def _outputs_and_gradients(
    module: nn.Module, run: Callable[[], list[Tensor]]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    module.zero_grad(set_to_none=True)
    outputs, draw = run(), torch.Generator().manual_seed(5)
    learned = [(x.float() * torch.randn(x.shape, generator=draw)).sum() for x in outputs if x.requires_grad]
    if learned:
        torch.stack(learned).sum().backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return [x.detach().clone() for x in outputs], gradients


class _Entries(TorchFunctionMode):
    """Counts the calls of some modules, and notes what uses a parameter of one outside its `forward`."""

    def __init__(self, units: Sequence[nn.Module]) -> None:
        super().__init__()
        self.count = {id(unit): 0 for unit in units}
        self.used_outside: dict[int, str] = {}
        self._open: list[int] = []
        # those of one element stay whole on every rank: code outside may read them
        self._owner = {id(p): id(unit) for unit in units for p in unit.parameters() if p.numel() > 1}
        self._hooks = [unit.register_forward_pre_hook(self._enter) for unit in units]
        self._hooks += [unit.register_forward_hook(self._leave) for unit in units]

    def _enter(self, unit: nn.Module, arguments: Any) -> None:
        self.count[id(unit)] += 1
        self._open.append(id(unit))

    def _leave(self, unit: nn.Module, arguments: Any, out: Any) -> None:
        self._open.remove(id(unit))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name not in ("__get__", "__set__"):  # an attribute, as its shape or its gradient
            for x in tree_leaves((args, kwargs or {})):
                owner = self._owner.get(id(x))
                if owner is not None and owner not in self._open:
                    self.used_outside.setdefault(owner, name)
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]


def require_single(outputs: Iterable[Tensor], what: str) -> None:
    """Outputs are fp32 for fp32 inputs and weights."""
    wrong = next((x.dtype for x in outputs if x.dtype != torch.float32), None)
    require(wrong is None, f"{what} is {wrong}, with weights and inputs in float32 and no autocast")


def require_state_dict(build: Callable[[], Any], run: Run, fresh: Callable[[], Any] | None = None) -> None:
    """Another instance that loads the state dict from a file computes the same, after two calls in training mode.

    `fresh` builds the other instance, if `build` does more than construct it.
    """
    torch.manual_seed(1)
    module = generic(build()).train()
    for _ in range(2):
        run(module)
    module.eval()
    torch.manual_seed(2)
    loaded = (fresh or build)().eval()
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    require(
        close(run(module), run(loaded)),
        "another instance with the same state dict computes different outputs: it has state outside of parameters and "
        "buffers",
    )


def require_copy(module: nn.Module, run: Run) -> None:
    """A deep copy (such as the teacher) computes the same, shares nothing, and needs no gradient."""
    expected = run(module)
    duplicate = copy.deepcopy(module).requires_grad_(False)
    require(close(expected, run(duplicate)), "a deep copy computes different outputs; the teacher is such a copy")
    addresses = {p.data_ptr() for p in module.parameters() if p.numel()}
    shared = [name for name, p in duplicate.named_parameters() if p.numel() and p.data_ptr() in addresses]
    require(not shared, f"a deep copy shares {', '.join(shared[:3])} with the original")
    with torch.no_grad(), unmoved(duplicate, "a call without gradients, as the teacher's,"):
        outputs = run(duplicate)
        require(
            not any(x.requires_grad for x in outputs), "the teacher's outputs carry a gradient: do not enable gradients"
        )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        require(
            close(outputs, run(duplicate)),
            "a deep copy changes with the original: it still calls the original's modules (a closure, a bound method)",
        )
