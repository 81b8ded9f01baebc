"""`distill plan` and `distill profile`. Nothing heavy is imported until one runs."""

from __future__ import annotations

import json
from typing import Any

import click

from distill_core.tools import completion

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


class Quantity(click.ParamType[float]):
    """`80GB`, `450e9`, `990T`: a number, perhaps with a metric prefix and a unit."""

    name = "number"

    def __init__(self, unit: str) -> None:
        self.unit = unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Raises click's usage error for what is no positive number."""
        if isinstance(value, float):
            return value
        text = str(value).replace(" ", "").lower().removesuffix(self.unit.lower())
        prefix = text[-1:] if text[-1:] in UNITS else ""
        try:
            number = float(text.removesuffix(prefix)) * UNITS[prefix]
        except ValueError:
            number = 0.0
        if not 0 < number < float("inf"):
            self.fail(f"{value!r} is no positive number of {self.unit}, as 80G{self.unit} or 80e9", param, ctx)
        return number


class Counts(click.ParamType[tuple[int, ...]]):
    """`8`, or `1,8,64`."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Each number once. Raises click's usage error for what is no positive whole number."""
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isdecimal() and int(part) for part in parts):
            self.fail(f"{value!r} is no positive number, nor several, as 1,8,64", param, ctx)
        return tuple(dict.fromkeys(map(int, parts)))


class Tokens(click.ParamType[tuple[str, int]]):
    """`text=40`, or `text.local=12`."""

    name = "name=number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """Raises click's usage error for what is no name and a whole number from 2 on."""
        name, _, number = str(value).partition("=")
        if not name or not number.isdecimal() or int(number) < 2:
            self.fail(f"{value!r} is no name and number of tokens, as text=40 or text.local=12", param, ctx)
        return name, int(number)


@click.command()
@click.argument("recipe", shell_complete=completion.recipes)
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change the recipe.")
@click.option("--devices", type=Counts(), default="1", show_default=True, help="Devices that train; 1,8,64 for each.")
@click.option("--memory", type=Quantity("B"), default="80GB", show_default=True, help="Of a device.")
@click.option("--flops", type=Quantity("FLOP/s"), default="990T", show_default=True, help="Peak FLOP/s of a device.")
@click.option(
    "--utilization",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.35,
    show_default=True,
    help="Share of the peak that a step reaches.",
)
@click.option("--node", type=click.IntRange(min=1), default=8, show_default=True, help="Devices in a node.")
@click.option("--bandwidth", type=Quantity("B/s"), default="450GB/s", show_default=True, help="In a node, one way.")
@click.option(
    "--network", type=Quantity("B/s"), default="50GB/s", show_default=True, help="Of a device to other nodes."
)
@click.option(
    "--reserve",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.1,
    show_default=True,
    help="Share of the memory for what is not counted: driver, collectives, fragmentation.",
)
@click.option("--samples", type=click.IntRange(min=1), help="Of an epoch, for the GPU hours of a recipe with `epochs`.")
@click.option(
    "--tokens",
    type=Tokens(),
    multiple=True,
    metavar="NAME=N",
    help="Of a view, as text=40 or text.local=12; not those of example texts.",
)
@click.option(
    "--device",
    type=click.Choice(["cuda", "cpu"]),
    default="cuda",
    show_default=True,
    help="Whose kernels are planned for; no GPU need be there.",
)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON, a line for each stage and number of devices.")
def plan(
    recipe: str,
    overrides: tuple[str, ...],
    devices: tuple[int, ...],
    memory: float,
    flops: float,
    utilization: float,
    node: int,
    bandwidth: float,
    network: float,
    reserve: float,
    samples: int | None,
    tokens: tuple[tuple[str, int], ...],
    device: str,
    as_json: bool,
) -> None:
    """What RECIPE needs before it runs: parameters, FLOPs by part, memory and time by layout. Needs no GPU and no data.

    Its step is run without values, with the kernels that a device of this kind would get. Defaults are those of an H100
    with bf16, NVLink and a 400 Gb/s card.
    """
    import torch

    from distill_core.tools import Registry, load_recipe
    from distill_scale.hardware import Hardware
    from distill_scale.plan import make_plans
    from distill_scale.table import print_plans

    loaded = load_recipe(recipe, registry=Registry.discover(), overrides=overrides, allow_unset=True)
    hardware = [Hardware(n, memory, reserve, flops, utilization, node, bandwidth, network) for n in devices]
    plans = make_plans(loaded, hardware, torch.device(device), samples, dict(tokens))
    if as_json:
        for each in plans:
            click.echo(json.dumps(each.to_dict()))
    else:
        print_plans(plans)


@click.command()
@click.argument("recipe", shell_complete=completion.recipes)
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change the recipe.")
@click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Steps that are timed.")
@click.option("--warmup", type=click.IntRange(min=0), default=3, show_default=True, help="Steps before them.")
@click.option("--trace", metavar="FILE.json", help="Write a trace of two more steps; .json.gz compresses it.")
@click.option("--device", help="Where it runs, in place of the recipe's `train.device`: cpu, cuda, cuda:1.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def profile(
    recipe: str,
    overrides: tuple[str, ...],
    steps: int,
    warmup: int,
    trace: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Where the time of RECIPE's steps goes: data, upload, towers, fusion, losses, backward pass, optimiser, teacher.

    On a GPU each part is waited for, so that parts add up to more than a step that overlaps them; the trace has no such
    waits. Open it in chrome://tracing or ui.perfetto.dev.
    """
    from dataclasses import asdict
    from pathlib import Path

    from distill_core import UserError, rank
    from distill_core.tools import Registry, load_recipe
    from distill_scale.profile import profile as profile_recipe
    from distill_scale.table import print_profile

    if trace is not None and not trace.endswith((".json", ".json.gz")):
        raise UserError(f"--trace {trace}: name a file that ends in .json or .json.gz")
    moved = [*overrides, *([f"train.device={device}"] if device else [])]
    loaded = load_recipe(recipe, registry=Registry.discover(), overrides=moved)
    made = profile_recipe(
        loaded, steps=steps, warmup=warmup, trace=Path(trace) if trace is not None else None, quiet=as_json
    )
    if rank() > 0:
        return
    if as_json:
        click.echo(json.dumps(asdict(made)))
    else:
        print_profile(made, loaded.name)
