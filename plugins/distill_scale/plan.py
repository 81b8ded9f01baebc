"""`distill plan`: what a recipe needs of memory, arithmetic and links on given devices, by layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from distill_core import Backbone, UserError, progress_bar
from distill_core.tools import Recipe, WithoutValues, build_objective
from distill_scale.hardware import Hardware
from distill_scale.step_costs import Checkpointing, StepCosts, costs_of_step, example_lengths


@dataclass(frozen=True)
class States:
    """Bytes of what lasts from step to step, and of what is gathered of it."""

    parameters: dict[str, int]
    """Numbers, by part: `NAME tower`, `fusion`, `losses`, `teacher`."""
    trained: int
    """Numbers that have a gradient."""
    towers: dict[str, int]
    """Bytes of the towers, which `shard` splits: `weights`, `optimizer`, `gradients`, `teacher`."""
    rest: dict[str, int]
    """Bytes of fusion and losses, and of what belongs to them."""
    unit: int
    """Bytes of the largest unit (a transformer's block) of a tower."""
    outside: int
    """Bytes of the weights outside of units of the tower that has most of them."""

    def on_a_device(self, shard: int) -> dict[str, int]:
        """Bytes by kind, where towers are split over so many devices."""
        return {kind: -(-size // shard) + self.rest[kind] for kind, size in self.towers.items()}


@dataclass(frozen=True)
class Layout:
    """One way to lay out a step, with what it takes."""

    shard: int
    """Devices over which towers are split."""
    checkpointing: Checkpointing
    states: int
    """Bytes of weights, optimiser state and teacher on a device."""
    gradients: int
    activations: int
    """Bytes that wait for the backward pass."""
    peak: int
    """Bytes of all, at their highest, with the recipe's batch."""
    fits: bool
    micro_batch: int
    """The most samples on a device that fit; 0 where none do."""
    tflops: float
    """TFLOPs of a step on a device; with the samples that fit at a time where the batch does not."""
    sent_s: float
    """Seconds of links for weights and gradients, while products run."""
    step_s: float | None
    """Seconds of a step; None where nothing fits."""
    samples_per_s: float | None
    gpu_hours: float | None
    """Of the recipe's whole run, where its length is known."""


@dataclass(frozen=True)
class Plan:
    """All that `distill plan` prints."""

    recipe: str
    device: str
    hardware: Hardware
    batch_size: int
    steps: int | None
    shard: int
    """The recipe's own, as its `checkpointing`."""
    checkpointing: Checkpointing
    lengths: dict[str, float]
    parameters: dict[str, int]
    trained: int
    bytes: dict[str, int]
    flops_per_sample: dict[str, float]
    uncounted: tuple[str, ...]
    gathered: tuple[int, int]
    layouts: list[Layout]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


Costs = Mapping[Checkpointing, tuple[StepCosts, StepCosts]]
"""Of the recipe's batch, and of one that takes about all of a device's memory."""


def make_plan(recipe: Recipe, hardware: Hardware, device: torch.device, samples: int | None = None) -> Plan:
    """`samples` of an epoch are needed where the recipe's length is in epochs. Raises `UserError`."""
    batch = recipe.data.batch_size
    if hardware.devices > hardware.node and hardware.devices % hardware.node:
        raise UserError(f"--devices {hardware.devices} is not a number of nodes of {hardware.node} devices (--node)")
    own_shard = _own_shard(recipe, hardware)
    states = states_of(recipe)
    costs = look(recipe, hardware, device, states)
    plain = costs["none"][0]
    steps = _steps(recipe, hardware.devices * batch, samples)
    return Plan(
        recipe.name,
        device.type,
        hardware,
        batch,
        steps,
        own_shard,
        recipe.train.parallel.checkpointing,
        example_lengths(recipe),
        states.parameters,
        states.trained,
        states.on_a_device(1),
        {part: flops / batch for part, flops in plain.flops.items()},
        plain.uncounted,
        plain.gathered,
        layouts(recipe, hardware, states, costs, steps),
    )


def look(recipe: Recipe, hardware: Hardware, device: torch.device, states: States) -> Costs:
    """At steps of two sizes for each way of checkpointing."""
    kinds: tuple[Checkpointing, ...] = get_args(Checkpointing)
    costs: dict[Checkpointing, tuple[StepCosts, StepCosts]] = {}
    with progress_bar(2 * len(kinds), "steps are looked at") as advance:

        def costs_at(size: int, checkpointing: Checkpointing, *, count_flops: bool) -> StepCosts:
            made = costs_of_step(
                recipe,
                size,
                device=device,
                ranks=hardware.devices,
                checkpointing=checkpointing,
                count_flops=count_flops,
            )
            advance()
            return made

        for kind in kinds:
            first = costs_at(recipe.data.batch_size, kind, count_flops=True)
            second = costs_at(_second_size(hardware, states, first), kind, count_flops=False)
            costs[kind] = first, second
    return costs


def layouts(recipe: Recipe, hardware: Hardware, states: States, costs: Costs, steps: int | None) -> list[Layout]:
    """Nothing split, split over a node, over all devices, and as the recipe has it; each with every way of
    checkpointing."""
    shards = {1, min(hardware.node, hardware.devices), hardware.devices, _own_shard(recipe, hardware)}
    return [_layout(recipe, hardware, states, shard, kind, costs, steps) for shard in sorted(shards) for kind in costs]


def _own_shard(recipe: Recipe, hardware: Hardware) -> int:
    """Raises `UserError` where it does not divide the devices."""
    shard = recipe.train.parallel.shard
    if shard == "all":
        return hardware.devices
    if hardware.devices % shard:
        raise UserError(f"train.parallel.shard: {shard} does not divide the devices, {hardware.devices} (--devices)")
    return shard


def _second_size(hardware: Hardware, states: States, costs: StepCosts) -> int:
    """Samples that take about all the memory there is: the line to them is good where it is read."""
    left = hardware.usable - _lasting(states, 1)
    about = int(costs.batch_size * left / _of_batch(costs, 1)) if left > 0 else 0
    return min(about, 64 * costs.batch_size) if about > costs.batch_size else max(1, min(about, costs.batch_size - 1))


def _lasting(states: States, shard: int) -> int:
    on_a_device = states.on_a_device(shard)
    return sum(on_a_device[kind] for kind in ("weights", "optimizer", "teacher"))


def _of_batch(costs: StepCosts, shard: int) -> int:
    """Bytes that grow with the batch, gradients among them: the batch is there twice, the next on its way."""
    return costs.peak(shard) + 2 * costs.batch_bytes


def states_of(recipe: Recipe) -> States:
    """Of its model and optimiser, without building either in memory."""
    without = WithoutValues()
    objective = without.build(lambda: build_objective(recipe))
    named = objective.trainable(recipe.freeze, recipe.train.lr_factors)
    maker = recipe.train.optimizer.build()
    optimizer: torch.optim.Optimizer = maker.build(maker.groups(named))
    with without:
        for _, parameter, _ in named:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
    towers, rest = ({"weights": 0, "optimizer": 0, "gradients": 0, "teacher": 0} for _ in range(2))
    counts: dict[str, int] = {}
    of_teachers = (tower for teacher in objective.teachers.values() for tower in teacher.towers())
    split = {id(p) for tower in [*objective.backbone.values(), *of_teachers] for p in tower.parameters()}
    for name, parameter in objective.named_parameters():
        group = towers if id(parameter) in split else rest
        group["teacher" if name.startswith("teacher.") else "weights"] += parameter.nbytes
        counts[_part(name)] = counts.get(_part(name), 0) + parameter.numel()
    for _, parameter, _ in named:
        group = towers if id(parameter) in split else rest
        group["gradients"] += parameter.nbytes
        state = optimizer.state.get(parameter, {})
        group["optimizer"] += sum(x.nbytes for x in state.values() if isinstance(x, Tensor))
    units = [(tower, tower.units()) for tower in objective.backbone.values() if isinstance(tower, Backbone)]
    return States(
        counts,
        sum(parameter.numel() for _, parameter, _ in named),
        towers,
        rest,
        max((_size(unit) for _, parts in units for unit in parts), default=0),
        max((_size(tower) - sum(map(_size, parts)) for tower, parts in units), default=0),
    )


def _part(name: str) -> str:
    first, second = name.split(".")[:2]
    return {"backbone": f"{second} tower", "loss": "losses"}.get(first, first)


def _size(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _steps(recipe: Recipe, global_batch: int, samples: int | None) -> int | None:
    if recipe.train.steps is not None:
        return recipe.train.steps
    if samples is None or recipe.train.epochs is None:
        return None
    return round(recipe.train.epochs * samples / global_batch)


def _layout(
    recipe: Recipe,
    hardware: Hardware,
    states: States,
    shard: int,
    checkpointing: Checkpointing,
    all_costs: Costs,
    steps: int | None,
) -> Layout:
    costs, (plain, _) = all_costs[checkpointing], all_costs["none"]
    lasting = _lasting(states, shard)
    # of the split towers, the unit that computes and the next one are whole, and what is outside of units
    borrowed = _in_use(recipe) * (2 * states.unit + states.outside) if shard > 1 else 0
    batch = recipe.data.batch_size

    def peak_at(samples: float) -> float:
        """On the line through the two sizes that were looked at."""
        (n, of_n), (m, of_m) = ((c.batch_size, _of_batch(c, shard)) for c in costs)
        slope = (of_m - of_n) / (m - n) if m != n else of_n / n
        return lasting + borrowed + of_n + slope * (samples - n)

    fixed, slope = peak_at(0), peak_at(1) - peak_at(0)
    most = max(0, int((hardware.usable - fixed) / slope)) if slope > 0 else batch
    peak = peak_at(batch)
    flops = costs[0].total_flops
    if peak > hardware.usable and most:  # embeddings first, without graph, then each micro-batch with its own
        flops += sum(n for part, n in plain.flops.items() if part.endswith("tower"))
    overlapped = _seconds_of_traffic(hardware, states, shard, _in_use(recipe))
    products = hardware.seconds_of_products(flops)
    ranks = hardware.devices
    # what a rank receives is all but its own part of what is gathered
    exposed = sum(hardware.seconds_to_gather(size * ranks / max(ranks - 1, 1), ranks) for size in plain.gathered)
    step = max(products, overlapped) + exposed if most else None
    return Layout(
        shard,
        checkpointing,
        lasting,
        states.on_a_device(shard)["gradients"],
        costs[0].held,
        round(peak),
        peak <= hardware.usable,
        most,
        flops / 1e12,
        overlapped,
        step,
        None if step is None else batch * hardware.devices / step,
        None if step is None or steps is None else steps * step * hardware.devices / 3600,
    )


def _in_use(recipe: Recipe) -> float:
    """Size of split weights while a unit computes with them, in that of the weights that are updated."""
    return 0.5 if recipe.train.parallel.weight_precision == "bf16" else 1.0


def _seconds_of_traffic(hardware: Hardware, states: States, shard: int, in_use: float) -> float:
    """Of links, for weights and gradients of a step."""
    if hardware.devices == 1:
        return 0.0
    towers, rest = states.towers, states.rest
    gathered = in_use * (2 * towers["weights"] + towers["teacher"])  # forward and backward; the teacher's forward
    scattered = towers["gradients"]
    seconds = 0.0
    if shard > 1:
        seconds += hardware.seconds_to_gather(gathered + scattered, shard)
    return (
        seconds
        + hardware.seconds_to_sum(towers["gradients"] / shard, shard)
        + hardware.seconds_to_sum(rest["gradients"], 1)
    )
