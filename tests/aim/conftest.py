"""A finished run with Aim, once for the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from distill_core.registry import Registry
from distill_core.resolve import load_recipe
from distill_core.tracking import RunFolder
from distill_core.train import Trainer
from tests.conftest import RECIPE

pytest.importorskip("aim", reason="aim is not installed")


@pytest.fixture(scope="session")
def aim_run(
    tmp_path_factory: pytest.TempPathFactory, write_shards: Callable[..., list[Path]], registry: Registry
) -> RunFolder:
    """COSMOS on 16 px, 12 steps, evaluated on the way and at the end."""
    folder = tmp_path_factory.mktemp("aim")
    write_shards(folder / "shards", 3, 4)
    for split in ("validation", "test"):
        write_shards(folder / "shards", 1, 4, prefix=split)
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE.format(folder=folder / "shards"), encoding="utf-8")
    overrides = ["tracking={name: aim, media: 2, media_every: 6}", "train.steps=12", "evaluate.every=6"]
    loaded = load_recipe(recipe, registry=registry, overrides=overrides)
    made = RunFolder.create(folder / "runs", loaded)
    Trainer(loaded, made, quiet=True).run()
    return made
