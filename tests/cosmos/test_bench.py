"""`distill bench step` first shows that both steps are the same step, and refuses to time different ones."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from distill_core.errors import UserError
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import load_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry
from distill_cosmos import bench
from distill_cosmos.fusion import CrossAttention

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(registry: Registry) -> Recipe:
    overrides = ["fusion.mask_padding=false", "backbone.text.padding=context", "teacher.update=before_optimizer"]
    return load_recipe(ROOT / "recipes/cosmos_tiny.yaml", registry=registry, overrides=overrides)


@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize("padding", ["longest", "context"])
def test_every_cosmos_recipe_is_compared_as_it_is(registry: Registry, mask_padding: bool, padding: str) -> None:
    """Would catch a comparison that fails where padding is masked, or that measures a recipe without the mask."""
    changes = [f"fusion.mask_padding={str(mask_padding).lower()}", f"backbone.text.padding={padding}"]
    recipe = load_recipe(ROOT / "recipes/cosmos_tiny.yaml", registry=registry, overrides=changes)
    said: list[str] = []
    ours: list[bool] = []
    forward = CrossAttention.pool

    def pool(self: CrossAttention, *arguments: Any) -> torch.Tensor:
        ours.append(self.config.mask_padding)
        return forward(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CrossAttention, "pool", pool)
        threads = torch.get_num_threads()
        bench.bench_step(
            recipe, batch_size=3, global_tokens=12, local_tokens=6, rounds=1, say=said.append, precisions=("fp32",)
        )
        torch.set_num_threads(threads)
    assert said[0].startswith("same step: losses agree to")
    assert set(ours) == {mask_padding}


def test_a_batch_of_one_is_refused(recipe: Recipe) -> None:
    """Would catch a comparison of zeros: one sample has no negatives."""
    with pytest.raises(UserError, match="--batch 2 or more"):
        bench.bench_step(recipe, batch_size=1, global_tokens=8, local_tokens=5, rounds=1, say=print)


def sides(recipe: Recipe) -> tuple[bench.Ours, bench.Plain]:
    torch.manual_seed(0)
    objective = build_objective(recipe)
    batch = bench.make_batch(recipe, 3, global_tokens=12, local_tokens=6)
    return bench.Ours(recipe, objective, batch, bench.Clock()), bench.Plain(recipe, objective, batch, bench.Clock())


def test_the_fast_step_is_the_straightforward_step(recipe: Recipe) -> None:
    """Losses and gradients to 1e-5 in fp32: packed captions, last block at one token, one set of keys and values."""
    ours, other = sides(recipe)
    loss, gradient = bench.agreement(ours, other)
    assert loss < 1e-6
    assert gradient < 1e-5


def test_both_move_student_and_teacher_alike(recipe: Recipe) -> None:
    ours, other = sides(recipe)
    first = {key: value.clone() for key, value in other.student.state_dict().items()}
    for _ in range(3):
        for side in (ours, other):
            bench._step(side, "fp32")
            side.update()
    from distill_cosmos.official import public_state_dict

    mine = public_state_dict(ours.objective)
    for who, module in (("student", other.student), ("teacher", other.teacher)):
        theirs = dict(module.named_parameters())
        # key biases: Adam makes steps of rounding noise
        keys = [key for key in mine[who] if not key.endswith("in_proj_bias")]
        moved = torch.stack([(theirs[key] - first[key]).norm() for key in keys]).norm()
        apart = torch.stack([(mine[who][key] - theirs[key]).norm() for key in keys]).norm()
        assert moved > 1e-3
        assert apart < 0.02 * moved


def test_a_different_step_is_refused(recipe: Recipe) -> None:
    ours, other = sides(recipe)
    with torch.no_grad():
        other.student.image_token_mapping.weight[0, 0] += 0.5
    with pytest.raises(UserError, match="the two steps differ: losses by"):
        bench.agreement(ours, other)


def test_a_step_without_a_gradient_is_refused(recipe: Recipe) -> None:
    ours, other = sides(recipe)
    ours.objective.get_parameter("backbone.image.conv1.weight").requires_grad_(False)
    with pytest.raises(UserError, match=r"only one of them has a loss or a gradient of visual\.conv1\.weight"):
        bench.agreement(ours, other)


def test_a_step_of_nan_is_refused(recipe: Recipe) -> None:
    ours, other = sides(recipe)
    with torch.no_grad():
        ours.objective.get_parameter("backbone.image.conv1.weight")[0] = float("nan")
    with pytest.raises(UserError, match="the two steps differ"):
        bench.agreement(ours, other)


def test_rows_and_csv(recipe: Recipe, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    rows = bench.bench_step(recipe, batch_size=2, global_tokens=8, local_tokens=5, rounds=1, say=lambda line: None)
    torch.set_num_threads(threads)
    parts = {"teacher", "image tower", "text tower", "fusion", "losses", "backward", "update", "step"}
    assert {(row["precision"], row["part"]) for row in rows} == {(p, part) for p in ("fp32", "bf16") for part in parts}
    assert all(row["plain_s"] > 0 and row["ours_s"] > 0 for row in rows if row["part"] == "step")
    bench.write_csv(tmp_path / "step.csv", rows, "cosmos_tiny.yaml", 2)
    with (tmp_path / "step.csv").open() as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(rows)
    assert written[0]["torch"] == torch.__version__.split("+")[0]
    other = (tmp_path / "step.csv").read_text().replace(written[0]["device"], "another")
    (tmp_path / "step.csv").write_text(other)
    for _ in range(2):
        bench.write_csv(tmp_path / "step.csv", rows, "cosmos_tiny.yaml", 2)
    with (tmp_path / "step.csv").open() as file:
        devices = [row["device"] for row in csv.DictReader(file)]
    assert devices == ["another"] * len(rows) + [written[0]["device"]] * len(rows)


def test_other_recipes_are_refused(registry: Registry) -> None:
    with pytest.raises(UserError, match="is COSMOS"):
        bench.check(load_recipe(ROOT / "recipes/clip_tiny.yaml", registry=registry))
