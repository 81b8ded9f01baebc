"""Every layout trains, and a run continues exactly with another number of workers."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sample_layouts import CAPTIONED, class_folder, examples

from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_core.train import Trainer

IMAGES_ALONE = ["augment.text=null", "backbone.text=null", "fusion=null", "loss=[{name: dino, prototypes: 8}]"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*CAPTIONED, "class_folder"])
def test_a_run_continues_with_other_workers_bit_for_bit(
    tiny_recipe: Path, registry: Registry, tmp_path: Path, layout: str
) -> None:
    """Three steps at once, or one without workers and two with two of them: the same weights. Catches a shard that
    other processes cannot read, and an order or a view that depends on who reads it."""
    write = CAPTIONED.get(layout, class_folder)
    source = json.dumps(write(tmp_path, examples(14)))
    options = ["evaluate=null", f"data.source={source}", "train.steps=3", "train.checkpoint={every: 1, keep: 9}"]
    options += IMAGES_ALONE if layout == "class_folder" else []

    def recipe(workers: int) -> Any:
        return load_recipe(tiny_recipe, registry=registry, overrides=[*options, f"data.workers={workers}"])

    folder = RunFolder.create(tmp_path / "runs", recipe(0))
    first = Trainer(recipe(0), folder, quiet=True)
    first.run()
    assert json.loads((folder.path / "report.json").read_text())["skipped_reads"] == 0
    copy = tmp_path / "copy"
    shutil.copytree(folder.path, copy)
    for step in (2, 3):
        (copy / "checkpoints" / f"step-0000000{step}.pt").unlink()
    second = Trainer(recipe(2), RunFolder(copy), resume="last", quiet=True)
    assert second.state.step == 1
    second.run()
    expected, came = (Checkpoints(path).read() for path in (folder.path, copy))
    assert came["step"] == expected["step"] == 3
    weights = first.objective.state_dict()
    assert weights.keys() == second.objective.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in second.objective.state_dict().items())


@pytest.mark.parametrize("layout", CAPTIONED)
def test_shards_are_small_and_read_by_number(registry: Registry, tmp_path: Path, layout: str) -> None:
    """Of 2,500 samples: would catch a table that travels to the workers, and shards that are no parts of it."""
    (one,) = examples(1)
    many = [replace(one, name=f"s{i:05d}") for i in range(2500)]
    options = CAPTIONED[layout](tmp_path, many)
    source = registry.get("source", options.pop("name")).cls
    (shards,) = source(source.Config.model_validate_json(json.dumps(options))).sets("train").values()
    assert sum(map(len, shards)) == len(many)
    assert max(map(len, shards)) <= 1250
    assert len(pickle.dumps(shards)) < 10_000
    copied = pickle.loads(pickle.dumps(shards))
    for shard, other in zip(shards, copied, strict=True):
        last = len(shard) - 1
        assert dict(other[last]) == dict(shard[last])
        with pytest.raises(IndexError):
            shard[last + 1]
    keys = [sample["__key__"] for shard in shards for sample in shard]
    assert len(set(keys)) == len(many)
