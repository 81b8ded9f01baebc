"""`distill kernels` and `distill bench data`. Nothing heavy is imported until one runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from distill_core.tools import completion

if TYPE_CHECKING:
    import torch

    from distill_core.tools import Recipe


@click.command()
@click.argument("recipe", required=False, shell_complete=completion.recipes)
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change the recipe.")
@click.option("--tune", is_flag=True, help="Measure the backends on this device, and let `auto` go by the result.")
@click.option("--device", default="auto", show_default=True, help="Device to list or tune: auto, cpu or cuda.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def kernels(recipe: str | None, overrides: tuple[str, ...], tune: bool, device: str, as_json: bool) -> None:
    """List the kernels' backends: which this machine can run, and why not the rest.

    With a RECIPE: which backend each op of one of its steps takes on the device, and why. `--device cuda` needs no GPU:
    where there is none, an H100 is assumed. With --tune as well: the backends are timed on this device at the shapes of
    that step, of as many example samples as its batch has, and what others have measured here stays.
    """
    import torch

    from distill_core import UserError

    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if recipe is None and overrides:
        raise UserError("--set changes a recipe: name one, as in `distill kernels RECIPE --set ...`")
    if tune:
        _tune(recipe, overrides, where, as_json)
    elif recipe is not None:
        _choices(recipe, overrides, where, as_json)
    else:
        _list(where, as_json)


def _tune(recipe: str | None, overrides: tuple[str, ...], where: torch.device, as_json: bool) -> None:
    import torch

    from distill_core import UserError
    from distill_core.tools import set_matmul_precision
    from distill_kernels.dispatch import BackendError
    from distill_kernels.tune import Time, tune
    from distill_vl.choices import calls_of

    if where.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--tune times this machine's device, and torch sees no GPU: leave --device out, or say cpu")
    times: list[Time] = []

    def report(of_class: list[Time]) -> None:
        times.extend(of_class)
        for op, inputs, backend, milliseconds in () if as_json else of_class:
            click.echo(f"{op:22}{inputs:72}{backend:11}{milliseconds:10.3f} ms")

    cases = None
    if recipe is not None:
        loaded = _load(recipe, overrides)
        cases = calls_of(loaded)
        set_matmul_precision(loaded.train.matmul_precision)
    try:
        path = tune(where, cases, report=report)
    except BackendError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{error}: name a folder that can be written to in DISTILL_KERNEL_TABLES") from error
    if as_json:
        click.echo(json.dumps([time._asdict() for time in times]))
    else:
        click.echo(f"`auto` now goes by {path}")


def _load(recipe: str, overrides: tuple[str, ...]) -> Recipe:
    from distill_core.tools import Registry, load_recipe

    return load_recipe(recipe, registry=Registry.discover(), overrides=overrides, allow_unset=True)


def _list(where: torch.device, as_json: bool) -> None:
    from distill_kernels.defaults import table_path
    from distill_kernels.dispatch import listing

    rows = listing()
    if as_json:
        click.echo(json.dumps([dict(zip(("op", "backend", "runs"), row, strict=True)) for row in rows]))
        return
    previous = None
    for op, backend, answer in rows:
        click.echo(f"{op if op != previous else '':24}{backend:12}{answer}")
        previous = op
    path = table_path(where)
    click.echo(f"`auto` goes by {path if path.exists() else 'the defaults of the package (measure with --tune)'}")


def _choices(recipe: str, overrides: tuple[str, ...], where: torch.device, as_json: bool) -> None:
    from collections import Counter

    import torch

    from distill_core.tools import arithmetic
    from distill_vl.choices import choices_of

    loaded = _load(recipe, overrides)
    counts = Counter(choices_of(loaded, where))
    if as_json:
        rows = [choice._asdict() | {"others": dict(choice.others), "calls": n} for choice, n in counts.items()]
        click.echo(json.dumps(rows))
        return
    assumed = where.type == "cuda" and not torch.cuda.is_available()
    steps = "one step's forward pass" if not loaded.stages else "the forward passes of a step of each stage"
    click.echo(
        f"{steps}, {loaded.data.batch_size} samples, "
        + arithmetic(loaded.train.precision, loaded.train.matmul_precision, where)
        + (" (no GPU is here: an H100 is assumed, with this machine's packages and compiler)" if assumed else "")
    )
    previous = None
    for choice, n in sorted(counts.items(), key=lambda item: item[0][:3]):
        if previous is None or choice[:2] != previous[:2]:
            click.echo(f"{choice.op}: {choice.backend}  ({choice.why})")
            for name, reason in choice.others:
                click.echo(f"    not {name}: {reason}")
        click.echo(f"    {n:4} x {choice.inputs}")
        previous = choice


@click.group()
def bench() -> None:
    """Measure how fast data, steps and kernels are, as ratios on this machine."""


@bench.command()
@click.argument("recipe", shell_complete=completion.recipes)
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change the recipe.")
@click.option(
    "--size", nargs=2, type=click.IntRange(min=8), default=(500, 400), show_default=True, help="Of the JPEGs."
)
@click.option("--images", type=click.IntRange(min=1), default=8, show_default=True, help="JPEGs in a round.")
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True, help="Measured rounds of both.")
@click.option("--rate", type=float, default=800.0, show_default=True, help="Samples/s of a GPU that workers feed.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def data(
    recipe: str, overrides: tuple[str, ...], size: tuple[int, int], images: int, rounds: int, rate: float, as_json: bool
) -> None:
    """What a sample costs a core: the recipe's views and tokens, beside torchvision's transforms of PIL images.

    Process time of one thread, both interleaved. `device: model` is what the workers do where colors are left to the
    training device. Needs torchvision, and for the tokenizer's other side open_clip: the extra `test` has both.
    """
    from distill_vl.bench import CPU, MODEL, bench_data

    rows = bench_data(
        _load(recipe, overrides),
        width=size[0],
        height=size[1],
        images=images,
        rounds=rounds,
        say=(lambda line: None) if as_json else click.echo,
    )
    if as_json:
        click.echo(json.dumps(rows))
        return
    by_part = {row["part"]: row for row in rows}
    cores = [by_part[CPU]["plain_ms"], by_part[CPU]["ours_ms"], by_part[MODEL]["ours_ms"]]
    plain, whole, crops = (f"{milliseconds * rate / 1000:.1f}" for milliseconds in cores)
    click.echo(f"cores for {rate:g} samples/s: plain {plain}, ours {whole}, with device: model {crops}")
