"""Trained models: built from a run's recipe and checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from distill_core.contracts.shared import build_all
from distill_core.errors import UserError, did_you_mean
from distill_core.interfaces import FusionHead
from distill_core.model import Model
from distill_core.plan import DEFAULT_TEACHER
from distill_core.recipe.resolve import Override, load_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry
from distill_core.run.checkpoint import Checkpoints, load_into

M = TypeVar("M", bound=nn.Module)


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
    origin = f"teacher.{DEFAULT_TEACHER}." if teacher else ""

    def has(part: str) -> bool:
        """A teacher may have fewer modalities and heads than its recipe."""
        return not teacher or any(name.startswith(f"{origin}{part}.") for name in state)

    def ready(module: M, part: str) -> M:
        """With its weights, to encode."""
        start = f"{origin}{part}."
        load_into(module, {name.removeprefix(start): x for name, x in state.items() if name.startswith(start)}, what)
        return module.to(device).eval().requires_grad_(False)

    towers = build_all(recipe.backbone, recipe.towers)
    backbone = {name: ready(x, f"backbone.{name}") for name, x in towers.items() if has(f"backbone.{name}")}
    if not backbone:
        raise UserError(f"{what}: this run trained no teacher")
    fusion, fusions = None, dict[str, FusionHead]()
    if not teacher:
        fusion = ready(recipe.fusion.build(recipe.plan), "fusion") if recipe.fusion is not None else None
        fusions = {name: ready(slot.build(recipe.plan), f"fusions.{name}") for name, slot in recipe.fusions.items()}
    heads = {
        name: ready(slot.build(recipe.plan), f"heads.{name}")
        for name, slot in recipe.heads.items()
        if has(f"heads.{name}")
    }
    augment = {name: node.build() for name, node in recipe.augment.items()}
    collators = recipe.collators()
    batch_size = recipe.evaluate.batch_size
    return Model(
        backbone, augment, collators, fusion=fusion, fusions=fusions, teacher=teacher, device=device,
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
