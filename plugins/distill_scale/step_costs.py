"""What one step costs: FLOPs by part, the memory that it holds, the bytes that its losses gather.

The step is that of the recipe on tensors without values, so that no data, weights or GPU are needed and a batch of
thousands costs as little as one of two. Ranks are there in name only: a process group whose collectives do nothing.

Losses are cut off from the towers: towers forward, losses forward and backward down to the embeddings, towers backward.
The number of ranks changes the losses alone, so that they run once for each number, and the towers once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distill_core import Batch, Features, Fused, Group, Objective, Outputs, Progress, UserError, Views
from distill_core.tools import (
    ParallelConfig,
    Recipe,
    WithoutValues,
    build_objective,
    example_batch,
    flop_counter,
    has_formula,
    lay_out,
    set_matmul_precision,
)
from distill_kernels.choices import recorded
from distill_scale.live_bytes import LiveBytes

T = TypeVar("T")
Tokens = Mapping[str, int]
"""`MODALITY` or `MODALITY.ROLE` -> tokens of a view, in place of the examples' own."""
NO_TOKENS: Tokens = {}
History = tuple[tuple[int, int], ...]
Checkpointing = Literal["none", "selective", "full"]

TORCHS = {"aten", "prim", "prims", "c10d", "profiler", "torch_attn"}
"""Namespaces of torch's operators; products among them are in its table."""


@dataclass(frozen=True)
class StepCosts:
    """Of one step on one device."""

    batch_size: int
    """Samples on this device."""
    flops: Mapping[str, int]
    """By part: `teacher`, `NAME tower`, `fusion`, `losses`, `backward`; products alone, as torch counts them."""
    uncounted: tuple[str, ...]
    """Operators of plugins that torch has no formula for (`torch.utils.flop_counter.register_flop_formula`)."""
    held: int
    """Bytes alive between the forward and the backward pass: activations."""
    waiting: int
    """Of them, those of towers and fusion."""
    towers: History
    """`LiveBytes.history` of towers and fusion."""
    losses: History
    """That of the losses, which begins at `waiting`."""
    embeddings: int
    """Bytes of what the losses read."""
    batch_bytes: int
    """Of the batch, as it is uploaded."""
    gathered: tuple[int, int]
    """Bytes that this rank receives of other ranks' embeddings and of their gradients: forward, backward."""

    @property
    def total_flops(self) -> int:
        """Of all parts."""
        return sum(self.flops.values())

    def peak(self) -> int:
        """Bytes of activations, temporary tensors and gradients at their highest."""
        return max(self.peak_of_towers(), self.waiting + self.peak_of_losses)

    def peak_of_towers(self, shard: int = 1, *, again: bool = False) -> int:
        """Without the losses; `again`: with the gradients of a micro-batch from before, there throughout."""
        of_all = max(gradients for _, gradients in self.towers)
        return max(others + (of_all if again else gradients) // shard for others, gradients in self.towers)

    @property
    def peak_of_losses(self) -> int:
        """Beside what `waiting` counts."""
        return max((sum(bytes) for bytes in self.losses), default=self.waiting) - self.waiting


class _Communication(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that collectives bring to this rank, and operators without a formula."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.received = 0
        self.uncounted: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if func.namespace == "c10d" and packet in (
            torch.ops.c10d._allgather_base_,
            torch.ops.c10d._reduce_scatter_base_,
        ):
            ranks = dist.get_world_size()
            whole = max(x.nbytes for x in args[:2] if isinstance(x, Tensor))
            self.received += whole * (ranks - 1) // ranks
        elif func.namespace not in TORCHS and not has_formula(packet):
            self.uncounted.add(str(packet))
        return func(*args, **(kwargs or {}))


def costs_of_steps(
    recipe: Recipe,
    batch_size: int,
    ranks: Iterable[int],
    *,
    device: torch.device,
    checkpointing: Checkpointing = "none",
    tokens: Tokens = NO_TOKENS,
) -> dict[int, StepCosts]:
    """A step of `batch_size` samples on each of so many ranks, with the backends that `auto` chooses on `device`.

    A GPU need not be there: an H100 is assumed. Raises `UserError` for a component whose step reads values.
    """
    without = WithoutValues()
    objective = without.build(lambda: build_objective(recipe))
    objective.trainable(recipe.freeze, recipe.train.lr_factors)
    lay_out(objective, ParallelConfig(checkpointing=checkpointing), torch.device("cpu"))
    batch = batch_of_examples(recipe, batch_size, without, tokens)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    set_matmul_precision(recipe.train.matmul_precision)
    try:
        with recorded(device):
            return measured_steps(recipe, objective, batch, without, ranks)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def measured_steps(
    recipe: Recipe,
    objective: Objective,
    batch: Batch,
    without: WithoutValues | None = None,
    ranks: Iterable[int] = (1,),
) -> dict[int, StepCosts]:
    """Forward and backward pass of this batch, by number of ranks; a real one where nothing is `without` values."""
    flops: dict[str, int] = {}
    x_of_batch = [group.x for views in batch.views.values() for group in views.groups]
    live = LiveBytes(objective.parameters(), [*objective.buffers(), *x_of_batch])
    traffic = _Communication()

    def counted(part: str, run: Callable[[], T]) -> T:
        with flop_counter() as counter:
            result = run()
        flops[part] = counter.get_total_flops()
        return result

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=recipe.train.precision == "bf16")

    of_losses: dict[int, dict[str, Any]] = {}
    with ExitStack() as stack:
        stack.enter_context(live)
        stack.enter_context(traffic)
        if without:
            stack.enter_context(without)
        with autocast():
            outputs = _forward(objective, batch, counted)
        waiting, forward = live.now, len(live.history)
        for number in ranks:
            gradients: list[tuple[Tensor, Tensor]] = []  # those of another number are gone
            start, received = len(live.history), traffic.received
            with _ranks_in_name(number):
                read, leaves = _cut_off(outputs)
                with autocast():
                    total = counted("losses", lambda read=read: objective.losses(read).total)  # type: ignore[misc]
                held, sent = live.now, traffic.received - received
                counted("losses backward", total.backward)
            gradients = [(tensor, leaf.grad) for tensor, leaf in leaves if leaf.grad is not None]
            of_losses[number] = {
                "flops": (flops.pop("losses"), flops.pop("losses backward")),
                "held": held,
                "losses": tuple(live.history[start:]),
                "gathered": (sent, traffic.received - received - sent),
            }
            del total, read, leaves
        embeddings, start = sum(x.nbytes for x in _tensors(outputs)), len(live.history)
        tensors, their_gradients = zip(*gradients, strict=True)
        del gradients
        counted("backward", lambda: torch.autograd.backward(tensors, their_gradients))
    towers = (*live.history[:forward], *live.history[start:])
    backward = flops.pop("backward")

    def costs(flops_of_losses: tuple[int, int], **others: Any) -> StepCosts:
        parts = flops | {"losses": flops_of_losses[0], "backward": backward + flops_of_losses[1]}
        return StepCosts(
            batch_size=len(batch),
            flops={part: n for part, n in parts.items() if n},
            uncounted=tuple(sorted(traffic.uncounted)),
            waiting=waiting,
            towers=towers,
            embeddings=embeddings,
            batch_bytes=sum(x.nbytes for x in x_of_batch),
            **others,
        )

    return {number: costs(values.pop("flops"), **values) for number, values in of_losses.items()}


def _forward(objective: Objective, batch: Batch, counted: Callable[[str, Callable[[], Any]], Any]) -> Outputs:
    """What losses read; each part of the step is `counted`. What only this pass holds is gone when it returns."""
    views = objective.on_device(batch)
    teacher = counted("teacher", lambda: objective.represent_teachers(views))
    views = objective.repeated(objective.mask(views, teacher))
    student = {
        name: counted(f"{name} tower", functools.partial(objective.represent_student, views, name))
        for name in objective.backbone
    }
    outputs: Outputs = counted("fusion", lambda: objective.fuse(views, student, teacher, Progress(0, 1)))
    return outputs


def _cut_off(outputs: Outputs) -> tuple[Outputs, list[tuple[Tensor, Tensor]]]:
    """The same without a graph; and each tensor that had one with what stands for it, a leaf."""
    leaves: list[tuple[Tensor, Tensor]] = []

    def leaf(x: Tensor) -> Tensor:
        if not x.requires_grad:
            return x
        leaves.append((x, x.detach().requires_grad_()))
        return leaves[-1][1]

    def features(x: Features) -> Features:
        classes = None if x.class_tokens is None else leaf(x.class_tokens)
        tokens = {view: leaf(of_view) for view, of_view in x.tokens.items()}
        layers = {layer: {view: leaf(of_view) for view, of_view in own.items()} for layer, own in x.layers.items()}
        return replace(x, pooled=leaf(x.pooled), tokens=tokens, class_tokens=classes, layers=layers)

    def fused(x: Fused) -> Fused:
        return replace(x, pooled=leaf(x.pooled), tokens=None if x.tokens is None else leaf(x.tokens))

    read = replace(
        outputs,
        student={name: features(x) for name, x in outputs.student.items()},
        teacher={of: {name: features(x) for name, x in teacher.items()} for of, teacher in outputs.teacher.items()},
        fused={name: fused(x) for name, x in outputs.fused.items()},
        fusions={
            name: replace(named, fused={m: fused(x) for m, x in named.fused.items()})
            for name, named in outputs.fusions.items()
        },
    )
    return read, leaves


def _tensors(outputs: Outputs) -> Iterator[Tensor]:
    """Of student, teachers and fusion."""
    for features in (outputs.student, *outputs.teacher.values()):
        for x in features.values():
            yield x.pooled
            yield from x.tokens.values()
            for of_layer in x.layers.values():
                yield from of_layer.values()
            if x.class_tokens is not None:
                yield x.class_tokens
    every = (outputs.fused, *(named.fused for named in outputs.fusions.values()))
    for fused in (x for of in every for x in of.values()):
        yield fused.pooled
        if fused.tokens is not None:
            yield fused.tokens


def batch_of_examples(
    recipe: Recipe, size: int, without: WithoutValues | None = None, tokens: Tokens = NO_TOKENS
) -> Batch:
    """`size` samples in the recipe's shapes, a few examples in turn; `without` values it takes no memory."""
    few = _examples(recipe, min(size, 4), tokens)
    turns = torch.arange(size) % len(few)

    def in_turn(x: Tensor, dim: int) -> Tensor:
        return (without.convert(x) if without else x).index_select(dim, turns)

    def repeated(group: Group) -> Group:
        lengths = None if group.lengths is None else group.lengths[:, np.asarray(turns)]
        grown = replace(group, lengths=None, hidden=None).map(lambda x: in_turn(x, 1))
        grown.lengths = lengths
        grown.locate_hidden()
        return grown

    def all_of(views: Mapping[str, Views]) -> dict[str, Views]:
        return {name: Views([repeated(group) for group in own.groups]) for name, own in views.items()}

    teacher = {id: all_of(own) for id, own in few.teacher.items()}
    fields = {name: in_turn(x, 0) for name, x in few.fields.items()}
    return Batch(all_of(few.views), [str(i) for i in range(size)], fields=fields, teacher=teacher)


def example_lengths(recipe: Recipe, tokens: Tokens = NO_TOKENS) -> dict[str, float]:
    """`MODALITY ROLE` -> mean tokens of a view of the examples, where its backbone tells their number."""
    groups = _counted(recipe, tokens)
    return {f"{name} {group.role}": round(float(group.lengths.mean()), 1) for name, group in groups}  # type: ignore[union-attr]


def check_tokens(stages: Iterable[Recipe], tokens: Tokens) -> None:
    """Raises `UserError` for a name in `tokens` that has a view in no stage, and for more than its backbone takes."""
    stages = list(stages)
    groups = [counted for recipe in stages for counted in _counted(recipe)]
    names = {name_or_role for name, group in groups for name_or_role in (name, f"{name}.{group.role}")}
    if unknown := [name for name in tokens if name not in names]:
        raise UserError(
            f"--tokens {unknown[0]}: no view of that name has tokens that are counted"
            + (f"; there are {', '.join(sorted(names))}" if names else "")
        )
    for name, count in tokens.items():
        modality = name.partition(".")[0]
        most = getattr(stages[0].backbone[modality].config, "context", None)
        if most is not None and count > most:
            raise UserError(f"--tokens {name}={count}: backbone.{modality} takes {most} (context)")


def _counted(recipe: Recipe, tokens: Tokens = NO_TOKENS) -> list[tuple[str, Group]]:
    """The groups of the examples' views, with their modality, whose backbone tells the number of tokens."""
    views = _examples(recipe, 4, tokens).views
    return [(name, group) for name, own in views.items() for group in own.groups if group.lengths is not None]


def _examples(recipe: Recipe, size: int, tokens: Tokens) -> Batch:
    batch = example_batch(recipe, size)
    for name, views in batch.views.items():
        for i, group in enumerate(views.groups):
            count = tokens.get(f"{name}.{group.role}", tokens.get(name))
            if count is not None and group.lengths is not None:
                views.groups[i] = of_length(group, count)
    return batch


def of_length(group: Group, count: int) -> Group:
    """The same views with `count` tokens each, at least 2: the first, those between in turn, the last.

    Where the longest view sets the width, `count` does; a fixed width stays.
    """
    lengths = group.lengths
    assert lengths is not None
    width = group.x.shape[2]
    place = np.arange(max(count, width) if lengths.max() < width else count)
    between = np.maximum(lengths - 2, 1)[..., None]
    places = np.where(place == 0, 0, 1 + (place - 1) % between)
    places = np.where(place >= count - 1, lengths[..., None] - 1, places)
    places = np.where(place >= count, width - 1, places)  # padding
    index = torch.from_numpy(places)

    def taken(x: Tensor) -> Tensor:
        shape = (*index.shape, *x.shape[3:])
        return x.gather(2, index.reshape(*index.shape, *[1] * (x.dim() - 3)).expand(shape))

    mask, targets = group.token_mask, group.targets
    made = replace(
        group,
        x=taken(group.x),
        token_mask=None if mask is None else taken(mask),
        targets=None if targets is None else taken(targets),
        lengths=np.full_like(lengths, count),
        hidden=None,
    )
    made.locate_hidden()
    return made


@contextmanager
def _ranks_in_name(ranks: int) -> Iterator[None]:
    """This process is the first of so many, whose collectives bring nothing."""
    if ranks == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
