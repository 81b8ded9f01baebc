"""`distill replay`: what a step that is run again shows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import click

from distill_core.errors import counted, warn
from distill_core.recipe.resolve import Override
from distill_core.registry import Registry
from distill_core.run.failures import failures_named
from distill_core.run.folder import RunFolder
from distill_core.run.load import run_recipe
from distill_core.run.replay import Replay, replay_step
from distill_core.system import distributed

SHOWN = 5
"""Samples, and parameters, that are listed."""


@failures_named()
def replay(
    folder: Path, step: int, overrides: Sequence[Override], registry: Registry, *, quiet: bool, as_json: bool
) -> None:
    """Run the step again, and print what it shows."""
    recipe = run_recipe(folder, registry, overrides)
    result = replay_step(recipe, RunFolder(folder), step, quiet=quiet or as_json)
    first = distributed.rank() == 0
    distributed.stop()
    if not first:
        return
    if result.logged is not None and result.logged != result.loss and not overrides:
        warn(
            f"metrics.jsonl has the loss {result.logged:.9g}, and this is {result.loss:.9g}: another device, or number "
            "of ranks or threads, rounds otherwise; a larger difference says that the recipe or the code has changed"
        )
    click.echo(json.dumps(_plain(result), indent=1)) if as_json else click.echo("\n".join(_lines(folder, result)))


def _plain(result: Replay) -> dict[str, object]:
    """JSON has no number for what is not finite."""

    def finite(value: object) -> object:
        if isinstance(value, dict):
            return {key: finite(part) for key, part in value.items()}
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return {key: finite(value) for key, value in asdict(result).items()}


def _lines(folder: Path, result: Replay) -> Iterator[str]:
    origin = f"the checkpoint of step {result.start}" if result.start else "the run's beginning"
    yield f"{folder}: step {result.step}, {counted(result.step - result.start, 'step')} from {origin}"
    same = " (as in metrics.jsonl)" if result.logged == result.loss else ""
    yield f"loss {result.loss:.6g}{same}, gradient norm {result.grad_norm:.6g}"
    for name, value in [*result.terms.items(), *result.metrics.items()]:
        yield f"  {name} {value:.6g}"
    yield f"samples: {', '.join(result.keys[:SHOWN])}{', ...' if len(result.keys) > SHOWN else ''} ({len(result.keys)})"
    if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
        yield "every number of it is finite"
    elif result.first_bad is not None:
        yield f"not finite first: {result.first_bad}"
    else:
        yield "the forward pass is finite"
    if result.bad_gradients:
        more = f", ... ({len(result.bad_gradients)} in all)" if len(result.bad_gradients) > SHOWN else ""
        yield f"gradients that are not finite, from the loss on: {', '.join(result.bad_gradients[:SHOWN])}{more}"
    if result.culprits:
        yield f"finite without any of these samples: {', '.join(result.culprits)}"
    if result.no_contributions:
        yield f"no losses by sample: {result.no_contributions}"
    elif all(math.isfinite(value) for value in result.contributions.values()):
        highest = sorted(result.contributions.items(), key=lambda item: -item[1])[:SHOWN]
        yield "highest losses by sample: " + ", ".join(f"{key} {value:.4g}" for key, value in highest)
