"""Two to four processes over gloo: each method's losses and gradients are those of the joint batch in one process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from beside import load_beside
from launching import of_ranks
from torch import Tensor

from distill_core.registry import Registry

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("distributed_methods.py")
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(scope="module")
def methods() -> ModuleType:
    return load_beside(__file__, "distributed_methods")


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank made of its share of the rows."""
    count, folder = request.param, tmp_path_factory.mktemp("ranks")
    return of_ranks(count, SCRIPT, folder)


@pytest.fixture(scope="module")
def joint(methods: ModuleType, registry: Registry) -> dict[str, Any]:
    return {case: methods.step(case, registry, 0, methods.SAMPLES) for case in methods.CASES}


CASES = [
    *("clip", "cosmos", "cosmos ring", "cosmos soft", "cosmos sigmoid", "siglip gather", "siglip ring"),
    *("slip", "dreamlip", "flair", "flava", "cosmos balanced", "ijepa", "data2vec", "coca"),
]


@pytest.mark.parametrize("case", CASES)
def test_ranks_have_the_joint_batchs_losses_and_gradients(
    case: str, ranks: list[dict[str, Any]], joint: dict[str, Any], methods: ModuleType
) -> None:
    """Catches negatives or batch statistics of one rank alone, gradients that stop at an exchange or come home to the
    wrong rank, and positives looked for in the wrong rows."""
    assert set(methods.CASES) == set(joint) == {*CASES, "cosmos bf16"}
    own, whole = [rank["cases"][case] for rank in ranks], joint[case]
    for name, term in whole["terms"].items():
        torch.testing.assert_close(torch.stack([rank["terms"][name] for rank in own]).mean(), term, **CLOSE)
        assert (own[0]["terms"][name] - own[1]["terms"][name]).abs() > 1e-6, "ranks see other rows"
    assert len(whole["gradients"]) > 20
    for name, gradient in whole["gradients"].items():
        for rank in own:
            torch.testing.assert_close(rank["gradients"][name], gradient, **CLOSE, msg=f"{case}: {name}")


@pytest.mark.parametrize(
    ("case", "forward", "backward"),
    [
        ("clip", [2], [2]),
        ("coca", [2], [2]),
        # 2 global crops and 3 texts of the student, 3 + 3 fused views; the teacher's 2 + 2 have no gradient
        ("cosmos", [15], [11]),
        # 3 fused views; the teacher's 2 of both modalities
        ("cosmos soft", [7], [3]),
        # columns alone: 3 texts, and the teacher's
        ("cosmos sigmoid", [7], [3]),
        ("siglip gather", [1], [1]),
        ("flair", [3], [3]),
        # an image and 3 texts; what the texts are compared with is made of them
        ("dreamlip", [4, 3], [3, 4]),
        ("flava", [2], [2]),
    ],
)
def test_a_step_gathers_what_losses_read_in_one_collective(
    case: str, forward: list[int], backward: list[int], ranks: list[dict[str, Any]], methods: ModuleType
) -> None:
    """In views of the joint batch. Catches views that no loss reads, and those read twice; a gradient that is reduced
    whole on every rank, or of the teacher; a collective for each tensor."""
    view = methods.SAMPLES * methods.DIM * 8
    for rank in ranks:
        made = rank["cases"][case]["collectives"]
        assert made["forward"] == [("allgather_base", n * view) for n in forward]
        assert made["backward"] == [("reduce_scatter_base", n * view) for n in backward]
        assert [name for name, _ in made["average"]] == ["allreduce"], "of gradients, of one dtype"


def test_ring_and_gather_are_one_loss(joint: dict[str, Any]) -> None:
    """In one process as well; the ranks' are compared with these above."""
    for gather, ring in (("siglip gather", "siglip ring"), ("cosmos", "cosmos ring")):
        torch.testing.assert_close(joint[ring]["terms"], joint[gather]["terms"], **CLOSE)


def test_a_ring_gathers_nothing(ranks: list[dict[str, Any]], methods: ModuleType) -> None:
    """Catches rows that are gathered besides; here the first views, which `clip` reads."""
    view = methods.SAMPLES * methods.DIM * 8
    for rank in ranks:
        forward, backward = (rank["cases"]["cosmos ring"]["collectives"][part] for part in ("forward", "backward"))
        assert [x for x in forward if x[0] not in ("send", "recv")] == [("allgather_base", 2 * view)]
        assert [x for x in backward if x[0] not in ("send", "recv")] == [("reduce_scatter_base", 2 * view)]
        siglip = rank["cases"]["siglip ring"]["collectives"]
        assert {name for part in ("forward", "backward") for name, _ in siglip[part]} == {"send", "recv"}


def test_bf16_halves_the_bytes(ranks: list[dict[str, Any]], joint: dict[str, Any], methods: ModuleType) -> None:
    """Of fp32, and a quarter of float64 here. Catches a gradient that travels wide, an option that nothing reads, and a
    rounding that spreads: 8 bits are 2^-9 of a value."""
    view = methods.SAMPLES * methods.DIM * 2
    whole = joint["cosmos bf16"]
    own = [rank["cases"]["cosmos bf16"] for rank in ranks]
    for rank in own:
        assert rank["collectives"]["forward"] == [("allgather_base", 15 * view)]
        assert rank["collectives"]["backward"] == [("reduce_scatter_base", 11 * view)]
        for name, gradient in whole["gradients"].items():
            off = (rank["gradients"][name] - gradient).norm()
            assert off < 2e-2 * gradient.norm() + 1e-6, f"{name}: {off / gradient.norm()}"
    for name, term in whole["terms"].items():
        mean = torch.stack([rank["terms"][name] for rank in own]).mean()
        assert 0 < (mean - term).abs() < 4e-3 * term.abs()


def test_the_ring_carries_every_view_pair_of_info_nce(ranks: list[dict[str, Any]], methods: ModuleType) -> None:
    """Against the definition, entry by entry: rows' and columns' log-sum-exps merged over visits."""
    a, b, scale, _, weight = methods.ring_inputs()
    inputs = [x.requires_grad_() for x in (a, b, scale)]
    logits = scale * torch.einsum("uid,vjd->uvij", a, b)
    target = logits.diagonal(dim1=2, dim2=3)
    expected = (0.5 * (logits.logsumexp(3) + logits.logsumexp(2)) - target).mean(2)
    check_ring([rank["info_nce"] for rank in ranks], expected, torch.autograd.grad((expected * weight).sum(), inputs))


def test_the_ring_carries_every_view_pair_of_the_sigmoid(ranks: list[dict[str, Any]], methods: ModuleType) -> None:
    """Against the definition, entry by entry: the logits of all rows and columns, the diagonal positive."""
    a, b, scale, bias, weight = methods.ring_inputs()
    inputs = [x.requires_grad_() for x in (a, b, scale, bias)]
    logits = scale * torch.einsum("uid,vjd->uvij", a, b) + bias
    sign = 2 * torch.eye(methods.SAMPLES, dtype=torch.float64) - 1
    expected = torch.log1p(torch.exp(-sign * logits)).sum(3).mean(2)
    check_ring([rank["sigmoid"] for rank in ranks], expected, torch.autograd.grad((expected * weight).sum(), inputs))


def check_ring(ranks: list[list[Tensor]], expected: Tensor, true: Sequence[Tensor]) -> None:
    pairs, d_a, d_b, *d_scalars = zip(*ranks, strict=True)
    torch.testing.assert_close(torch.stack(pairs).mean(0), expected.detach(), **CLOSE)
    # each rank's loss is a mean over its own rows: the mean over ranks is the joint loss
    for got, wanted in zip((torch.cat(d_a, 1), torch.cat(d_b, 1)), true[:2], strict=True):
        torch.testing.assert_close(got / len(ranks), wanted, **CLOSE)
    for got, wanted in zip(d_scalars, true[2:], strict=True):
        torch.testing.assert_close(torch.stack(got).mean(), wanted, **CLOSE)
