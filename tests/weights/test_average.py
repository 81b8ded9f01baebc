"""`distill average`: the mean of runs' weights as a run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import distill_core
from distill_core.errors import UserError
from distill_core.recipe.resolve import parse_recipe
from distill_core.registry import Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_weights.commands import average
from tests.weights.conftest import RECIPE, objective


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, registry: Registry) -> Callable[..., Path]:
    """A run of other random weights each time, with a step and an optimiser's state."""

    def made(seed: int, *overrides: str) -> Path:
        recipe = parse_recipe(RECIPE, "r.yaml", registry=registry, overrides=(f"name=seed{seed}", *overrides))
        folder = RunFolder.create(tmp_path_factory.mktemp("average"), recipe)
        state = {"objective": objective(registry, *overrides, seed=seed).state_dict(), "optimizer": {"of": seed}}
        Checkpoints(folder.path).save(10 + seed, state)
        return folder.path

    return made


def call(base: Path, *arguments: object) -> str:
    """What the command prints. Raises what it raises."""
    words = [*map(str, arguments), "--runs", str(base)]
    return CliRunner().invoke(average, words, catch_exceptions=False).output


def tensors(run: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = Checkpoints(run).read()["objective"]
    return state


@pytest.mark.parametrize(("count", "share", "shares"), [(2, 0.7, (0.7, 0.3)), (3, None, (1 / 3, 1 / 3, 1 / 3))])
def test_each_tensor_is_the_mean(
    make: Callable[..., Path], tmp_path: Path, count: int, share: float | None, shares: tuple[float, ...]
) -> None:
    """Catches shares of the wrong runs, and a teacher or an optimiser that is averaged or lost."""
    runs = [make(seed) for seed in range(count)]
    text = call(tmp_path, *runs, "--name", "mean", *(["--share", share] if share is not None else []))
    average, own = tensors(tmp_path / "mean"), [tensors(run) for run in runs]
    assert average.keys() == own[0].keys()
    for name, tensor in average.items():
        if name.startswith("teacher."):
            assert torch.equal(tensor, own[0][name])
        else:
            parts = torch.stack([each[name] for each in own])
            torch.testing.assert_close(tensor, torch.einsum("n...,n->...", parts, torch.tensor(shares)))
            assert not torch.allclose(tensor, own[0][name])
    state = Checkpoints(tmp_path / "mean").read()
    assert (state["step"], state["optimizer"]) == (10, {"of": 0})
    students = sum(not name.startswith("teacher.") for name in average)
    assert text.startswith(f"{tmp_path / 'mean'}: {shares[0]:.3g} seed0 + {shares[1]:.3g} seed1")
    assert f", {students} tensors, at step 10 of {runs[0]}\n" in text


def test_it_is_a_run(make: Callable[..., Path], tmp_path: Path) -> None:
    """Loads, says what it is, and is not written over by the next one; what the other lacks stays."""
    one, other = make(1), make(2, "fusion=null", "loss=[{name: contrastive}]", "teacher=null")
    text = call(tmp_path, one, other)
    assert text.endswith(f"as in {one} alone: fusion.token_map, fusion.pooler, loss.cross_modal_distillation\n")
    text = call(tmp_path, one, other, "--share", 0)
    assert text.startswith(f"{tmp_path / 'seed1-average-2'}: 0 seed1 + 1 seed2, ")
    assert "average: 0 seed1 + 1 seed2" in (tmp_path / "seed1-average-2" / "recipe.yaml").read_text()
    words = ["a red bird", "two boats"]
    model, reference = (distill_core.load(run) for run in (tmp_path / "seed1-average-2", other))
    torch.testing.assert_close(model.encode("text", words), reference.encode("text", words))


def test_runs_that_do_not_fit(make: Callable[..., Path], tmp_path: Path) -> None:
    """One line each, and no folder is left."""
    one, wide = make(3), make(4, "backbone.image.mlp_ratio=2.0")
    with pytest.raises(UserError, match=r"mlp\S+ has the shape \[48, 24\], .*\[72, 24\]: only runs of the same towers"):
        call(tmp_path, one, wide)
    with pytest.raises(UserError, match="name at least one more run"):
        call(tmp_path, one)
    with pytest.raises(UserError, match="no such run folder"):
        call(tmp_path, one, tmp_path / "gone")
    assert not list(tmp_path.iterdir())
