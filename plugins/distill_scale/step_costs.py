"""What one step costs: FLOPs by part, the memory that it holds, the bytes that its losses gather.

The step is that of the recipe on tensors without values, so that no data, weights or GPU are needed and a batch of
thousands costs as little as one of two. Ranks are there in name only: a process group whose collectives do nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distill_core import Batch, Group, Objective, Progress, Views
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
    history: tuple[tuple[int, int], ...]
    """`LiveBytes.history`."""
    batch_bytes: int
    """Of the batch, as it is uploaded."""
    gathered: tuple[int, int]
    """Bytes that this rank receives of other ranks' embeddings and of their gradients: forward, backward."""

    @property
    def total_flops(self) -> int:
        """Of all parts."""
        return sum(self.flops.values())

    def peak(self, shard: int = 1) -> int:
        """Bytes of activations, temporary tensors and gradients at their highest, gradients being split."""
        return max(others + gradients // shard for others, gradients in self.history)


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


def costs_of_step(
    recipe: Recipe,
    batch_size: int,
    *,
    device: torch.device,
    ranks: int = 1,
    checkpointing: Checkpointing = "none",
    count_flops: bool = True,
) -> StepCosts:
    """A step of `batch_size` samples on each of `ranks` devices, with the backends that `auto` chooses on `device`.

    A GPU need not be there: an H100 is assumed. Raises `UserError` for a component whose step reads values.
    """
    without = WithoutValues()
    objective = without.build(lambda: build_objective(recipe))
    objective.trainable(recipe.freeze, recipe.train.lr_factors)
    lay_out(objective, ParallelConfig(checkpointing=checkpointing), torch.device("cpu"))
    batch = batch_of_examples(recipe, batch_size, without)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    set_matmul_precision(recipe.train.matmul_precision)
    try:
        with _ranks_in_name(ranks), recorded(device):
            return measured_step(recipe, objective, batch, without, count_flops=count_flops)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def measured_step(
    recipe: Recipe,
    objective: Objective,
    batch: Batch,
    without: WithoutValues | None = None,
    *,
    count_flops: bool = True,
) -> StepCosts:
    """Forward and backward pass of this batch; a real one where nothing is `without` values.

    Without `count_flops` it is faster: those of packed attention are added up sequence by sequence.
    """
    flops: dict[str, int] = {}
    x_of_batch = [group.x for views in batch.views.values() for group in views.groups]
    live = LiveBytes(objective.parameters(), [*objective.buffers(), *x_of_batch])
    traffic = _Communication()

    def counted(part: str, run: Callable[[], T]) -> T:
        if not count_flops:
            return run()
        with flop_counter() as counter:
            result = run()
        flops[part] = counter.get_total_flops()
        return result

    with ExitStack() as stack:
        stack.enter_context(live)
        stack.enter_context(traffic)
        if without:
            stack.enter_context(without)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.train.precision == "bf16"):
            total = _forward(objective, batch, counted)
        held, forward = live.now, traffic.received
        counted("backward", total.backward)
    flops = {part: n for part, n in flops.items() if n}
    return StepCosts(
        len(batch),
        flops,
        tuple(sorted(traffic.uncounted)),
        held,
        tuple(live.history),
        sum(x.nbytes for x in x_of_batch),
        (forward, traffic.received - forward),
    )


def _forward(objective: Objective, batch: Batch, counted: Callable[[str, Callable[[], Any]], Any]) -> Tensor:
    """The total loss; each part of the step is `counted`. What only the forward pass holds is gone when it returns."""
    views = objective.on_device(batch)
    teacher = counted("teacher", lambda: objective.represent_teachers(views))
    student = {
        name: counted(f"{name} tower", functools.partial(objective.represent_student, views, name))
        for name in objective.backbone
    }
    outputs = counted("fusion", lambda: objective.fuse(views, student, teacher, Progress(0, 1)))
    total: Tensor = counted("losses", lambda: objective.losses(outputs)).total
    return total


def batch_of_examples(recipe: Recipe, size: int, without: WithoutValues | None = None) -> Batch:
    """`size` samples in the recipe's shapes, a few examples in turn; `without` values it takes no memory."""
    few = example_batch(recipe, min(size, 4))
    turns = torch.arange(size) % len(few)

    def repeated(group: Group) -> Group:
        lengths = None if group.lengths is None else group.lengths[:, np.asarray(turns)]
        apart = replace(group, lengths=None, hidden=None)
        grown = apart.map(lambda x: (without.convert(x) if without else x).index_select(1, turns))
        grown.lengths = lengths
        grown.locate_hidden()
        return grown

    views = {name: Views([repeated(group) for group in views.groups]) for name, views in few.views.items()}
    return Batch(views, [str(i) for i in range(size)])


def example_lengths(recipe: Recipe) -> dict[str, float]:
    """`MODALITY ROLE` -> mean tokens of a view of the examples, where its backbone tells their number."""
    return {
        f"{name} {group.role}": round(float(group.lengths.mean()), 1)
        for name, views in example_batch(recipe, 4).views.items()
        for group in views.groups
        if group.lengths is not None
    }


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
