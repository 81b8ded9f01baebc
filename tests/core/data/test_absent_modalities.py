"""A run on pictures with texts and pictures without (`data.optional`): what it trains on, counts, refuses, resumes."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from distill_core import Loss, LossConfig, Needs, Outputs, Plan
from distill_core.data.lengths import Lengths
from distill_core.data.loader import Loader
from distill_core.errors import DataError, RecipeErrors
from distill_core.outputs import Progress
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import load_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Entry, Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_core.train import Trainer

Make = Callable[..., Trainer]


class Nearness(Loss):
    """A stranger's: pairs should be near, and different samples' pictures at right angles."""

    name = "nearness"
    partial = True

    @classmethod
    def needs(cls, config: LossConfig, plan: Plan) -> Needs:
        return Needs(student=("image", "text"))

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        images, texts = (outputs.student[name].embedding[0] for name in ("image", "text"))
        alike = images @ images.T
        others = alike.square().sum() - alike.diagonal().square().sum()
        near = (1 - (images * texts).sum(-1)).mean()
        return {"near": near + others / max(len(images) * (len(images) - 1), 1)}, {}


class NeedsAll(Nearness):
    """As that, but it does not say that it can do without some samples."""

    name = "needs_all"
    partial = False


@pytest.fixture(scope="module")
def strangers(registry: Registry) -> Registry:
    return Registry([*registry.entries.values(), *(Entry(cls, "mine", "mine") for cls in (Nearness, NeedsAll))])


@pytest.fixture
def recipe(
    tiny_recipe: Path, strangers: Registry, tmp_path: Path, write_shards: Callable[..., list[Path]]
) -> Callable[..., Recipe]:
    """12 samples with both (set `pairs`), and 8 pictures alone (set `pictures`)."""
    shards = tmp_path / "shards"
    alone = {(i, j): {"png": picture(4 * i + j)} for i, j in np.ndindex(2, 4)}
    write_shards(shards, 2, 4, prefix="pictures", replace=alone)
    sources = (
        f"{{pairs: {{name: webdataset, urls: {shards}/train-*.tar, test: {shards}/test-*.tar}}, "
        f"pictures: {{name: webdataset, urls: {shards}/pictures-*.tar}}}}"
    )

    def make(*overrides: str) -> Recipe:
        mixture = f"data.source={{name: mixture, of: {sources}}}"
        return load_recipe(
            tiny_recipe, registry=strangers, overrides=[mixture, "data.optional=[text]", "evaluate=null", *overrides]
        )

    return make


def picture(number: int) -> bytes:
    """A PNG of noise."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def trainer(recipe: Callable[..., Recipe], tmp_path: Path) -> Make:
    def make(*overrides: str, resume: str | None = None) -> Trainer:
        made, runs = recipe(*overrides), tmp_path / "runs"
        folder = RunFolder(runs / made.name) if resume else RunFolder.create(runs, made)
        return Trainer(made, folder, resume=resume, quiet=True)

    return make


def report(trainer: Trainer) -> dict[str, Any]:
    trainer.run()
    return json.loads((trainer.folder.path / "report.json").read_text())  # type: ignore[no-any-return]


def loader_of(recipe: Recipe) -> Loader:
    sets = recipe.data.source.build().sets("train")
    shards = [shard for listed in sets.values() for shard in listed]
    lengths = Lengths([len(shard) for shard in shards])
    return Loader(recipe, shards, lengths, [name for name, listed in sets.items() for _ in listed])


def test_without_the_option_they_are_skipped_and_counted(trainer: Make) -> None:
    """Would catch a sample that is trained on without its text though the recipe says nothing of that."""
    made = report(trainer("data.optional=[]", "train.steps=5", "data.max_bad_fraction=1"))
    assert made["skipped_samples"] == 8
    assert made["samples_by_set"] == {"pairs": 20}
    assert made["absences"] == {}


def test_with_it_they_are_trained_on_and_counted(trainer: Make) -> None:
    """Two passes over 20 samples, of which 8 have no text. Would catch absences that nobody hears of, or skips."""
    made = trainer("train.steps=10", "data.workers=2")
    counts = report(made)
    assert counts["skipped_samples"] == 0
    assert counts["samples_by_set"] == {"pairs": 24, "pictures": 16}
    assert counts["absences"] == {"text": 16}
    rows = made.folder.rows()
    assert sum(4 * (1 - row["metrics"]["present/text"]) for row in rows) == pytest.approx(16)


def test_a_strangers_loss_is_what_a_loop_over_the_pairs_gives(recipe: Callable[..., Recipe]) -> None:
    """Batches of 5 from the loader; embeddings sample by sample; plain sums. Would catch a text beside another's
    picture, and absent samples in a mean."""
    made = recipe("loss=[{name: nearness}]", "fusion=null", "teacher=null", "data.batch_size=5", "data.shuffle=20")
    objective, loader = build_objective(made), loader_of(made)
    sizes = set()
    for batch, _ in zip(loader, range(8), strict=False):
        texts = 0
        pairs = []
        ready = objective.on_device(batch)
        for i, key in enumerate(batch.keys):
            if key.startswith("train"):  # a sample of the set `pairs`
                image = ready.views["image"].groups[0].x[0, i]
                ids = batch.views["text"].groups[0].x[0, texts]
                texts += 1
                encoded = (
                    objective.backbone[name].encode(x[None], tokens=False, token_mask=None).pooled[0]
                    for name, x in (("image", image), ("text", ids))
                )
                pairs.append([normalize(x.detach(), dim=-1) for x in encoded])
        assert texts == batch.presence["text"].sum()
        expected = sum(1 - float(a @ b) for a, b in pairs) / max(len(pairs), 1)
        count = max(len(pairs) * (len(pairs) - 1), 1)
        expected += sum(float(a @ b) ** 2 for a, _ in pairs for b, _ in pairs if a is not b) / count
        total = objective.losses(objective.represent(batch, Progress(0, 1))).total
        assert float(total.detach()) == pytest.approx(expected, abs=1e-5)
        sizes.add(len(pairs))
    assert len(sizes) > 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batches", ["mixed", "one_set"])
def test_a_run_that_stopped_is_the_run_that_did_not(trainer: Make, workers: int, batches: str) -> None:
    """All of SLIP: towers, a batch norm of pictures, and steps without any text. Bit for bit."""
    slip = (
        "augment.image={name: slip_views, size: 16}", "augment.text={name: caption}", "fusion=null", "teacher=null",
        "loss=[{name: clip}, {name: simclr, hidden: 16, dim: 8}]", f"data.workers={workers}", f"data.batches={batches}",
        "train.checkpoint={every: 3, keep: 5}", "train.steps=9",
    )  # fmt: skip
    trainer(*slip).run()
    again = trainer(*slip, resume="3")
    whole = Checkpoints(again.folder.path / "set-aside-1").read()
    again.run()
    parts = Checkpoints(again.folder.path).read()
    assert whole["step"] == parts["step"] == 9
    for name, x in whole["objective"].items():
        assert torch.equal(x, parts["objective"][name]), name
    rows = [row for row in again.folder.rows() if "terms" in row]
    without = [row for row in rows if row["metrics"]["present/text"] == 0]
    assert without
    for row in without:
        assert row["terms"]["clip"] == 0
        assert row["terms"]["simclr"] > 0.1
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_what_is_there_and_broken_is_no_absence(
    trainer: Make, tmp_path: Path, write_shards: Callable[..., list[Path]]
) -> None:
    """Would catch a text that cannot be read taken for none, and samples without anything at all."""
    broken = {(0, 0): {"png": b"no picture", "txt": b"a boat"}, (0, 1): {"cls": b"3"}}
    shards = write_shards(tmp_path / "shards", 1, 4, prefix="odd", replace=broken)
    made = trainer(
        f"data.source={{name: webdataset, urls: {shards[0]}}}", "data.optional=[image, text]", "train.steps=4",
        "loss=[{name: clip}]", "fusion=null", "teacher=null", "data.max_bad_fraction=1",
    )  # fmt: skip
    counts = report(made)
    assert counts["skipped_samples"] == 2
    assert counts["absences"] == {"image": 0, "text": 0}
    reasons = (made.folder.path / "skipped.jsonl").read_text()
    assert "not a readable picture" in reasons
    assert "no modality at all (image: no picture" in reasons


def test_where_no_sample_has_it_the_run_says_so(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Would catch an endless search for a filler, and a run that trains a text tower on nothing."""
    made = recipe(f"data.source={{name: webdataset, urls: {tmp_path}/shards/pictures-*.tar}}", "data.workers=0")
    with pytest.raises(DataError, match=r"none of 1000 samples has 'text', which data\.optional says some lack"):
        next(iter(loader_of(made)))


def test_recipes_that_cannot_be_are_refused_with_a_line_each(recipe: Callable[..., Recipe]) -> None:
    """Would catch a loss that meets rows it does not expect, in the middle of a run."""
    with pytest.raises(RecipeErrors) as refused:
        recipe(
            "data.optional=[text, txet]",
            "loss=[{name: needs_all}, {name: clip, exchange: ring}]",
        )
    lines = str(refused.value).splitlines()
    for message in (
        "no modality or field 'txet', did you mean 'text'?",
        "'needs_all' needs 'text' of every sample, and data.optional lets some lack it",
        "exchange: ring passes as many rows from each rank, and text may be absent",
    ):
        assert sum(message in line for line in lines) == 1, lines
