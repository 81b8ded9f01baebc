"""The stages of a recipe: from a point of the run on, another objective, step and views, with the weights of before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill_core.parallel import prepare
from distill_core.recipe.build import build_objective, prepare_teachers, start_teachers
from distill_core.recipe.sections import Recipe
from distill_core.run.parts import map_tree
from distill_core.run.state import RunState
from distill_core.system.process import get_random, seed_all, set_random
from distill_core.system.sharded import joined

VIEWS = ("augment", "backbone", "masker", "teacher", "teachers")
"""Sections that the loader's workers read."""


def due(state: RunState) -> int:
    """The stage of the next step."""
    return state.recipe.stage(state.length.progress(state.step)) if state.recipe.stages else 0


def enter(state: RunState, stage: int) -> None:
    """Continue with another stage's recipe; every rank calls it, between two steps.

    Parameters, buffers and the optimiser's state go over by name. What is new is drawn from a seed of the stage's own,
    and a new teacher starts as the student is: so a run that is resumed just before is the same as one that was not.
    Where that fails, `state` has what it had, and can be saved.
    """
    before = state.objective, state.train_step, state.stage
    try:
        _enter(state, stage)
    except Exception:
        state.objective, state.train_step, state.stage = before
        raise


def _enter(state: RunState, stage: int) -> None:
    tensors = map_tree(_whole, state.objective.state_dict())
    optimizer, not_finite = map_tree(_whole, state.train_step.optimizer_state()), state.train_step.not_finite
    hooks = state.train_step.hook_states()
    rebuild(state, stage, tensors)
    state.train_step.load_optimizer_state(optimizer)
    state.train_step.load_hooks(hooks)
    state.train_step.not_finite = not_finite


def rebuild(state: RunState, stage: int, tensors: dict[str, Tensor] | None = None) -> None:
    """The objective, step and loader of a stage, with those of `tensors` that it has."""
    before, recipe = state.recipe.of_stage(state.stage), state.recipe.of_stage(stage)
    random = get_random(state.device)
    try:
        seed_all(recipe.seed + stage)
        objective = build_objective(recipe)
        own, tensors = objective.state_dict(), tensors or {}
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name in own:
                    own[name].copy_(tensor)
        start_teachers(objective, tensors)
        prepare_teachers(objective)
        state.objective, state.train_step = objective, prepare(recipe, objective, state.device)
    finally:
        set_random(random, state.device)
    if _views(before) != _views(recipe):
        state.loader = state.loader.under(recipe)
    state.stage = stage


def load(state: RunState, saved: dict[str, Any], source: str) -> None:
    """`RunState.load_state_dict`, of the stage that a checkpoint was saved in."""
    if (stage := saved.get("stage", 0)) != state.stage:
        rebuild(state, stage)
    state.load_state_dict(saved, source)


def _whole(value: Any) -> Any:
    return joined(value).cpu() if isinstance(value, Tensor) else value


def _views(recipe: Recipe) -> dict[str, Any]:
    return {section: value for section, value in recipe.to_dict().items() if section in VIEWS}
