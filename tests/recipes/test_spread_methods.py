"""Two and four processes over gloo whose towers are spread over ranks (`train.parallel`): each method's steps are those
of the joint batch in one process."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from beside import load_beside
from launching import of_ranks

from distill_core.errors import UserError
from distill_core.parallel import lay_out
from distill_core.recipe.build import build_objective
from distill_core.recipe.sections import ParallelConfig
from distill_core.registry import Registry

SCRIPT = Path(__file__).with_name("spread_methods.py")


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank made of its share of the rows."""
    count, folder = request.param, tmp_path_factory.mktemp("spread")
    return of_ranks(count, SCRIPT, folder)


@pytest.fixture(scope="module")
def methods() -> ModuleType:
    return load_beside(__file__, "spread_methods")


CASES = [f"{case}, {layout}" for case, layout in load_beside(__file__, "spread_methods").CASES]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_spread_towers_train_as_one_process(
    name: str, ranks: list[dict[str, Any]], methods: ModuleType, registry: Registry
) -> None:
    """Catches gradients that are summed or not averaged, a norm or a clipping of a rank's own part, an optimiser or a
    teacher that moves parts wrongly, activations that are computed again from other weights, renamed parameters, and an
    evaluation that leaves something gathered; ranks that score unequal numbers of batches would hang."""
    assert {name for rank in ranks for name in rank} == set(CASES)
    case = name.rpartition(", ")[0]
    one = methods.train(case, "copies", registry, 0, methods.SAMPLES)
    close = {"rtol": 1e-9, "atol": 1e-9}
    for number, made in enumerate(rank[name] for rank in ranks):
        assert made["spread"] > 20
        assert made["whole"] == 0, "of a teacher's towers"
        assert made["norm"] == pytest.approx(one["norm"], rel=1e-6)
        assert list(made["state"]) == list(one["state"])
        assert set(made["gradients"]) == set(one["gradients"])
        for kind in ("gradients", "state"):
            for key, tensor in one[kind].items():
                torch.testing.assert_close(made[kind][key], tensor, **close, msg=lambda text, k=key: f"{k}: {text}")
        share = len(one["encoded"][0]) // len(ranks)
        rows = one["encoded"][:, number * share : (number + 1) * share]
        torch.testing.assert_close(made["encoded"], rows, **close)
    for term in one["after"]:
        mean = sum(rank[name]["after"][term] for rank in ranks) / len(ranks)
        assert mean == pytest.approx(one["after"][term], rel=1e-5)


@pytest.mark.slow
def test_parts_are_smaller(ranks: list[dict[str, Any]]) -> None:
    """Would catch towers that are whole on every rank, the teacher's among them."""
    for rank in ranks:
        assert rank["cosmos, parts"]["local"] < 0.85 * rank["cosmos, copies"]["local"]


def test_a_shard_that_does_not_divide_the_ranks_is_refused(tiny_recipe: Path, registry: Registry) -> None:
    from distill_core.recipe.resolve import load_recipe

    objective = build_objective(load_recipe(tiny_recipe, registry=registry))
    with pytest.raises(UserError, match=r"train\.parallel\.shard: 3 does not divide the number of ranks, 1"):
        lay_out(objective, ParallelConfig(shard=3), torch.device("cpu"))
