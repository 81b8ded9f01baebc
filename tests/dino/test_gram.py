"""Gram anchoring against plain loops, at one resolution and at two; how a stage begins it, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from distill_core.batch import Batch, Views
from distill_core.errors import RecipeErrors
from distill_core.recipe.resolve import load_recipe, parse_recipe
from distill_core.registry import Registry
from distill_core.run.folder import RunFolder
from distill_core.train import Trainer

Rows = list[list[float]]
GRAM = "[{name: gram, teacher: late}]"
TEACHERS = "teacher: {}\nteachers: {late: {name: snapshot, source: default, every: 2OWN}}"
LARGE = ", augment: {image: {name: multi_crop, size: 24, local_size: 4, global: 2, local: 0}}"
HALVING = (-0.09375, 0.59375, 0.59375, -0.09375)
"""Keys' cubic of a = -3/4, halfway between two places and one and a half away."""


def recipe(steps: ModuleType, own: str = "") -> str:
    return str(steps.RECIPE).replace("teacher: {}", TEACHERS.replace("OWN", own))


def gram(transcription: ModuleType, patches: Rows) -> Rows:
    """DINOv3, section 4.2: X X^T of L2-normalised patches."""
    units = [transcription.unit(x) for x in patches]
    return [[transcription.dot(x, y) for y in units] for x in units]


def anchoring(transcription: ModuleType, student: list[Rows], teacher: list[Rows]) -> float:
    """The mean over pictures and pairs of patches of the squared difference of both Gram matrices."""
    squares = []
    for ours, theirs in zip(student, teacher, strict=True):
        for row, other in zip(gram(transcription, ours), gram(transcription, theirs), strict=True):
            squares += [(a - b) ** 2 for a, b in zip(row, other, strict=True)]
    return sum(squares) / len(squares)


def halved(patches: Rows, side: int) -> Rows:
    """[2 side x 2 side] patches in rows -> [side x side], cubic along each axis, the edge repeated."""

    def at(row: int, column: int) -> list[float]:
        last = 2 * side - 1
        return patches[min(max(row, 0), last) * 2 * side + min(max(column, 0), last)]

    result = []
    for row in range(side):
        for column in range(side):
            value = [0.0] * len(patches[0])
            for i, down in enumerate(HALVING):
                for j, across in enumerate(HALVING):
                    patch = at(2 * row - 1 + i, 2 * column - 1 + j)
                    value = [v + down * across * x for v, x in zip(value, patch, strict=True)]
            result.append(value)
    return result


def test_gram(steps: ModuleType, transcription: ModuleType) -> None:
    """Catches patches that are not normalised, a Gram matrix of the batch, a view against another one, the average in
    the snapshot's place, and hidden patches that are left out."""
    made = steps.objective(GRAM, recipe(steps))
    outputs = made.represent(steps.batch(), steps.PROGRESS)
    losses = made.losses(outputs)
    student, teacher = outputs.student["image"].tokens, outputs.teacher["late"]["image"].tokens
    assert list(student) == list(teacher) == [0, 1]
    views = [anchoring(transcription, student[v].tolist(), teacher[v].tolist()) for v in (0, 1)]
    assert losses.terms["gram"].item() == pytest.approx(sum(views) / 2, rel=1e-10)
    assert losses.total.item() == pytest.approx(2 * losses.terms["gram"].item()), "the paper's weight"
    losses.total.backward()
    assert all(p.grad is None for p in made.teacher.parameters())
    assert made.backbone["image"].mask_token.grad is not None


def test_gram_of_a_teacher_at_twice_the_resolution(steps: ModuleType, transcription: ModuleType) -> None:
    """Patches are halved before they are normalised. Catches another kernel, rows for columns, and smoothing first."""
    made = steps.objective(GRAM, recipe(steps, LARGE))
    batch = steps.batch()
    generator = torch.Generator().manual_seed(5)
    large = torch.randn(2, steps.SAMPLES, 3, 24, 24, generator=generator, dtype=torch.float64)
    crops = batch.views["image"].groups[0]
    own = Views([type(crops)(large, "global")])
    outputs = made.represent(Batch(batch.views, batch.keys, teacher={"late": {"image": own}}), steps.PROGRESS)
    student, teacher = outputs.student["image"].tokens, outputs.teacher["late"]["image"].tokens
    assert (student[0].shape[1], teacher[0].shape[1]) == (9, 36)
    views = [anchoring(transcription, student[v].tolist(), [halved(x, 3) for x in teacher[v].tolist()]) for v in (0, 1)]
    assert made.losses(outputs).terms["gram"].item() == pytest.approx(sum(views) / 2, rel=1e-10)


def test_gram_of_masked_copies(steps: ModuleType, transcription: ModuleType) -> None:
    """The student's masked copy (view 4) against the teacher's whole view 0."""
    masked = (
        recipe(steps).replace("local: 2}", "local: 2, masked: 1}").replace("masking: {}", "masking: {roles: [masked]}")
    )
    made = steps.objective("[{name: gram, teacher: late, role: masked, target_role: global}]", masked)
    outputs = made.represent(steps.batch(masked_copies=True), steps.PROGRESS)
    student, teacher = outputs.student["image"].tokens, outputs.teacher["late"]["image"].tokens
    expected = anchoring(transcription, student[4].tolist(), teacher[0].tolist())
    assert made.losses(outputs).terms["gram"].item() == pytest.approx(expected, rel=1e-10)


def test_dropped_patches_are_refused(steps: ModuleType, registry: Registry) -> None:
    """Their tokens are fewer, and stand elsewhere."""
    text = recipe(steps).replace("masking: {}", "masking: {roles: []}").replace("LOSSES", GRAM)
    parse_recipe(text, "r.yaml", registry=registry, overrides=["masker.image={name: random_drop, role: local}"])
    with pytest.raises(RecipeErrors) as caught:
        parse_recipe(text, "r.yaml", registry=registry, overrides=["masker.image=random_drop"])
    assert caught.value.lines == [
        "r.yaml:5: loss.0: 'gram' reads all tokens of global views of 'image', and masker.image drops some: leave it "
        "out, or give it the `role` of other views"
    ]


def test_a_teacher_without_tokens_is_refused(tiny_recipe: Path, registry: Registry) -> None:
    changes = [
        "teachers={x: {name: stored, fields: {image: {field: a.npy, dim: 16}}}}", "loss=[{name: gram, teacher: x}]",
    ]  # fmt: skip
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(tiny_recipe, registry=registry, overrides=changes)
    assert any("'gram'" in line and "tokens" in line for line in caught.value.lines), caught.value.lines


def test_a_stage_begins_it(tiny_recipe: Path, registry: Registry, tmp_path: Path) -> None:
    """The Gram teacher is the average as it was at the stage's first step, and is renewed as it says. Catches a teacher
    that starts as the student, one that moves with the average, and a run that resumes with another one."""
    vit = "{name: vit, image_size: 16, patch: 8, width: 16, layers: 2, heads: 2, dim: 16, masking: {}}"
    own = "{name: multi_crop, size: 32, local_size: 8, global: 2, local: 0}"
    late = f"{{name: snapshot, source: default, every: 4, augment: {{image: {own}}}}}"
    changes = [
        "fusion=null", "augment.text=null", "backbone.text=null", f"backbone.image={vit}", "evaluate=null",
        "loss=[{name: dino, prototypes: 8, hidden: 8, bottleneck: 4}]", "teacher.momentum=0.5", "train.steps=6",
        f"stages=[{{at: 2, set: {{teachers: {{late: {late}}}, loss.1: {{name: gram, teacher: late}}}}}}]",
    ]  # fmt: skip

    def run(folder: Path, watch: Callable[[Trainer], None] | None = None, stop: int | None = None) -> Trainer:
        recipe = load_recipe(tiny_recipe, registry=registry, overrides=changes)
        trainer = Trainer(recipe, RunFolder.create(folder, recipe), quiet=True)
        trainer.run()
        return trainer

    from distill_core.objective import Objective

    seen: list[dict[str, dict[str, torch.Tensor]]] = []
    update = Objective.after_step

    def after_step(objective: Objective, *arguments: Any) -> None:
        update(objective, *arguments)
        teachers = objective.teachers
        seen.append({name: {k: x.clone() for k, x in t.backbone.state_dict().items()} for name, t in teachers.items()})  # type: ignore[attr-defined,union-attr]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "after_step", after_step)
        trainer = run(tmp_path / "runs")
    trainer.loader.close()
    trainer.folder.unlock()
    assert ["late" in step for step in seen] == [False, False, True, True, True, True]
    for step, source in ((2, 1), (3, 3), (4, 3), (5, 3)):
        assert all(torch.equal(x, seen[source]["default"][name]) for name, x in seen[step]["late"].items()), step
    assert not all(torch.equal(x, seen[5]["default"][name]) for name, x in seen[5]["late"].items())
