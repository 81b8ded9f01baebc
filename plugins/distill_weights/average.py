"""`distill average`: a run whose weights are the mean of several runs' weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from distill_core import UserError
from distill_core.tools import Checkpoints, Registry, RunFolder, run_recipe
from distill_weights.initializers import parts


def write(runs: Sequence[Path], share: float | None, base: Path, name: str) -> Iterator[str]:
    """Writes the run folder `base/NAME` with the last checkpoint of the first run, in which each of the student's
    tensors that all runs have is their mean; yields lines for the user.

    `share` is that of the first run, the others have equal parts of the rest; None is equal parts of all. Raises
    `UserError` where the runs' tensors do not fit one another.
    """
    if len(runs) < 2:
        raise UserError(f"{runs[0]}: name at least one more run to average it with")
    rest = 1 - share if share is not None else 1 - 1 / len(runs)
    shares = [1 - rest, *[rest / (len(runs) - 1)] * (len(runs) - 1)]
    formula = " + ".join(f"{part:.3g} {run.resolve().name}" for part, run in zip(shares, runs, strict=True))
    registry = Registry.discover()
    recipe = run_recipe(runs[0], registry, (f"name={name}", f"tags.average={formula}"))
    for other in runs[1:]:
        run_recipe(other, registry)  # refuses what is no run
    states = [Checkpoints(run).read() for run in runs]
    averaged, alone = mean([state["objective"] for state in states], shares, runs)
    folder = RunFolder.create(base, recipe)
    step = states[0]["step"]
    Checkpoints(folder.path).save(step, states[0] | {"objective": states[0]["objective"] | averaged})
    yield f"{folder.path}: {formula}, {len(averaged)} tensors, at step {step} of {runs[0]}"
    if alone:
        yield f"as in {runs[0]} alone: {', '.join(parts(alone))}"


def mean(
    states: Sequence[dict[str, Tensor]], shares: Sequence[float], names: Sequence[Path]
) -> tuple[dict[str, Tensor], list[str]]:
    """(the tensors that all states have, averaged; the names of those that the first has alone), without teachers'.

    Raises `UserError` for tensors of other shapes, and where the states share none.
    """
    first, *others = states
    own = [name for name, tensor in first.items() if tensor.is_floating_point() and not name.startswith("teacher.")]
    shared = [name for name in own if all(name in other for other in others)]
    for name in shared:
        for run, other in zip(names[1:], others, strict=True):
            if other[name].shape != first[name].shape:
                raise UserError(
                    f"{run}: {name} has the shape {list(other[name].shape)}, of {names[0]} {list(first[name].shape)}: "
                    "only runs of the same towers can be averaged"
                )
    if not shared:
        raise UserError(
            f"{', '.join(map(str, names[1:]))}: no tensor in common with {names[0]}; average runs of the same recipe"
        )
    averaged = {}
    for name in shared:
        parts_of_mean = [part * state[name].double() for part, state in zip(shares, states, strict=True)]
        averaged[name] = torch.stack(parts_of_mean).sum(0).to(first[name].dtype)
    return averaged, [name for name in own if name not in averaged]
