"""No method makes the host wait for the device in a step: what it counts or reads there is counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from host_reads import HostReads
from other_runs import stand_ins

from distill_core.data.example import example_batch
from distill_core.outputs import Progress
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry

TINY = sorted((Path(__file__).parents[2] / "recipes").glob("*_tiny.yaml"))
DATA = ("data.source={name: webdataset, urls: x.tar, test: y.tar}", "evaluate=null")


@pytest.mark.parametrize("path", TINY, ids=[path.stem for path in TINY])
def test_a_step_reads_nothing_of_the_device(path: Path, registry: Registry) -> None:
    """Towers, fusion and losses, backward, and the losses' own state; batches as the loader makes them.

    Would catch a mask as an index, lengths that are counted where the tokens are, a temperature that is read back.
    """
    recipe = load_recipe(path, registry=registry, overrides=[*DATA, *stand_ins(path)])
    torch.manual_seed(0)
    objective, batch, progress = build_objective(recipe), example_batch(recipe, 4), Progress(1, 9)
    reads = HostReads()
    with reads:
        reads.mark(*objective.parameters(), *objective.buffers())
        batch._map(lambda x: (reads.mark(x), x)[1])
        outputs = objective.represent(batch, progress)
        losses = objective.losses(outputs)
        losses.total.backward()
        finite = torch.isfinite(losses.total)
        objective.before_optimizer(progress, finite)
        objective.after_step(outputs, progress, finite)
    for name, value in (losses.terms | losses.metrics).items():
        assert reads.on_device(value), f"{name} is made on the host: to copy it to the device is to wait for it"
    assert reads.lines == []
