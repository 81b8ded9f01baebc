"""A plan and a profile at the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from distill_scale.plan import Layout, Plan
from distill_scale.profile import Profile


def print_plan(plan: Plan) -> None:
    """What it is of, then a row for each layout."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for line in lines(plan):
        console.print(line)
    console.print(layout_table(plan))
    for line in notes(plan):
        console.print(line)


def lines(plan: Plan) -> Iterator[str]:
    """Parameters, FLOPs and bytes, which no layout changes."""
    hardware = plan.hardware
    devices = "1 device" if hardware.devices == 1 else f"{hardware.devices} devices"
    whole = f"{hardware.devices} x {plan.batch_size} = " if hardware.devices > 1 else ""
    yield (
        f"{plan.recipe} on {devices} of {hardware.memory / 1e9:g} GB and {hardware.flops / 1e12:g} TFLOP/s, batch "
        f"{whole}{hardware.devices * plan.batch_size:,}; estimated, nothing has run"
    )
    yield _row("parameters", {part: _count(n) for part, n in plan.parameters.items()}) + (
        f"; {_count(plan.trained)} are trained"
    )
    total = sum(plan.flops_per_sample.values())
    yield _row("GFLOP a sample", {part: f"{n / 1e9:.3g}" for part, n in plan.flops_per_sample.items()}) + (
        f"; {total / 1e9:.4g} in all"
    )
    yield _row("bytes", {kind: _size(n) for kind, n in plan.bytes.items()})
    if hardware.devices > 1:
        forward, backward = plan.gathered
        yield f"gathered for losses each step: {_size(forward)} forward, {_size(backward)} backward"
    if plan.lengths:
        yield _row("tokens of the examples", {name: f"{mean:g}" for name, mean in plan.lengths.items()})
    if plan.uncounted:
        yield f"not counted, for want of a formula: {', '.join(plan.uncounted)}"


def layout_table(plan: Plan) -> Table:
    """Gigabytes, samples/s, hours."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("shard", justify="right")
    table.add_column("checkpointing")
    for head in ("states GB", "activations", "peak", "largest batch", "TFLOP a step", "samples/s"):
        table.add_column(head, justify="right")
    if plan.steps is not None:
        table.add_column("GPU hours", justify="right")
    previous = None
    for layout in plan.layouts:
        if previous is not None and layout.shard != previous:
            table.add_section()
        own = (layout.shard, layout.checkpointing) == (plan.shard, plan.checkpointing)
        shard = f"{layout.shard}" if layout.shard != previous else ""
        table.add_row(shard, *cells(layout, own=own, hours=plan.steps is not None), style="bold" if own else None)
        previous = layout.shard
    return table


def cells(layout: Layout, *, own: bool, hours: bool) -> list[str]:
    """Of one row, after the shard."""
    row = [
        layout.checkpointing + (" *" if own else ""),
        f"{(layout.states + layout.gradients) / 1e9:.1f}",
        f"{layout.activations / 1e9:.1f}",
        f"{layout.peak / 1e9:.1f}" + ("" if layout.fits else " !"),
        f"{layout.micro_batch:,}" if layout.micro_batch else "none",
        f"{layout.tflops:.1f}",
        f"{layout.samples_per_s:,.0f}" if layout.samples_per_s is not None else "-",
    ]
    if hours:
        row.append(_hours(layout.gpu_hours))
    return row


def notes(plan: Plan) -> Iterator[str]:
    """What the numbers are, and rest on."""
    hardware = plan.hardware
    yield (
        "states: weights, optimiser, teacher, gradients. activations: what waits for the backward pass. largest batch: "
        f"samples on a device that fit in {100 * (1 - hardware.reserve):g} % of its memory. *: the recipe's layout."
    )
    links = (
        f", links of {hardware.bandwidth / 1e9:g} GB/s in a node of {hardware.node} and {hardware.network / 1e9:g} "
        "GB/s between nodes; weights and gradients travel while products run, embeddings of losses do not"
    )
    yield (
        f"samples/s: products at {100 * hardware.utilization:g} % of the peak"
        + (links if hardware.devices > 1 else "")
        + "."
    )
    if not all(layout.fits for layout in plan.layouts):
        yield "!: the batch does not fit; samples/s are of micro-batches, with each tower's forward pass twice."
    if plan.steps is None:
        yield "GPU hours: the recipe's length is in epochs; say how many --samples one has."


def _row(name: str, values: dict[str, str]) -> str:
    return f"{name}: " + ", ".join(f"{part} {value}" for part, value in values.items())


def _count(number: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {letter}"
    return str(number)


def _size(number: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g} B"


def _hours(hours: float | None) -> str:
    if hours is None:
        return "-"
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def print_profile(profile: Profile, name: str) -> None:
    """A row for each part, then what no part has, and the step."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{name} on {profile.device}, {profile.batch_size} samples; mean of the timed steps")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("part")
    for head in ("ms", "%"):
        table.add_column(head, justify="right")
    rest = profile.step - sum(profile.parts.values())
    for part, seconds in (profile.parts | {"other": rest}).items():
        table.add_row(part, f"{1000 * seconds:.1f}", f"{100 * seconds / profile.step:.0f}")
    table.add_section()
    table.add_row("step", f"{1000 * profile.step:.1f}", "100")
    console.print(table)
    console.print(f"{profile.batch_size / profile.step:,.1f} samples/s on this rank")
    if profile.trace is not None:
        console.print(f"{profile.trace}: open it in chrome://tracing or ui.perfetto.dev")
