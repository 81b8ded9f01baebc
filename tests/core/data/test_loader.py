"""Batches from worker processes: what the state means, and how a worker's errors reach the user."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill_core.batch import Batch, Sample, View
from distill_core.data.lengths import measure
from distill_core.data.loader import Loader
from distill_core.data.shard import PATIENCE, Shard
from distill_core.data.tar_shards import TarShard
from distill_core.errors import DataError
from distill_core.recipe.resolve import load_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Entry, Registry
from distill_vl.captions import CaptionAugmentation, CaptionConfig
from distill_vl.multi_crop import MultiCrop, MultiCropConfig

Write = Callable[..., list[Path]]


class Stumbles(CaptionAugmentation):
    """A plugin's augmentation with a bug: it fails on one sample."""

    name = "stumbles"
    Config = CaptionConfig

    @classmethod
    def roles(cls, config: CaptionConfig) -> tuple[str, ...]:
        return ("global",)

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        if sample["__key__"] == "train-1-2":
            raise ZeroDivisionError("a slip of the plugin")
        return [View("a bird")]


class OddCrops(MultiCrop):
    """A plugin's augmentation that does not tell the shapes of its views, so that no recipe is refused for them."""

    name = "odd_crops"
    Config = MultiCropConfig

    @classmethod
    def shapes(cls, config: MultiCropConfig) -> None:
        return None


@pytest.fixture
def shards(tiny_recipe: Path) -> list[Path]:
    return sorted((tiny_recipe.parent / "shards").glob("train-*.tar"))


def loader_of(recipe: Recipe, paths: list[Path], **options: int) -> Loader:
    shards: list[Shard] = [TarShard(path) for path in paths]
    return Loader(recipe, shards, measure(shards, PATIENCE), **options)


def recipe_of(file: Path, registry: Registry, *overrides: str) -> Recipe:
    return load_recipe(file, registry=registry, overrides=overrides)


def failure_of(loader: Loader) -> str:
    """The `DataError` of the first 30 batches.

    Not by pytest.raises: it keeps the loader in a reference cycle, and torch takes 5 s a worker to close one of those.
    """
    try:
        list(islice(loader, 30))
    except DataError as error:
        return str(error)
    pytest.fail("30 batches came without an error")


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(a: Batch, b: Batch) -> bool:
    return a.keys == b.keys and all(
        torch.equal(one.x, other.x)
        for name in a.views
        for one, other in zip(a.views[name].groups, b.views[name].groups, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_state_is_that_of_the_last_batch_handed_out(
    tiny_recipe: Path, registry: Registry, shards: list[Path], workers: int
) -> None:
    """After a resume the next batch is the next one, though workers had prefetched others; through torch's safe load.

    Catches a state taken where the workers are, one that torch.load refuses, and worker numbers that get mixed up.
    """
    recipe = recipe_of(tiny_recipe, registry, f"data.workers={workers}", "data.prefetch=3")
    loader = loader_of(recipe, shards)
    batches, states = [], []
    for batch in islice(loader, 10):
        batches.append(batch)
        states.append(through_a_file(loader.state_dict()))
    assert [len(batch) for batch in batches] == [4] * 10
    assert {key for batch in batches[:3] for key in batch.keys} <= {
        f"train-{i}-{j}" for i in range(3) for j in range(4)
    }
    for done in (1, 3, 4, 5):  # the first epoch ends after 3 batches
        resumed = loader_of(recipe, shards)
        resumed.load_state_dict(states[done - 1])
        for expected, got in zip(batches[done : done + 3], resumed, strict=False):
            assert same(expected, got), f"after {done} batches"
    assert not same(batches[0], batches[1])


def test_batches_have_the_views_of_the_recipe(tiny_recipe: Path, registry: Registry, shards: list[Path]) -> None:
    (batch,) = islice(loader_of(recipe_of(tiny_recipe, registry), shards), 1)
    image, text = batch.views["image"], batch.views["text"]
    assert [(g.role, tuple(g.x.shape)) for g in image.groups] == [
        ("global", (2, 4, 3, 16, 16)),
        ("local", (1, 4, 3, 8, 8)),
    ]
    assert image.roles == text.roles == ("global", "global", "local")
    assert [(g.role, tuple(g.x.shape[:2])) for g in text.groups] == [("global", (2, 4)), ("local", (1, 4))]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_workers_failure_is_one_line(tiny_recipe: Path, registry: Registry, shards: list[Path], workers: int) -> None:
    """Catches a traceback of a worker process, a hang, and batches after the failure."""
    recipe = recipe_of(tiny_recipe, registry, f"data.workers={workers}")
    loader = loader_of(recipe, shards)
    for shard in shards:
        Path(shard).write_bytes(b"no tar any more" * 100)
    message = failure_of(loader)
    assert re.search(
        r"no shard can be read: the last 3 failed, the last one .*train-00.\.tar: not a readable tar", message
    )
    assert "\n" not in message
    assert "Traceback" not in message


@pytest.mark.parametrize("workers", [0, 2])
def test_all_samples_bad(tiny_recipe: Path, registry: Registry, write_shards: Write, workers: int) -> None:
    """Catches workers that turn for ever over data that does not fit the recipe."""
    folder = tiny_recipe.parent / "bad"
    paths = write_shards(folder, 3, 4, replace={(i, j): {"txt": b"a bird"} for i in range(3) for j in range(4)})
    loader = loader_of(recipe_of(tiny_recipe, registry, f"data.workers={workers}"), paths)
    message = failure_of(loader)
    assert re.search(r"(no|too many) samples? can.* be used: .*no picture: none of the fields", message)
    assert "\n" not in message


@pytest.mark.parametrize("workers", [0, 2])
def test_an_augmentations_own_error_names_the_sample(
    tiny_recipe: Path, registry: Registry, shards: list[Path], workers: int
) -> None:
    """Catches a plugin's bug that shows up as a skipped sample, or without the sample it happened on."""
    both = Registry([*registry.entries.values(), Entry(Stumbles, "mine", "mine")])
    recipe = recipe_of(
        tiny_recipe, both, "augment.text={name: stumbles}", "loss=[{name: contrastive}]", f"data.workers={workers}"
    )
    message = failure_of(loader_of(recipe, shards))
    for part in ("train-001.tar", "'train-1-2'", "augment.text (stumbles)", "ZeroDivisionError: a slip of the plugin"):
        assert part in message
    assert "\n" not in message


def test_views_that_do_not_fit_the_tower_name_the_samples(
    tiny_recipe: Path, registry: Registry, shards: list[Path]
) -> None:
    """Catches a collator's error without a hint of which batch it was."""
    both = Registry([*registry.entries.values(), Entry(OddCrops, "mine", "mine")])
    recipe = recipe_of(
        tiny_recipe, both, "augment.image.name=odd_crops", "augment.image.local_size=9", "data.workers=2"
    )
    message = failure_of(loader_of(recipe, shards))
    assert re.search(r"samples train-.*cannot be collated: ValueError: crops of 9 x 9 px", message)


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_samples_come_with_a_batch(
    tiny_recipe: Path, registry: Registry, write_shards: Write, workers: int
) -> None:
    """Catches skipped samples that are lost between worker and trainer, or counted twice."""
    folder = tiny_recipe.parent / "some"
    paths = write_shards(folder, 4, 5, replace={(2, 1): {"png": b"no", "txt": b"a"}, (3, 3): {"png": b"", "txt": b"a"}})
    recipe = recipe_of(
        tiny_recipe,
        registry,
        f"data.workers={workers}",
        "data.batch_size=3",
        "data.shuffle=2",
        "data.max_bad_fraction=0.2",
    )
    batches = list(islice(loader_of(recipe, paths), 20))  # 3 passes of 20
    skipped = [skip for batch in batches for skip in batch.skipped]
    assert {(skip.key, Path(skip.url).name) for skip in skipped} == {
        ("train-2-1", "train-002.tar"),
        ("train-3-3", "train-003.tar"),
    }
    assert len(skipped) == 6, "once a pass each"
    assert not {"train-2-1", "train-3-3"} & {key for batch in batches for key in batch.keys}
