"""Builds what a recipe describes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from distill_core.contracts.shared import build_all
from distill_core.contracts.weights import LoadReport
from distill_core.errors import UserError
from distill_core.model import Model
from distill_core.objective import Objective
from distill_core.plan import DEFAULT_TEACHER
from distill_core.recipe.sections import Recipe
from distill_core.teachers.cached import of_run
from distill_core.teachers.copies import CopiedTeacher


def build_objective(recipe: Recipe) -> Objective:
    """Student, teachers, fusion, heads and losses; weights are drawn from torch's global generator. Raises
    `UserError`."""
    backbone = build_all(recipe.backbone, recipe.towers)
    fusion = recipe.fusion.build(recipe.plan) if recipe.fusion else None
    fusions = {name: node.build(recipe.plan) for name, node in recipe.fusions.items()}
    heads = {name: node.build(recipe.plan) for name, node in recipe.heads.items()}
    loss = {node.id: node.build(recipe.plan.reading(node.config.fusion)) for node in recipe.loss}
    objective = Objective(
        backbone,
        recipe.plan,
        [needs for _, needs in recipe.needs()],
        loss=loss,
        fusion=fusion,
        fusions=fusions,
        heads=heads,
        maskers=recipe.maskers(),
        balance=recipe.balance.build(list(loss)) if recipe.balance else None,
        augment={name: node.build() for name, node in recipe.augment.items()},
        wire=torch.bfloat16 if recipe.train.gather_precision == "bf16" else None,
    )
    for name, node in recipe.all_teachers.items():
        objective.add_teacher(name, of_run(node).build)
    return objective


class NeedsMemory(Exception):
    """Some component cannot be built without memory; the message names the error that it met."""


@contextmanager
def without_memory() -> Iterator[None]:
    """What is built here has names and shapes, and no values. Raises `NeedsMemory`, and a `UserError` as it is."""
    try:
        with torch.device("meta"):
            yield
    except UserError:
        raise
    except Exception as error:  # a component of a plugin may do anything
        why = next(iter(str(error).splitlines()), "")
        raise NeedsMemory(f"the model cannot be built without memory: {type(error).__name__}: {why}") from error


def load_weights(recipe: Recipe, objective: Objective) -> list[LoadReport]:
    """Load the weights that the recipe starts from, in order. A teacher starts as the student, but for what was loaded
    into it. Raises `UserError`."""
    reports: list[LoadReport] = [node.build().apply(objective) for node in recipe.weights]
    if reports:
        start_teachers(objective, {name for report in reports for name in report.names})
    return reports


def start_teachers(objective: Objective, loaded: Collection[str]) -> None:
    """Have teachers start as the student, but for the tensors of theirs that are `loaded`."""
    for id, teacher in objective.teachers.items():
        own = f"teacher.{id}."
        teacher.start({name.removeprefix(own) for name in loaded if name.startswith(own)})


def prepare_teachers(objective: Objective) -> list[str]:
    """Load what teachers take from outside the run, in each process that trains; lines for the user. Raises
    `UserError`."""
    return [line for teacher in objective.teachers.values() for line in teacher.prepare()]


def models_of(recipe: Recipe, objective: Objective, device: torch.device) -> dict[str, Model]:
    """`student`, and `teacher` where the default teacher has towers that are copies; weights are shared with the
    objective."""
    augment = {name: node.build() for name, node in recipe.augment.items()}
    collators = recipe.collators()
    sides: dict[str, Any] = {"student": objective.backbone}
    teacher = objective.teachers.get(DEFAULT_TEACHER)
    if isinstance(teacher, CopiedTeacher) and teacher.backbone:
        sides["teacher"] = teacher.backbone
    heads: dict[str, Any] = {"student": dict(objective.heads.items())}
    if "teacher" in sides:
        copies = {name: teacher.copy_of(f"heads.{name}") for name in objective.heads} if teacher is not None else {}
        heads["teacher"] = {name: head for name, head in copies.items() if head is not None}
    return {
        side: Model(
            dict(backbone.items()),
            augment,
            collators,
            fusion=objective.fusion if side == "student" else None,
            fusions=objective.named_fusions if side == "student" else {},
            teacher=side == "teacher",
            device=device,
            batch_size=recipe.evaluate.batch_size,
            precision=recipe.train.precision,
            untrained=recipe.untrained_embeddings(),
            heads=heads[side],
        )
        for side, backbone in sides.items()
    }
