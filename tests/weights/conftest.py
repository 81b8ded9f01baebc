"""A run whose weights are all random: LayerNorms and biases too, so that two that were exchanged would show."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from distill_core.contracts.weights import LoadReport
from distill_core.objective import Objective
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import parse_recipe
from distill_core.registry import Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_weights.commands import export

RECIPE = """
augment:
  image: {name: multi_crop, size: 16, local_size: 8, mean: [0.5, 0.4, 0.3], std: [0.2, 0.25, 0.3]}
  text: {name: text_crop}
backbone:
  image: {name: vit, image_size: 16, patch: 4, width: 24, layers: 2, heads: 3, mlp_ratio: 3.0, dim: 10}
  text: {name: clip_text, width: 16, layers: 2, heads: 4, dim: 10}
fusion: {name: cross_attention, heads: 2}
loss: [{name: contrastive}, {name: cross_modal_distillation}]
teacher: {}
data: {source: {name: emoji}}
train: {steps: 1}
"""


def objective(registry: Registry, *overrides: str, seed: int = 0) -> Objective:
    """The recipe's objective with every parameter random."""
    torch.manual_seed(seed)
    built = build_objective(parse_recipe(RECIPE, "r.yaml", registry=registry, overrides=overrides))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    return built


def scatter(module: nn.Module) -> Any:
    """Every parameter random."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    return module.eval()


def apply(registry: Registry, built: Objective, name: str, **options: Any) -> LoadReport:
    cls = registry.get("weights", name).cls
    loaded: LoadReport = cls(cls.Config(**options)).apply(built)
    return loaded


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory, registry: Registry) -> Callable[..., Path]:
    """`make_run(*overrides)` -> a run folder with a checkpoint of step 7."""

    def make(*overrides: str) -> Path:
        recipe = parse_recipe(RECIPE, "r.yaml", registry=registry, overrides=overrides)
        folder = RunFolder.create(tmp_path_factory.mktemp("weights"), recipe)
        Checkpoints(folder.path).save(7, {"objective": objective(registry, *overrides).state_dict()})
        return folder.path

    return make


@pytest.fixture(scope="session")
def run(make_run: Callable[..., Path]) -> Path:
    return make_run()


def call(run: Path, to: str, out: Path, *more: str) -> str:
    """What `distill export` prints. Raises what it raises."""
    done = CliRunner().invoke(export, [str(run), "--to", to, "--out", str(out), *more], catch_exceptions=False)
    return done.output
