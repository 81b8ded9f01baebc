"""A run with a joint tower; run by test_joint_towers.

`python -m torch.distributed.run --nproc-per-node N distributed_joint_tower.py RECIPE RUNS OVERRIDE ...`
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from one_tower import OneTower, Together

from distill_core.commands.training import run
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Entry, Registry

if __name__ == "__main__":
    own = [Entry(component, "outside", "outside") for component in (OneTower, Together)]
    registry = Registry([*Registry.discover().entries.values(), *own])
    recipe = load_recipe(sys.argv[1], registry=registry, overrides=sys.argv[3:])
    run(recipe, Path(sys.argv[2]), registry, quiet=True)
