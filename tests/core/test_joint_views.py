"""Augmentations of several modalities at once: what they make is drawn, planned, trained on, resumed and cached as the
views of one modality are. The components here are written as a stranger's package would write them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill_core import (
    AbsentModality,
    Batch,
    DataError,
    JointAugmentation,
    Loss,
    ModalityPlan,
    Needs,
    Outputs,
    Plan,
    Sample,
    View,
)
from distill_core.data.batches import Collate, Item, SampleViews
from distill_core.errors import RecipeErrors
from distill_core.recipe.resolve import load_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Entry, Registry
from distill_core.run.folder import RunFolder
from distill_core.run.replay import replay_step
from distill_core.run.showcase import Showcase
from distill_core.train import Trainer


class Turned(JointAugmentation):
    """Beside their own views a `pair`: the first picture turned by a drawn number of quarters, and a text that says by
    how many."""

    name = "turned"

    @classmethod
    def plans(cls, config: Any, own: Mapping[str, ModalityPlan]) -> Mapping[str, ModalityPlan]:
        image, text = own["image"], own["text"]
        assert image.shapes is not None
        return {
            "image": replace(image, roles=(*image.roles, "pair"), shapes=(*image.shapes, image.shapes[0])),
            "text": replace(text, roles=(*text.roles, "pair")),
        }

    def train_views(
        self, sample: Sample, own: Callable[[str], list[View]], rng: np.random.Generator
    ) -> dict[str, list[View]]:
        if b"buggy" in sample.get("txt", b""):
            raise KeyError("a bug")
        images, texts, quarters = own("image"), own("text"), int(rng.integers(4))
        turned = View(torch.rot90(images[0].data, quarters, (1, 2)), "pair", extra=images[0].extra)
        return {"image": [*images, turned], "text": [*texts, View(f"turned {quarters}", "pair")]}


class Same(Turned):
    """Their own views."""

    name = "same"

    @classmethod
    def plans(cls, config: Any, own: Mapping[str, ModalityPlan]) -> Mapping[str, ModalityPlan]:
        return own

    def train_views(
        self, sample: Sample, own: Callable[[str], list[View]], rng: np.random.Generator
    ) -> dict[str, list[View]]:
        return {name: own(name) for name in reversed(list(self.parts))}


class Scattered(Turned):
    """Views whose roles are not together."""

    name = "scattered"

    @classmethod
    def plans(cls, config: Any, own: Mapping[str, ModalityPlan]) -> Mapping[str, ModalityPlan]:
        return {**own, "text": replace(own["text"], roles=("global", "local", "global"))}


class Never(Turned):
    """Works with nothing."""

    name = "never"

    @classmethod
    def plans(cls, config: Any, own: Mapping[str, ModalityPlan]) -> Mapping[str, ModalityPlan]:
        raise ValueError(f"cannot work with {' and '.join(own)}")


class Pairs(Loss):
    """One minus the cosine of a pair's picture and text."""

    name = "pairs"

    @classmethod
    def needs(cls, config: Any, plan: Plan) -> Needs:
        return Needs(student=("image", "text"), views={"image": {"pair": 1}, "text": {"pair": 1}})

    def forward(self, outputs: Outputs) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        image, text = (outputs.student[m].embedding[-1] for m in ("image", "text"))
        return {"pairs": 1 - (image * text).sum(-1).mean()}, {}


@pytest.fixture
def more(registry: Registry) -> Registry:
    own = [Entry(cls, "mine", "mine") for cls in (Turned, Same, Scattered, Never, Pairs)]
    return Registry([*registry.entries.values(), *own])


@pytest.fixture
def recipe(tiny_recipe: Path, more: Registry) -> Callable[..., Recipe]:
    def load(*overrides: str, joint: str = "turned") -> Recipe:
        return load_recipe(
            tiny_recipe, registry=more, overrides=[f"augment.image+text={joint}", "evaluate=null", *overrides]
        )

    return load


def sample(key: str = "a", **fields: bytes) -> Sample:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(file, "PNG")
    return {"__key__": key, "__url__": "s.tar", "png": file.getvalue(), "txt": b"one. two", **fields}


def sample_views(recipe: Recipe) -> SampleViews:
    """As training makes them."""
    augment, joint = recipe.build_augmentations()
    return SampleViews(augment, recipe.seed, recipe.data.optional, joint)


def plain(views: Mapping[str, list[View]]) -> list[Any]:
    return [
        (name, view.role, view.data.tolist() if isinstance(view.data, torch.Tensor) else str(view.data))
        for name, of_modality in views.items()
        for view in of_modality
    ]


def test_the_plan_and_the_recipe_know_them(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Would catch roles and shapes of the own augmentations alone, and a saved recipe that loses the entry."""
    one = recipe("loss.2=pairs")
    assert list(one.augment) == ["image", "text"]
    assert list(one.joint) == ["image+text"]
    assert one.plan.modalities["image"].roles == ("global", "global", "local", "pair")
    assert one.plan.modalities["image"].shapes == ((3, 16, 16), (3, 16, 16), (3, 8, 8), (3, 16, 16))
    assert {m: p.joint for m, p in one.plan.modalities.items()} == {"image": "image+text", "text": "image+text"}
    (tmp_path / "again.yaml").write_text(one.to_yaml())
    more = Registry([*Registry.discover().entries.values(), *(Entry(c, "mine", "mine") for c in (Turned, Pairs))])
    again = load_recipe(tmp_path / "again.yaml", registry=more)
    assert (again.to_dict(), "image+text" in again.to_dict()["augment"]) == (one.to_dict(), True)


def test_what_does_not_fit_is_refused(recipe: Callable[..., Recipe], more: Registry, tiny_recipe: Path) -> None:
    """Each in a line, at its place, before anything is read."""

    def refused(*overrides: str) -> str:
        with pytest.raises(RecipeErrors) as caught:
            load_recipe(tiny_recipe, registry=more, overrides=["evaluate=null", *overrides])
        return "\n".join(caught.value.lines)

    assert "augment.image+text: 'caption' makes the views of one modality, and 'image+text' names several" in refused(
        "augment.image+text=caption"
    )
    assert "augment.image: 'turned' makes views of several modalities at once: write them as its key" in refused(
        "augment.image=turned", "loss=[{name: contrastive}]", "fusion=null", "teacher=null"
    )
    assert "no augmentation named 'tuned', did you mean 'turned'?" in refused("augment.image+text=tuned")
    assert "no augmentation of 'sound': give it an entry of its own" in refused("augment.image+sound=same")
    assert "'image+image' names a modality twice" in refused("augment.image+image=same")
    assert "augment.text+image: views of 'text', 'image' are made by 'image+text' already" in refused(
        "augment.image+text=same", "augment.text+image=same"
    )
    assert "'scattered' makes views in the order global, local, global; each role" in refused(
        "augment.image+text=scattered", "loss=[{name: contrastive}]", "fusion=null", "teacher=null"
    )
    assert "augment.image+text: 'never': cannot work with image and text" in refused("augment.image+text=never")
    assert "'pairs' needs 1 pair view(s) of 'text'; its augmentation makes 0" in refused("loss.2=pairs")


def test_draws_are_of_seed_epoch_and_key(recipe: Callable[..., Recipe]) -> None:
    """The modalities' own draws are those of a recipe without it, in the recipe's order; its own change with seed,
    epoch, key and repetition. Would catch a generator that both share, and draws of the process."""
    views, own = sample_views(recipe()), sample_views(recipe(joint="none"))
    assert plain(sample_views(recipe(joint="same"))(sample(), 3)) == plain(own(sample(), 3))
    np.random.seed(1)
    torch.manual_seed(1)
    assert plain(views(sample(), 3)) == plain(views(sample(), 3))
    others = {name: of_modality[:-1] for name, of_modality in views(sample(), 3).items()}
    assert plain(others) == plain(own(sample(), 3))

    def turns(draw: Callable[[int], Mapping[str, list[View]]]) -> list[str]:
        return [str(draw(i)["text"][-1].data) for i in range(40)]

    rows = [
        turns(lambda i: views(sample(), i)),
        turns(lambda i: views(sample(str(i)), 0)),
        turns(lambda i: views(sample(), 0, (i,))),
        turns(lambda i: sample_views(recipe(f"seed={i}"))(sample(), 0)),
    ]
    assert all(len(set(row)) == 4 for row in rows), "every number of quarters is drawn"
    assert len({tuple(row) for row in rows}) == len(rows)


def test_a_sample_that_lacks_a_modality(recipe: Callable[..., Recipe]) -> None:
    """The one that it has keeps its own views, where the recipe lets samples lack the other. Would catch a sample that
    is lost, and views of other roles than the plan's."""
    options = ("data.optional=[text]", "fusion=null", "teacher=null", "loss=[{name: contrastive}]")
    views = sample_views(recipe(*options, joint="same"))
    full = sample()
    bare = {name: value for name, value in full.items() if name != "txt"}
    assert plain(views(bare, 0)) == [view for view in plain(views(full, 0)) if view[0] == "image"]
    with pytest.raises(AbsentModality):
        views({name: value for name, value in full.items() if name != "png"}, 0)
    with pytest.raises(AbsentModality):
        sample_views(recipe(joint="same"))(bare, 0)
    with pytest.raises(RecipeErrors, match="'turned' makes views of 'image' that its own augmentation does not"):
        recipe(*options)


def test_a_bug_names_the_sample_and_the_entry(recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(DataError, match=r"s\.tar: sample 'a': augment\.image\+text \(turned\) failed: KeyError"):
        sample_views(recipe())(sample(txt=b"buggy"), 0)


def test_the_tracker_sees_them(recipe: Callable[..., Recipe]) -> None:
    """Would catch sheets of the own views alone."""
    (picture,) = Showcase(recipe(), [[sample()]], 1).media(0)  # type: ignore[list-item]
    assert "text, pair: turned " in picture.caption


def train(recipe: Recipe, folder: RunFolder, resume: str | None = None) -> dict[int, Any]:
    Trainer(recipe, folder, resume=resume, quiet=True).run()
    rows = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["terms"] for row in rows if "terms" in row}


def test_training_resumes_and_replays(recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: Any) -> None:
    """With and without workers, stopped after two steps of four and continued, the same losses to the last bit; a step
    replayed is the step. Would catch draws that depend on a worker's history."""
    one = recipe("loss.2=pairs", "train.checkpoint.every=2")
    whole = train(one, RunFolder.create(tmp_path / "whole", one))
    assert {"pairs"} <= whole[1].keys()
    workers = recipe("loss.2=pairs", "train.checkpoint.every=2", "data.workers=2")
    assert train(workers, RunFolder.create(tmp_path / "workers", workers)) == whole
    folder = tmp_path / "whole" / "tiny"
    for name in ("step-00000004.pt", "last"):
        for file in (folder / "checkpoints").glob(name):
            file.unlink()
    again = train(one, RunFolder(folder), resume="last")
    assert again == whole
    assert (folder / "checkpoints" / "step-00000004.pt").exists(), "it continued from step 2"
    seen = replay_step(one, RunFolder(folder), 3, quiet=True)
    assert seen.terms == whole[3]


def test_a_frozen_teachers_own_views_would_be_other_crops(recipe: Callable[..., Recipe], tiny_recipe: Path) -> None:
    """Refused, in a line that says what to leave out."""
    vit = "{name: vit, image_size: 16, patch: 8, width: 16, layers: 2, heads: 2, dim: 16}"
    crops = "{name: multi_crop, size: 16, local_size: 8, local: 1}"
    weights = "[{name: state_dict, source: x, to: backbone}]"
    own = f"backbone: {{image: {vit}}}, augment: {{image: {crops}}}, weights: {weights}"
    with pytest.raises(RecipeErrors, match=r"augment\.image: the student's views are made by augment\.image\+text"):
        recipe(f"teachers={{big: {{name: frozen, {own}}}}}")


def test_batches_hold_them(recipe: Callable[..., Recipe]) -> None:
    """In groups of their own, as large as the batch."""
    one = recipe()
    views = sample_views(one)
    items = [Item(str(i), views(sample(str(i)), 0), i) for i in range(3)]
    collators = {name: node.cls.collator(node.config) for name, node in one.backbone.items()}
    batch: Batch = Collate(collators)(items)
    assert [group.role for group in batch.views["image"].groups] == ["global", "local", "pair"]
    assert [tuple(group.x.shape[:2]) for group in batch.views["text"].groups][-1] == (1, 3)
