"""Commands that COSMOS adds to `distill`. Nothing heavy is imported until one runs."""

from __future__ import annotations

import click

from distill_core.tools import completion


@click.group()
def bench() -> None:
    """Measure how fast data, steps and kernels are, as ratios on this machine."""


@bench.command()
@click.argument("recipe", shell_complete=completion.recipes)
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change the recipe.")
@click.option("--batch", type=click.IntRange(min=2), default=4, show_default=True, help="Samples in the batch.")
@click.option("--global-tokens", default=41, show_default=True, help="Mean tokens of a global caption.")
@click.option("--local-tokens", default=19, show_default=True, help="Mean tokens of a local caption.")
@click.option("--rounds", default=5, show_default=True, help="Measured rounds, each a step of both.")
@click.option(
    "--precision",
    type=click.Choice(["both", "fp32", "bf16"]),
    default="both",
    show_default=True,
    help="Precisions to measure; bf16 is autocast.",
)
@click.option("--device", default="cpu", show_default=True, help="Where both run: cpu, cuda, cuda:1, or auto.")
@click.option("--compile", "compiled", is_flag=True, help="Compare the framework's step, compiled, with itself, eager.")
@click.option("--csv", "output", help="Write the rows to this file.")
def step(
    recipe: str,
    overrides: tuple[str, ...],
    batch: int,
    global_tokens: int,
    local_tokens: int,
    rounds: int,
    precision: str,
    device: str,
    compiled: bool,
    output: str | None,
) -> None:
    """COSMOS's step against distill_cosmos/cosmos.py, which is written from the equations.

    Losses and gradients of both must first agree. On a CPU: one thread, process time; on a GPU: wall time.
    """
    from pathlib import Path

    from distill_core.tools import Registry, load_recipe, resolve_device
    from distill_cosmos.bench import bench_step, write_csv

    if compiled and output is not None:
        raise click.UsageError("--csv is of the comparison with cosmos.py, --compile of another")
    where = resolve_device(device, "--device")
    loaded = load_recipe(recipe, registry=Registry.discover(), overrides=overrides, allow_unset=True)
    rows = bench_step(
        loaded,
        batch_size=batch,
        global_tokens=global_tokens,
        local_tokens=local_tokens,
        rounds=rounds,
        precisions=("fp32", "bf16") if precision == "both" else (precision,),
        say=click.echo,
        device=where,
        compiled=compiled,
    )
    if output is not None:
        write_csv(Path(output), rows, Path(recipe).name, batch, where)
