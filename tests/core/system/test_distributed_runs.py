"""Runs of two ranks through the trainer are those of one process: stages in every layout, samples that lack a modality,
and a bad step that is run again."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from beside import load_beside
from launching import launched
from PIL import Image

from distill_core.recipe.resolve import load_recipe
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("distributed_runs.py")
BLACK = "bad-1-2"
# with a large eps: AdamW would make full steps of gradients that are rounding
COMMON = ("evaluate=null", "train.checkpoint={every: 1, keep: 99}", "train.optimizer.eps=1e-2", "seed=3")
STAGES = (
    *COMMON,
    "data.source={name: webdataset, urls: SHARDS/train-*.tar}",
    "loss=[{name: contrastive}]",
    "teacher=null",
    "train.steps=8",
    "stages=[{at: 0.5, set: {loss.contrastive.weight: 0.25, augment.image.local: 2, "
    "train.clip_grad: {by: part, max: 0.2}, "
    "train.optimizer.weight_decay: {name: ramp, start: 0.0, end: 0.6}}}, "
    "{at: 6, set: {teacher: {momentum: 0.8}, loss.1: {name: cross_modal_distillation}, freeze: [backbone.image.conv1], "
    "loss.2: {name: dino, id: new, prototypes: 8, hidden: 8, bottleneck: 4}, train.lr_factors: {backbone.text: 0.5}, "
    "train.clip_grad: {by: parameter, max: 0.1}}}]",
)
PRESENCE = (
    *COMMON,
    "data.source={name: mixture, of: {pairs: {name: webdataset, urls: SHARDS/train-*.tar}, "
    "pictures: {name: webdataset, urls: SHARDS/pictures-*.tar}}}",
    "data.optional=[text]",
    "train.steps=9",
)
CASES = {
    "stages": STAGES,
    "stages-parts": (*STAGES, "train.parallel={shard: all, checkpointing: full}"),
    "stages-few": (*STAGES, "train.parallel={shard: all, micro_batch: 1}"),
    "presence": (*PRESENCE, "data.workers=1"),
    "presence-parts": (*PRESENCE, "train.parallel.shard=all"),
    "bad": (
        *COMMON,
        "data.source={name: webdataset, urls: SHARDS/bad-*.tar}",
        "loss=[{name: contrastive}, {name: spread}]",
        "train.steps=6",
        "train.nonfinite=skip",
        "train.checkpoint.every=2",
    ),
}


def png(color: int | None, number: int = 0) -> bytes:
    file = io.BytesIO()
    noise = torch.randint(0, 256, (20, 20, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    (Image.fromarray(noise.numpy()) if color is None else Image.new("RGB", (20, 20), color)).save(file, "PNG")
    return file.getvalue()


@dataclass
class Made:
    """Folders of the same runs, by one process and by two ranks, and what these saw of the bad step."""

    one: Path
    two: Path
    replayed: dict[str, Any]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_beside(__file__, "distributed_runs")


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
    write_shards: Callable[..., list[Path]],
    recipe_text: str,
    script: ModuleType,
) -> Made:
    folder = tmp_path_factory.mktemp("runs")
    shards = folder / "shards"
    write_shards(shards, 3, 4)
    alone = {(i, j): {"png": png(None, 4 * i + j)} for i in range(2) for j in range(4)}
    write_shards(shards, 2, 4, prefix="pictures", replace=alone)
    write_shards(shards, 3, 4, prefix="bad", replace={(1, 2): {"png": png(0), "txt": b"a night"}})
    file, registry = folder / "tiny.yaml", script.components()
    file.write_text(recipe_text.format(folder=shards).replace("  - {name: cross_modal_distillation}\n", ""))
    for name, overrides in CASES.items():
        filled = [text.replace("SHARDS", str(shards)) for text in overrides]
        for ranks, runs in ((1, folder / "one"), (2, folder / "two")):
            own = [*filled, f"name={name}", f"data.batch_size={4 // ranks}"]
            RunFolder.create(runs, load_recipe(file, registry=registry, overrides=own))
    launched(2, SCRIPT, folder / "two")
    for path in (folder / "one").iterdir():
        script.train(RunFolder(path), registry)
    return Made(folder / "one", folder / "two", json.loads((folder / "two.json").read_text()))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_process(made: Made, name: str) -> None:
    """After every step: the weights, the losses, the place in the data. Catches a stage that ranks enter with other
    weights, optimiser state that lies elsewhere after it or after a resume, a limit of a rank's own part, a mean over
    ranks that have other numbers of texts, and a batch that depends on the number of ranks."""
    one, two = Checkpoints(made.one / name), Checkpoints(made.two / name)
    assert one.steps() == two.steps()
    for step in one.steps():
        a, b = one.read(str(step)), two.read(str(step))
        assert a["stage"] == b["stage"]
        assert [rank["data"]["position"] for rank in b["ranks"]] == [a["ranks"][0]["data"]["position"]] * 2
        assert len(b["ranks"]) == 2
        for key, x in a["objective"].items():
            torch.testing.assert_close(b["objective"][key], x, rtol=1e-4, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}")
        states = a["optimizer"]["state"]
        assert states.keys() == b["optimizer"]["state"].keys()
    rows = [[row for row in RunFolder(path / name).rows() if "terms" in row] for path in (made.one, made.two)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for mine, theirs in zip(*rows, strict=True):
        for term, value in mine["terms"].items():
            assert theirs["terms"][term] == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6))
        assert theirs["grad_norm"] == (mine["grad_norm"] and pytest.approx(mine["grad_norm"], rel=1e-3))


def test_presence_is_counted_over_ranks(made: Made) -> None:
    """Two passes over 12 pairs and 8 pictures alone, but for a batch of them."""
    counts = [json.loads((path / "presence" / "report.json").read_text()) for path in (made.one, made.two)]
    assert counts[0]["absences"] == counts[1]["absences"]
    assert counts[0]["absences"]["text"] > 8
    assert counts[0]["samples_by_set"] == counts[1]["samples_by_set"]
    rows = [row for row in RunFolder(made.two / "presence").rows() if "terms" in row]
    assert len({row["metrics"]["present/text"] for row in rows}) > 1


def test_a_bad_step_of_two_ranks_is_replayed(made: Made, script: ModuleType) -> None:
    """By two ranks, and by one process, which has the samples of both; and the healthy step before it. Catches batches
    of one rank alone where no checkpoint says how large they were, samples in another order, a capture of the first
    rank alone, and a rank that is not named."""
    folder = RunFolder(made.two / "bad")
    (note, *_) = [row for row in folder.rows() if "not_finite" in row]
    capture = json.loads((folder.path / "bad-steps" / f"step-{note['step']:08d}.json").read_text())
    assert BLACK in note["keys"]
    assert len(capture["ranks"]) == len(capture["random"]) == 2
    assert capture["keys"] == note["keys"] == made.replayed["keys"]
    rank = note["keys"].index(BLACK) // 2
    assert capture["ranks"][rank]["terms"]["spread"] == "nan"
    assert math.isfinite(capture["ranks"][1 - rank]["terms"]["spread"])
    assert made.replayed["first_bad"].startswith(f"rank {rank}: what comes out of loss.spread")
    mean = sum(own["terms"]["contrastive"] for own in capture["ranks"]) / 2
    assert made.replayed["terms"]["contrastive"] == pytest.approx(mean, rel=1e-6)
    seen = script.replay(folder, script.components())
    assert seen.captured
    assert seen.start == made.replayed["start"]
    assert list(seen.keys) == note["keys"]
    assert list(seen.culprits) == [BLACK]
    assert seen.terms["contrastive"] == pytest.approx(mean, rel=1e-5)
    healthy = script.replay(folder, script.components(), 1)
    assert (note["step"], healthy.start, healthy.captured) == (2, 0, False)
    assert healthy.loss == pytest.approx(healthy.logged, rel=1e-5)
