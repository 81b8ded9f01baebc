"""Builds what a recipe describes."""

from __future__ import annotations

from distill_core.objective import Objective
from distill_core.recipe.sections import Recipe


def build_objective(recipe: Recipe) -> Objective:
    """Student, teacher, fusion and losses; weights are drawn from torch's global generator. Raises `UserError`."""
    backbone = {name: node.build() for name, node in recipe.backbone.items()}
    fusion = recipe.fusion.build(recipe.plan) if recipe.fusion else None
    loss = {node.id: node.build(recipe.plan) for node in recipe.loss}
    needs = [needs for _, needs in recipe.needs()]
    return Objective(backbone, fusion, loss, recipe.teacher, recipe.plan, needs)
