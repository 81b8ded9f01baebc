"""Evaluation mode of teacher and frozen parts, the teacher's first weights, and what collators may draw from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from score_values import reported
from torch import Tensor, nn

from distill_core.batch import Batch, Group, View, Views
from distill_core.errors import RecipeErrors, UserError
from distill_core.interfaces import Backbone, Collator, Loss
from distill_core.outputs import Encoded, Outputs, Progress
from distill_core.plan import BackboneSpec, Needs, Plan
from distill_core.recipe.build import build_objective, models_of
from distill_core.recipe.resolve import load_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Entry, Registry
from distill_core.run.folder import RunFolder
from distill_core.train import Trainer
from distill_vl.vit import PictureCollator


class Drawing:
    """Stacks pictures, and draws a mask for each from its sample's seed."""

    def __call__(self, samples: list[list[View]], seeds: Sequence[int]) -> Views:
        views = PictureCollator(8)(samples)
        masks = torch.from_numpy(np.stack([np.random.default_rng(seed).random(4) < 0.5 for seed in seeds]))
        for group in views.groups:
            group.token_mask = masks.expand(group.x.shape[0], -1, -1)
        return views


class Noisy(Backbone):
    """Batch statistics and dropout: what must hold still in a teacher and in a frozen tower."""

    name = "noisy"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.proj = nn.Linear(3, 16)

    @classmethod
    def spec(cls, config: Any) -> BackboneSpec:
        return BackboneSpec(3, 16, can_mask=True)

    @classmethod
    def collator(cls, config: Any) -> Collator:
        return Drawing()

    def encode(self, x: Tensor, *, tokens: bool, token_mask: Tensor | None) -> Encoded:
        pooled = self.proj(self.drop(self.norm(x.mean((2, 3)))))
        return Encoded(pooled, x.flatten(2).transpose(1, 2) if tokens else None)


class TeacherTokens(Loss):
    """Reads the teacher's tokens of the second global view."""

    name = "teacher_tokens"

    @classmethod
    def needs(cls, config: Any, plan: Plan) -> Needs:
        return Needs(teacher={"default": {"image": (1,)}}, masked=("image",))

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        assert list(outputs.teacher["default"]["image"].tokens) == [1]
        return {"teacher_tokens": outputs.student["image"].pooled.square().mean()}, {}


@pytest.fixture
def more(registry: Registry) -> Registry:
    return Registry([*registry.entries.values(), Entry(Noisy, "mine", "mine"), Entry(TeacherTokens, "mine", "mine")])


NOISY = ("backbone.image={name: noisy}", "fusion=null", "loss=[{name: contrastive}]")
Load = Callable[..., Recipe]


@pytest.fixture
def load(tiny_recipe: Path, more: Registry) -> Load:
    def recipe(*overrides: str) -> Recipe:
        return load_recipe(tiny_recipe, registry=more, overrides=overrides)

    return recipe


def batch() -> Batch:
    image = Views([Group(torch.randn(2, 6, 3, 16, 16)), Group(torch.randn(1, 6, 3, 8, 8), "local")])
    ids = torch.randint(1, 49000, (3, 6, 7))
    ids[..., -1] = 49407
    return Batch({"image": image, "text": Views([Group(ids[:2]), Group(ids[2:], "local")])}, list("abcdef"))


def test_the_teacher_is_in_evaluation_mode(load: Load) -> None:
    """Catches dropout in the teacher, and batch statistics that it gathers itself."""
    objective = build_objective(load(*NOISY))
    objective.train()
    teacher: Any = objective.teachers["default"]
    assert not any(module.training for module in teacher.modules())
    data = batch()
    first, second = (objective.represent_teachers(data)["default"]["image"].pooled for _ in range(2))
    assert torch.equal(first, second)
    student: Any = objective.backbone["image"]
    assert student.norm.num_batches_tracked == 0
    objective.represent(data, Progress(0, 1))
    assert student.norm.num_batches_tracked > 0
    teacher.move(Progress(0, 1))
    taught: Any = teacher.backbone["image"]
    assert torch.equal(taught.norm.running_mean, student.norm.running_mean)


def test_frozen_parts_stay_in_evaluation_mode(load: Load) -> None:
    """Also after an evaluation, which switches modes back and forth."""
    recipe = load(*NOISY)
    objective = build_objective(recipe)
    objective.trainable(["backbone.image.norm"], {})
    for _ in range(2):
        objective.train()
        noisy: Any = objective.backbone["image"]
        assert not noisy.norm.training
        assert noisy.drop.training
        pictures = [np.full((16, 16, 3), i, dtype=np.uint8) for i in range(3)]
        model = models_of(recipe, objective, torch.device("cpu"))["student"]
        assert torch.equal(model.encode("image", pictures), model.encode("image", pictures))
        assert not noisy.norm.training
        assert noisy.drop.training


def test_a_teacher_starts_from_loaded_weights(load: Load, tmp_path: Path) -> None:
    """Catches a teacher that keeps its random weights when only the student is given some."""
    source = build_objective(load("seed=7"))
    part = {
        k.removeprefix("backbone.image."): v for k, v in source.state_dict().items() if k.startswith("backbone.image.")
    }
    save_file({key: value.contiguous() for key, value in part.items()}, tmp_path / "image.safetensors")
    recipe = load(f"weights=[{{name: state_dict, source: {tmp_path / 'image.safetensors'}, to: backbone.image}}]")
    objective = Trainer(recipe, RunFolder.create(tmp_path / "runs", recipe), quiet=True).objective
    teacher: Any = objective.teachers["default"]
    for name, value in teacher.backbone["image"].state_dict().items():
        assert torch.equal(value, part[name]), name


def test_the_teachers_tokens_are_those_asked_for(load: Load) -> None:
    loss = "loss=[{name: teacher_tokens}]"
    objective = build_objective(load(NOISY[0], "fusion=null", loss, "augment.image.global=2"))
    objective.losses(objective.represent(batch(), Progress(0, 1)))
    with pytest.raises(RecipeErrors, match="the teacher does not see it"):
        load(NOISY[0], "fusion=null", loss, "augment.image.global=1")
    with pytest.raises(RecipeErrors, match="its backbone cannot hide tokens"):
        load("fusion=null", loss, "augment.image.global=2")


def test_collators_draw_from_the_samples_seeds(load: Load, tmp_path: Path) -> None:
    """Catches masks that depend on batches or on a process's history (one stream: all are in the first epoch)."""
    masks: list[dict[str, list[bool]]] = []
    for workers, size in ((0, 4), (1, 3)):
        recipe = load(*NOISY, f"data.workers={workers}", f"data.batch_size={size}")
        trainer = Trainer(recipe, RunFolder.create(tmp_path / "runs", recipe), quiet=True)
        seen: dict[str, list[bool]] = {}
        for found in trainer.loader:
            assert found.views["image"].groups[0].token_mask is not None
            for key, mask in zip(found.keys, found.views["image"].groups[0].token_mask[0].tolist(), strict=True):
                seen.setdefault(key, mask)  # the first epoch's
            if len(seen) == 12:
                break
        masks.append(seen)
    assert masks[0] == masks[1]
    assert len({tuple(mask) for mask in masks[0].values()}) > 3


def test_roles_must_be_together(load: Load, more: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    crop = more.get("augmentation", "multi_crop").cls
    monkeypatch.setattr(crop, "roles", classmethod(lambda cls, config: ("global", "local", "global")))
    with pytest.raises(RecipeErrors, match="each role must be together"):
        load()


@pytest.mark.slow
def test_a_failed_task_leaves_a_report(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The classes' field is missing: retrieval is scored all the same, and the run says what to do."""
    recipe = load("evaluate.tasks=[{name: zero_shot, label: klass}, {name: retrieval}]")
    folder = RunFolder.create(tmp_path / "runs", recipe)
    result = Trainer(recipe, folder, quiet=True).run()
    assert (folder.path / "report.json").is_file()
    assert (folder.path / "report.png").is_file()
    assert "student/retrieval/M" in reported(result.scores)
    assert len(result.failed) == 1
    assert "klass" in result.failed[0]
    assert "not evaluated" in capsys.readouterr().err
    from distill_core.commands.training import _finish

    with pytest.raises(UserError, match="distill eval"):
        _finish(result)


@pytest.mark.slow
def test_resume_from_an_older_checkpoint_without_the_init_file(load: Load, tmp_path: Path) -> None:
    source = tmp_path / "first.pt"
    torch.save(build_objective(load()).state_dict(), source)
    recipe = load(f"weights=[{{name: state_dict, source: {source}}}]", "train.checkpoint={every: 1, keep: 4}")
    folder = RunFolder.create(tmp_path / "runs", recipe)
    whole = Trainer(recipe, folder, quiet=True)
    whole.run()
    source.unlink()
    again = Trainer(recipe, folder, resume="2", quiet=True)
    assert again.state.step == 2
    again.run()
    for (name, a), b in zip(whole.objective.state_dict().items(), again.objective.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_same_modes_after_a_failing_batch(load: Load) -> None:
    """An error while encoding must not leave the student in evaluation mode."""
    objective = build_objective(load(*NOISY))
    model = models_of(load(*NOISY), objective, torch.device("cpu"))["student"]
    model.collators["image"] = lambda samples, seeds: SimpleNamespace(map=lambda f: None)  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        model.encode("image", [np.zeros((16, 16, 3), dtype=np.uint8)])
    assert objective.backbone["image"].training
