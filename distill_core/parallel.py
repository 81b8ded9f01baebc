"""How a model is laid out on the hardware (`train.parallel`): units checkpointed, compiled, and spread over ranks by
torch's FSDP2."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from distill_core.contracts.shared import distinct, tied
from distill_core.errors import UserError
from distill_core.gradient_cache import batch_statistics
from distill_core.interfaces import Backbone, FusionHead, Head, Loss
from distill_core.objective import Objective
from distill_core.recipe.sections import ParallelConfig, Recipe
from distill_core.step import TrainStep
from distill_core.system import distributed

PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)
"""Of torch's own operators, those whose results `checkpointing: selective` keeps: they cost more to compute again than
to hold. It keeps those of operators from elsewhere too, which are attention's kernels."""


def prepare(recipe: Recipe, objective: Objective, device: torch.device) -> TrainStep:
    """The step of an objective whose weights are known: moved to the device, alike on all ranks, laid out."""
    distributed.broadcast(objective.to(device))
    objective.freeze(recipe.freeze)
    lay_out(objective, recipe.train.parallel, device)
    return TrainStep(recipe, objective, device)


def lay_out(objective: Objective, config: ParallelConfig, device: torch.device) -> None:
    """Prepare student and teacher for `config`, in place; names of parameters stay.

    Call it once what is frozen is frozen, and before there is an optimiser. Over several ranks the towers' parameters
    become `DTensor`s, whose gradients are averaged during the backward pass; those of fusion, heads, losses, scalars
    and towers that share some parts stay plain tensors. Raises `UserError` where `shard` does not divide the ranks, and
    for `micro_batch` with a tower that reads its batch's statistics.
    """
    if config.micro_batch is not None and (names := list(batch_statistics(objective))):
        raise UserError(f"train.parallel.micro_batch: {names[0]} computes with statistics of its batch; take null")
    students = [cast(Backbone, tower) for tower in distinct(objective.backbone.values())]
    teachers = [cast(Backbone, tower) for teacher in objective.teachers.values() for tower in teacher.towers()]
    if config.checkpointing != "none":
        heads = [cast(Head, head) for head in objective.heads.values()]
        for unit in distinct(_units([*students, *heads])):
            checkpoint_unit(unit, selective=config.checkpointing == "selective")
    if config.compile:
        compile_units(objective)
    ranks = distributed.world_size()
    shard = ranks if config.shard == "all" else config.shard
    if ranks % shard:
        raise UserError(
            f"train.parallel.shard: {shard} does not divide the number of ranks, {ranks}; take a divisor, or `all`"
        )
    whole = tied(students) | tied(teachers)
    for tower in students + teachers if ranks > 1 else ():
        if tower not in whole:  # those stay as fusion and losses do
            _spread(tower, shard, config, device)


def _units(parts: Sequence[Backbone | Head]) -> list[nn.Module]:
    return [unit for part in parts for unit in part.units()]


def checkpoint_unit(unit: nn.Module, *, selective: bool) -> None:
    """Compute the unit's activations again in the backward pass, in place of holding them.

    Its `forward` is replaced, not wrapped in a module: names stay, and hooks run once.
    """
    forward, options = unit.forward, dict[str, Any]()
    if selective:
        forward = _casting_anew(forward)
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_products)

    def checkpointed(*args: Any, **kwargs: Any) -> Any:  # no partial: torch.compile does not trace into one here
        return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)

    unit.forward = checkpointed


def _casting_anew(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` without autocast's cache of weights. The second call of a unit in a step would find its weights cast
    already, while its recomputation casts them, and torch refuses operators that differ."""

    def uncached(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a graph has no such cache
            return forward(*args, **kwargs)
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            return forward(*args, **kwargs)
        finally:
            torch.set_autocast_cache_enabled(cached)

    return uncached


def _keep_products(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    must_save = operator in PRODUCTS or operator.namespace not in ("aten", "prims")
    return CheckpointPolicy.MUST_SAVE if must_save else CheckpointPolicy.PREFER_RECOMPUTE


def compile_units(objective: Objective, backend: str = "inductor") -> int:
    """Have torch compile each unit of student, teachers, fusion, heads and losses when it is first called; returns
    their number. Where samples may lack a modality or a field, fusion, heads and losses see other numbers of samples,
    and other weights, at each step: they run as they are.

    In place, so that names of parameters stay. Around the steps stands `one_graph_each`.
    """
    parts: list[nn.Module] = distinct(objective.backbone.values())
    parts += [tower for teacher in objective.teachers.values() for tower in teacher.towers()]
    if not objective.plan.optional:
        parts += [*objective.heads.values(), *objective.loss.values(), *objective.fusions.values()]
        parts += [*([objective.fusion] if objective.fusion is not None else [])]
    units = distinct(unit for part in parts for unit in cast(Backbone | FusionHead | Head | Loss, part).units())
    for unit in units:
        compile_unit(unit, backend)
    return len(units)


GRAPHS = 64
"""That one function may have. Torch allows 8, of all modules of a class together: a block serves towers of several
widths, student and teacher, with tokens or without, of fixed lengths and then of any."""


def compile_unit(unit: nn.Module, backend: str) -> None:
    """`unit.compile` as one graph, for torch's own modules too, whose frames it does not trace."""
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
    if not type(unit).forward.__module__.startswith("torch.nn."):
        unit.compile(backend=backend, fullgraph=True)
        return
    forward = unit.forward

    def inlined(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    unit.forward = torch.compile(inlined, backend=backend, fullgraph=True)


@contextmanager
def one_graph_each() -> Iterator[None]:
    """Inside, a compiled unit that is not one graph raises a `UserError` that names the line."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("torch._dynamo."):
            raise
        what = str(error).strip().split("\n", 1)[0]
        frames = re.findall(r'File "([^"]+)", line (\d+)', str(error))
        where = f" ({frames[-1][0]}:{frames[-1][1]})" if frames else ""
        raise UserError(
            f"train.parallel.compile: a unit is not one graph{where}: {what}. Train with train.parallel.compile=false; "
            "its author can leave it out of `units` (docs/plugins.md)"
        ) from error


def _spread(tower: Backbone, shard: int, config: ParallelConfig, device: torch.device) -> None:
    """Split the tower's parameters over `shard` ranks, and repeat that over the others.

    A unit's parameters are gathered while it computes. FSDP2 takes none without a dimension, and code outside `forward`
    (a loss that clamps a scale) reads those of one element: they stay as they are.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # features are read, and never changed in place (`Loss.forward`)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (distributed.world_size() // shard, shard), mesh_dim_names=("copies", "parts"))
    policy = MixedPrecisionPolicy()
    if config.weight_precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    scalars = {parameter for parameter in tower.parameters() if parameter.numel() == 1}
    for module in (*tower.units(), tower):
        # the tower too: left whole after a forward pass without gradients, it would miss the moving average
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=scalars)
