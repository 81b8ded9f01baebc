"""A plan and a profile at the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from distill_scale.plan import Layout, Plan
from distill_scale.profile import Profile


def print_plans(plans: Sequence[Plan]) -> None:
    """What each stage is, then for each number of devices a row for each layout."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    stage = None
    for plan in plans:
        if plan.stage != stage:
            stage = plan.stage
            for line in lines(plan):
                console.print(line)
        console.print()
        for line in lines_of_devices(plan):
            console.print(line)
        console.print(layout_table(plan))
    for line in notes(plans):
        console.print(line)


def lines(plan: Plan) -> Iterator[str]:
    """Parameters and bytes, which neither devices nor layouts change."""
    stage = "" if plan.at is None else f" from {_point(plan.at)} on"
    yield f"{plan.recipe}{stage}: estimated, nothing has run"
    yield _row("parameters", {part: _count(n) for part, n in plan.parameters.items()}) + (
        f"; {_count(plan.trained)} are trained"
    )
    yield _row("bytes", {kind: _size(n) for kind, n in plan.bytes.items()})
    if plan.lengths:
        texts = {name: f"{mean:g}" for name, mean in plan.lengths.items()}
        yield _row(f"mean tokens of {plan.samples_from}", texts)
    if plan.uncounted:
        yield f"not counted, for want of a formula: {', '.join(plan.uncounted)}"


def lines_of_devices(plan: Plan) -> Iterator[str]:
    """The batch, FLOPs, what losses gather."""
    hardware = plan.hardware
    devices = "1 device" if hardware.devices == 1 else f"{hardware.devices} devices"
    whole = f"{hardware.devices} x {plan.batch_size} = " if hardware.devices > 1 else ""
    forward, backward = plan.gathered
    gathered = f"; gathered for losses: {_size(forward)} forward, {_size(backward)} backward"
    yield (
        f"{devices} of {hardware.memory / 1e9:g} GB and {hardware.flops / 1e12:g} TFLOP/s, batch "
        f"{whole}{hardware.devices * plan.batch_size:,}" + (gathered if hardware.devices > 1 else "")
    )
    total = sum(plan.flops_per_sample.values())
    yield _row("GFLOP a sample", {part: f"{n / 1e9:.3g}" for part, n in plan.flops_per_sample.items()}) + (
        f"; {total / 1e9:.4g} in all"
    )


def layout_table(plan: Plan) -> Table:
    """Gigabytes, samples/s, hours, in 80 columns."""
    parts = any(layout.micro_batch != plan.batch_size for layout in plan.layouts)
    gap = 0 if parts and plan.steps is not None else 1
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, gap, 0, 0))
    table.add_column("shard", justify="right")
    table.add_column("check-\npointing")
    for head in ("states\nGB", "activa-\ntions", "peak", "largest\nbatch", "TFLOP\na step", "samples\n/s"):
        table.add_column(head, justify="right")
    if parts:
        table.add_column("micro-\nbatch", justify="right")
    if plan.steps is not None:
        table.add_column("GPU\nhours", justify="right")
    previous = None
    for layout in plan.layouts:
        if previous is not None and layout.shard != previous:
            table.add_section()
        own = (layout.shard, layout.checkpointing) == (plan.shard, plan.checkpointing)
        shard = f"{layout.shard}" if layout.shard != previous else ""
        table.add_row(
            shard, *cells(layout, own=own, parts=parts, hours=plan.steps is not None), style="bold" if own else None
        )
        previous = layout.shard
    return table


def cells(layout: Layout, *, own: bool, parts: bool, hours: bool) -> list[str]:
    """Of one row, after the shard."""
    row = [
        layout.checkpointing + (" *" if own else ""),
        f"{(layout.states + layout.gradients) / 1e9:.1f}",
        f"{layout.activations / 1e9:.1f}",
        f"{layout.peak / 1e9:.1f}" + ("" if layout.fits else " !"),
        f"{layout.largest_batch:,}" if layout.largest_batch else "none",
        f"{layout.tflops:.1f}",
        f"{layout.samples_per_s:,.0f}" if layout.samples_per_s is not None else "-",
    ]
    if parts:
        row.append(f"{layout.micro_batch:,}" if layout.micro_batch else "none")
    if hours:
        row.append(_hours(layout.gpu_hours))
    return row


def notes(plans: Sequence[Plan]) -> Iterator[str]:
    """What the numbers are, and rest on."""
    hardware = plans[0].hardware
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
        + (links if any(plan.hardware.devices > 1 for plan in plans) else "")
        + "."
    )
    if any(layout.micro_batch != plan.batch_size for plan in plans for layout in plan.layouts):
        yield "micro-batch: train.parallel.micro_batch, for losses that read embeddings alone; towers encode twice."
    if not all(layout.fits for plan in plans for layout in plan.layouts):
        yield "!: this does not fit; samples/s are of the micro-batches that do."
    if any(plan.steps is None for plan in plans):
        yield "GPU hours: the recipe's length is in epochs; say how many --samples one has."


def _point(at: float) -> str:
    """`StageConfig.at` in words."""
    return f"{at:g} of the run" if at < 1 else f"step {at:,.0f}"


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
