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
    seen = replay_step(recipe, RunFolder(folder), step, quiet=quiet or as_json)
    first = distributed.rank() == 0
    distributed.stop()
    if not first:
        return
    if seen.logged is not None and seen.logged != seen.loss and not overrides:
        warn(
            f"metrics.jsonl has the loss {seen.logged:.9g}, and this is {seen.loss:.9g}: another device, or number of "
            "ranks or threads, rounds otherwise; a larger difference says that the recipe or the code has changed"
        )
    click.echo(json.dumps(_plain(seen), indent=1)) if as_json else click.echo("\n".join(_lines(folder, seen)))


def _plain(seen: Replay) -> dict[str, object]:
    """JSON has no number for what is not finite."""

    def finite(value: object) -> object:
        if isinstance(value, dict):
            return {key: finite(part) for key, part in value.items()}
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return {key: finite(value) for key, value in asdict(seen).items()}


def _lines(folder: Path, seen: Replay) -> Iterator[str]:
    origin = f"the checkpoint of step {seen.start}" if seen.start else "the run's beginning"
    yield f"{folder}: step {seen.step}, {counted(seen.step - seen.start, 'step')} from {origin}"
    same = " (as in metrics.jsonl)" if seen.logged == seen.loss else ""
    yield f"loss {seen.loss:.6g}{same}, gradient norm {seen.grad_norm:.6g}"
    for name, value in [*seen.terms.items(), *seen.metrics.items()]:
        yield f"  {name} {value:.6g}"
    yield f"samples: {', '.join(seen.keys[:SHOWN])}{', ...' if len(seen.keys) > SHOWN else ''} ({len(seen.keys)})"
    if math.isfinite(seen.loss) and math.isfinite(seen.grad_norm):
        yield "every number of it is finite"
    elif seen.first_bad is not None:
        yield f"not finite first: {seen.first_bad}"
    else:
        yield "the forward pass is finite"
    if seen.bad_gradients:
        more = f", ... ({len(seen.bad_gradients)} in all)" if len(seen.bad_gradients) > SHOWN else ""
        yield f"gradients that are not finite, from the loss on: {', '.join(seen.bad_gradients[:SHOWN])}{more}"
    if seen.culprits:
        yield f"finite without any of these samples: {', '.join(seen.culprits)}"
    if seen.no_contributions:
        yield f"no losses by sample: {seen.no_contributions}"
    elif all(math.isfinite(value) for value in seen.contributions.values()):
        highest = sorted(seen.contributions.items(), key=lambda item: -item[1])[:SHOWN]
        yield "highest losses by sample: " + ", ".join(f"{key} {value:.4g}" for key, value in highest)
