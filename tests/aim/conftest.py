"""A finished run with Aim, once for the folder, and a browser to look at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from beside import load_beside

from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_core.run.folder import RunFolder
from distill_core.train import Trainer

pytest.importorskip("aim", reason="aim is not installed")


@pytest.fixture(scope="session")
def aim_run(
    tmp_path_factory: pytest.TempPathFactory,
    write_shards: Callable[..., list[Path]],
    registry: Registry,
    recipe_text: str,
) -> RunFolder:
    """COSMOS on 16 px, 12 steps, evaluated on the way and at the end."""
    folder = tmp_path_factory.mktemp("aim")
    write_shards(folder / "shards", 3, 4)
    for split in ("validation", "test"):
        write_shards(folder / "shards", 1, 4, prefix=split)
    recipe = folder / "tiny.yaml"
    recipe.write_text(recipe_text.format(folder=folder / "shards"), encoding="utf-8")
    overrides = ["tracking={name: aim, media: 2, media_every: 6}", "train.steps=12", "evaluate.every=6"]
    loaded = load_recipe(recipe, registry=registry, overrides=overrides)
    made = RunFolder.create(folder / "runs", loaded)
    Trainer(loaded, made, quiet=True).run()
    return made


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A page of a headless Chromium; the test is skipped where there is none."""
    module = load_beside(__file__, "browser")
    if module.CHROMIUM is None:
        pytest.skip("needs Chromium, which is not installed")
    opened = module.Browser(tmp_path / "profile")
    yield opened
    opened.close()
