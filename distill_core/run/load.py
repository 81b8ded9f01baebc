"""Trained models: built from a run's recipe and checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from distill_core.contracts.shared import build_all
from distill_core.errors import UserError, did_you_mean
from distill_core.interfaces import Backbone, FusionHead, Head
from distill_core.model import Model
from distill_core.plan import DEFAULT_TEACHER
from distill_core.recipe.resolve import Override, load_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry
from distill_core.run.checkpoint import Checkpoints, load_into


def load_model(run: str | Path, *, teacher: bool = False, checkpoint: str = "last", device: str = "cpu") -> Model:
    """See `distill_core.load`."""
    folder = Path(run)
    recipe = run_recipe(folder, Registry.discover())
    content = Checkpoints(folder).read(checkpoint)
    recipe = recipe.of_stage(content.get("stage", 0))
    return model_of(recipe, content["objective"], str(folder), teacher=teacher, device=device)


def model_of(
    recipe: Recipe, state: Mapping[str, Tensor], what: str, *, teacher: bool = False, device: str = "cpu"
) -> Model:
    """The model of a recipe with an objective's state; no loss is built.

    Raises `UserError`, which begins with `what`, where they do not fit.
    """
    prefix = f"teacher.{DEFAULT_TEACHER}.backbone." if teacher else "backbone."
    backbone: dict[str, Backbone] = {}
    for name, tower in build_all(recipe.backbone, recipe.towers).items():
        start = f"{prefix}{name}."
        weights = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        if not weights and teacher:  # it may have fewer modalities than the student
            continue
        backbone[name] = tower
        load_into(backbone[name], weights, what)
        backbone[name].to(device).eval().requires_grad_(False)
    if not backbone:
        raise UserError(f"{what}: this run trained no teacher")
    of_fusions = {"fusion": recipe.fusion} if recipe.fusion is not None else {}
    of_fusions |= {f"fusions.{name}": slot for name, slot in recipe.fusions.items()}
    fusions: dict[str, FusionHead] = {}
    for path, node in of_fusions.items() if not teacher else ():
        fusions[path] = node.build(recipe.plan)
        own = {k.removeprefix(f"{path}."): v for k, v in state.items() if k.startswith(f"{path}.")}
        load_into(fusions[path], own, what)
        fusions[path].to(device).eval().requires_grad_(False)
    fusion = fusions.pop("fusion", None)
    named = {path.removeprefix("fusions."): head for path, head in fusions.items()}
    heads: dict[str, Head] = {}
    for name, slot in recipe.heads.items():
        start = f"teacher.{DEFAULT_TEACHER}.heads.{name}." if teacher else f"heads.{name}."
        weights = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        if not weights and teacher:  # it copies those that its recipe names
            continue
        heads[name] = slot.build(recipe.plan)
        load_into(heads[name], weights, what)
        heads[name].to(device).eval().requires_grad_(False)
    augment = {name: node.build() for name, node in recipe.augment.items()}
    collators = recipe.collators()
    batch_size = recipe.evaluate.batch_size
    return Model(
        backbone, augment, collators, fusion=fusion, fusions=named, teacher=teacher, device=device,
        batch_size=batch_size, untrained=recipe.untrained_embeddings(), heads=heads,
    )  # fmt: skip


def run_recipe(folder: Path, registry: Registry, overrides: Sequence[Override] = ()) -> Recipe:
    """The resolved recipe of a run folder, with overrides. Raises `UserError` when the folder is not a run."""
    if not (folder / "recipe.yaml").is_file():
        runs = (
            [p.name for p in folder.parent.glob("*") if (p / "recipe.yaml").is_file()] if folder.parent.is_dir() else []
        )
        what = "not a run folder (it holds no recipe.yaml)" if folder.is_dir() else "no such run folder"
        raise UserError(f"{folder}: {what}{did_you_mean(folder.name, runs)}")
    return load_recipe(folder / "recipe.yaml", registry=registry, overrides=overrides, recorded=True)
