"""`distill plan`: what a recipe needs of memory, arithmetic and links on given devices, by layout."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from numpy.polynomial import Polynomial
from torch import Tensor, nn

from distill_core import Backbone, CopiedTeacher, Progress, UserError, progress_bar
from distill_core.tools import Recipe, WithoutValues, build_objective
from distill_scale.hardware import Hardware
from distill_scale.step_costs import (
    NO_TOKENS,
    Checkpointing,
    StepCosts,
    Tokens,
    check_tokens,
    costs_of_steps,
    example_lengths,
)


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
    largest_batch: int
    """The most samples on a device that fit at once; 0 where none do."""
    micro_batch: int
    """Samples with a graph at a time: the batch; or the recipe's `micro_batch`; or, where that does not fit, as many as
    do beside the losses of the whole batch; 0 where none do."""
    tflops: float
    """TFLOPs of a step on a device, with a second forward pass of towers and fusion where `micro_batch` is less than
    the batch."""
    sent_s: float
    """Seconds of links for weights and gradients, while products run."""
    step_s: float | None
    """Seconds of a step; None where nothing fits."""
    samples_per_s: float | None
    gpu_hours: float | None
    """Of all the stage's steps, where their number is known."""


@dataclass(frozen=True)
class Plan:
    """All that `distill plan` prints of one stage of a recipe on some devices."""

    recipe: str
    stage: int
    """0 is what holds before the first of the recipe's `stages`."""
    at: float | None
    """Where it begins, as the recipe has it."""
    device: str
    hardware: Hardware
    batch_size: int
    steps: int | None
    """Of the stage, where the run's length is known."""
    shard: int
    """The recipe's own, as its `checkpointing`."""
    checkpointing: Checkpointing
    lengths: dict[str, float]
    """Mean tokens of a view, by `MODALITY ROLE`."""
    samples_from: str
    """Whose they are."""
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


Costs = Mapping[Checkpointing, Sequence[StepCosts]]
"""Of the recipe's batch, and of one that takes about all of a device's memory; of "none" a third, for the losses."""

MANY = 1 << 24
"""Samples on a device: more than any has."""


def make_plans(
    recipe: Recipe,
    hardware: Sequence[Hardware],
    device: torch.device,
    samples: int | None = None,
    tokens: Tokens = NO_TOKENS,
) -> list[Plan]:
    """One for each stage of the recipe and each of `hardware`, which differ in the number of devices alone.

    `samples` of an epoch are needed where the recipe's length is in epochs. Raises `UserError`.
    """
    for each in hardware:
        if each.devices > each.node and each.devices % each.node:
            raise UserError(f"--devices {each.devices} is not a number of nodes of {each.node} devices (--node)")
        _own_shard(recipe, each)
    numbers = range(1 + len(recipe.stages))
    for number in numbers:
        for name, teacher in recipe.of_stage(number).all_teachers.items():
            if not issubclass(teacher.cls, CopiedTeacher):
                raise UserError(
                    f"the teacher {name!r} is {teacher.cls.name!r}: only teachers that follow the student are planned; "
                    f"plan without it and the losses that read it (--set {'stages' if number else teacher.path}=null)"
                )
    check_tokens(map(recipe.of_stage, numbers), tokens)
    return [plan for number in numbers for plan in _plans_of(recipe, number, hardware, device, samples, tokens)]


def _plans_of(
    whole: Recipe, number: int, hardware: Sequence[Hardware], device: torch.device, samples: int | None, tokens: Tokens
) -> Iterator[Plan]:
    """The plans of one stage: one for each hardware and layout."""
    recipe, batch = whole.of_stage(number), whole.data.batch_size
    states = states_of(recipe)
    lengths = example_lengths(recipe, tokens)
    all_costs = look(recipe, hardware[0], [each.devices for each in hardware], device, states, tokens)
    for each in hardware:
        costs = all_costs[each.devices]
        plain, steps = costs["none"][0], _steps(whole, number, each.devices * batch, samples)
        yield Plan(
            recipe.name,
            number,
            whole.stages[number - 1].at if number else None,
            device.type,
            each,
            batch,
            steps,
            _own_shard(recipe, each),
            recipe.train.parallel.checkpointing,
            lengths,
            "a view, by --tokens" if tokens else "example samples",
            states.parameters,
            states.trained,
            states.on_a_device(1),
            {part: flops / batch for part, flops in plain.flops.items()},
            plain.uncounted,
            plain.gathered,
            layouts(recipe, each, states, costs, steps),
        )


def look(
    recipe: Recipe,
    hardware: Hardware,
    ranks: Sequence[int],
    device: torch.device,
    states: States,
    tokens: Tokens = NO_TOKENS,
) -> dict[int, Costs]:
    """At steps of two or three sizes for each way of checkpointing, by number of ranks."""
    kinds: tuple[Checkpointing, ...] = get_args(Checkpointing)
    costs: dict[int, dict[Checkpointing, list[StepCosts]]] = {number: {kind: [] for kind in kinds} for number in ranks}
    batch = recipe.data.batch_size
    with progress_bar(2 * len(kinds) + 1, "steps are looked at") as advance:
        for kind in kinds:

            def add(size: int, kind: Checkpointing = kind) -> StepCosts:
                made = costs_of_steps(recipe, size, ranks, device=device, checkpointing=kind, tokens=tokens)
                for number, of_number in made.items():
                    costs[number][kind].append(of_number)
                advance()
                return made[ranks[0]]

            add(_second_size(hardware, states, add(batch)))
            if kind == "none":
                add(2 * batch)
    return {number: dict(of_number) for number, of_number in costs.items()}


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
    left, batch = hardware.usable - _lasting(states, 1), costs.batch_size
    about = int(batch * left / (costs.peak() + 2 * costs.batch_bytes))
    if 0 < about < batch / 2:
        return about
    about = min(max(about, 4 * batch), 64 * batch)
    return about - about % 4  # examples in turn


def _lasting(states: States, shard: int) -> int:
    on_a_device = states.on_a_device(shard)
    return sum(on_a_device[kind] for kind in ("weights", "optimizer", "teacher"))


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
    return {"backbone": f"{second} tower", "heads": f"{second} head", "loss": "losses"}.get(first, first)


def _size(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _steps(recipe: Recipe, stage: int, global_batch: int, samples: int | None) -> int | None:
    """Steps of one stage; None where the run's length is not known."""
    steps = recipe.train.steps
    if steps is None:
        if samples is None or recipe.train.epochs is None:
            return None
        steps = round(recipe.train.epochs * samples / global_batch)
    first, after = (
        bisect_left(range(steps), number, key=lambda step: recipe.stage(Progress(step, steps)))
        for number in (stage, stage + 1)
    )
    return after - first


def _layout(
    recipe: Recipe,
    hardware: Hardware,
    states: States,
    shard: int,
    checkpointing: Checkpointing,
    all_costs: Costs,
    steps: int | None,
) -> Layout:
    costs, plain = all_costs[checkpointing], all_costs["none"]
    lasting = _lasting(states, shard)
    # of the split towers, the unit that computes and the next one are whole, and what is outside of units
    borrowed = _in_use(recipe) * (2 * states.unit + states.outside) if shard > 1 else 0
    batch = recipe.data.batch_size

    at_once, again, waiting = (
        Polynomial.fit([c.batch_size for c in costs[:2]], values[:2], 1)
        for values in (
            [c.peak_of_towers(shard) for c in costs],
            [c.peak_of_towers(shard, again=True) for c in costs],
            [c.waiting for c in costs],
        )
    )
    # pairs of samples, which the number of ranks multiplies
    losses = Polynomial.fit([c.batch_size for c in plain], [c.peak_of_losses for c in plain], 2)
    per_sample = 2 * plain[0].batch_bytes / batch  # the next batch is on its way
    cached = 2 * plain[0].embeddings / batch  # and their gradients

    def peak_at(samples: int, micro_batch: int) -> float:
        """Bytes, with so many samples on a device and `micro_batch` of them at a time."""
        whole = lasting + borrowed + per_sample * samples
        if micro_batch >= samples:
            return float(whole + max(at_once(samples), waiting(samples) + losses(samples)))
        return float(whole + cached * samples + max(again(micro_batch), losses(samples)))

    largest = bisect_right(range(1, MANY), False, key=lambda n: peak_at(n, n) > hardware.usable)
    micro_batch = min(batch, recipe.train.parallel.micro_batch or batch)
    peak = peak_at(batch, micro_batch)
    if peak > hardware.usable:
        micro_batch = bisect_right(range(1, batch), False, key=lambda n: peak_at(batch, n) > hardware.usable)
    flops = costs[0].total_flops
    if 0 < micro_batch < batch:  # embeddings first, without graph, then each micro-batch with its own
        flops += sum(n for part, n in plain[0].flops.items() if part.endswith("tower") or part == "fusion")
    overlapped = _seconds_of_traffic(hardware, states, shard, _in_use(recipe))
    products = hardware.seconds_of_products(flops)
    ranks = hardware.devices
    # what a rank receives is all but its own part of what is gathered
    exposed = sum(hardware.seconds_to_gather(size * ranks / max(ranks - 1, 1), ranks) for size in plain[0].gathered)
    step = max(products, overlapped) + exposed if micro_batch else None
    return Layout(
        shard,
        checkpointing,
        lasting,
        states.on_a_device(shard)["gradients"],
        costs[0].held,
        round(peak),
        peak <= hardware.usable,
        largest,
        micro_batch,
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
