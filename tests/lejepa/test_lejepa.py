"""LeJEPA against its algorithms 1 and 2 written out, of one modality and of two; ranks; what it does to embeddings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from absences import PAIR, RECIPES, step
from torch import Tensor

from distill_authoring.conformance import assert_conforms
from distill_authoring.conformance.ranks import on_two_ranks
from distill_core.outputs import Features, Outputs, Progress
from distill_core.plan import BackboneSpec, ModalityPlan, Plan
from distill_lejepa.loss import LeJepa, LeJepaConfig
from distill_lejepa.sigreg import SigReg, directions_of

PROGRESS = Progress(7, 20)
ROLES = {"image": ("global", "global", "local"), "text": ("global",)}


def plan(*modalities: str, dim: int = 6) -> Plan:
    return Plan({m: ModalityPlan(ROLES[m], BackboneSpec(8, dim, class_tokens=1)) for m in modalities})


def loss_of(*modalities: str, dim: int = 6, **options: Any) -> LeJepa:
    torch.manual_seed(0)
    config = LeJepaConfig(**{"modalities": modalities, "directions": 40, **options})
    assert not list(LeJepa.problems(config, plan(*modalities, dim=dim)))
    return LeJepa(config, plan(*modalities, dim=dim)).double()


def embeddings(*modalities: str, rows: int = 9, dim: int = 6, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {m: torch.randn(len(ROLES[m]), rows, dim, generator=generator, dtype=torch.float64) for m in modalities}
    return {m: (1.4 * x + 0.3).requires_grad_() for m, x in made.items()}


def outputs_of(pooled: dict[str, Tensor], progress: Progress = PROGRESS) -> Outputs:
    return Outputs(student={m: Features(x) for m, x in pooled.items()}, progress=progress)


def algorithm_1(x: Tensor, step: int, directions: int, knots: int = 17, reach: float = 5.0) -> Tensor:
    """SIGReg of [N, K] as the paper's listing has it: complex exponentials, all knots, `trapz`."""
    generator = torch.Generator().manual_seed(step)
    a = torch.randn(x.shape[1], directions, generator=generator, dtype=x.dtype)
    a = a / a.norm(p=2, dim=0)
    t = torch.linspace(-reach, reach, knots, dtype=x.dtype)
    exp_f = torch.exp(-0.5 * t**2)
    ecf = (1j * (x @ a).unsqueeze(2) * t).exp().mean(0)
    error = (ecf - exp_f).abs().square() * exp_f
    return torch.trapezoid(error, t, dim=1).mean() * len(x)


def algorithm_2(views: Tensor, count: int, share: float, step: int, directions: int) -> Tensor:
    """LeJEPA of all views [V, N, K], the first `count` global."""
    center = views[:count].mean(0)
    sim = (center - views).square().mean()
    sigreg = torch.stack([algorithm_1(x, step, directions) for x in views]).mean()
    return (1 - share) * sim + share * sigreg


def test_conforms() -> None:
    """On two ranks as well: terms and gradients are those of the joint batch."""
    assert_conforms(LeJepa)


def test_of_images_it_is_the_papers_listing() -> None:
    """Values and gradients. Catches a centre of all views, lambda on the wrong side, half an integral, a statistic that
    is not times N, a view's rows that are mixed with another's, and directions of another step."""
    pooled = embeddings("image")
    terms, metrics = loss_of("image", sigreg=0.2)(outputs_of(pooled))
    expected = algorithm_2(pooled["image"], 2, 0.2, PROGRESS.step, 40)
    total = terms["prediction"] + terms["sigreg"]
    assert total.item() == pytest.approx(expected.item(), rel=1e-10)
    assert metrics["statistic"].item() == pytest.approx(terms["sigreg"].item() / 0.2)
    ours, theirs = (torch.autograd.grad(x, pooled["image"], retain_graph=True)[0] for x in (total, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_of_two_modalities_each_counts_alike() -> None:
    """Three views of the image and one of the text. Catches a centre or a mean that counts views, and one test over the
    rows of both."""
    pooled = embeddings("image", "text")
    terms, _ = loss_of("image", "text")(outputs_of(pooled))
    image, text = pooled["image"], pooled["text"]
    center = ((image[0] + image[1]) / 2 + text[0]) / 2
    distances = [(image - center).square().mean(), (text - center).square().mean()]
    assert terms["prediction"].item() == pytest.approx(0.95 * sum(distances).item() / 2, rel=1e-10)  # type: ignore[union-attr]
    own = [torch.stack([algorithm_1(v, PROGRESS.step, 40) for v in x]).mean() for x in (image, text)]
    assert terms["sigreg"].item() == pytest.approx(0.05 * sum(own).item() / 2, rel=1e-10)  # type: ignore[union-attr]


def test_two_single_views_are_drawn_together_by_their_squared_distance() -> None:
    a, b = torch.randn(2, 5, 6, dtype=torch.float64)
    single = Plan({m: ModalityPlan(("global",), BackboneSpec(8, 6)) for m in ("image", "text")})
    loss = LeJepa(LeJepaConfig(modalities=("image", "text"), sigreg=0.0), single)  # type: ignore[arg-type]
    terms, _ = loss(outputs_of({"image": a[None], "text": b[None]}))
    assert terms["prediction"].item() == pytest.approx((a - b).square().mean().item() / 4)


def test_the_statistic_is_the_closed_form() -> None:
    """Epps and Pulley's integral over all of R has a closed form; fine knots far out come to it."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(11, generator=generator, dtype=torch.float64) * 1.7 - 0.4
    n, root = len(x), math.sqrt(2 * math.pi)
    pairs = sum(math.exp(-((a - b) ** 2) / 2) for a in x.tolist() for b in x.tolist()) / n**2
    own = sum(math.exp(-(a**2) / 4) for a in x.tolist()) / n
    expected = root * (pairs - math.sqrt(2) * own + 1 / math.sqrt(3))
    found = SigReg(knots=2001, reach=12.0)(x[None, :, None], torch.ones(1, 1, dtype=torch.float64))
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_directions_are_unit_and_others_in_each_step() -> None:
    like = torch.empty(0, dtype=torch.float64)
    one, again, other = (directions_of(step, 6, 5000, like) for step in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    torch.testing.assert_close(one.norm(dim=0), torch.ones(5000, dtype=torch.float64))
    assert (one @ one.T / 5000 - torch.eye(6) / 6).abs().max() < 0.02, "uniform on the sphere"


def test_it_keeps_embeddings_from_collapsing_and_makes_them_gaussian() -> None:
    """Free embeddings, moved by its gradient alone. Catches a sign, and a regulariser that fixes the scale alone."""
    rows = 64
    free = {
        "image": (torch.randn(3, rows, 4, dtype=torch.float64) * 1e-2 + torch.tensor([3.0, 0, 0, 0])).requires_grad_()
    }
    loss = loss_of("image", dim=4)
    solver = torch.optim.Adam([free["image"]], lr=0.05)
    for number in range(400):
        solver.zero_grad()
        sum(loss(outputs_of(free, Progress(number, 400)))[0].values()).backward()  # type: ignore[union-attr]
        solver.step()
    x = free["image"].detach()
    assert (x - x.mean(0)).square().mean() < 0.02, "views agree"
    assert x[0].mean(0).abs().max() < 0.2
    assert (torch.cov(x[0].T) - torch.eye(4)).abs().max() < 0.35


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lejepa", "lejepa pairs"])
def test_two_ranks_have_the_joint_batchs_loss(name: str) -> None:
    """Towers, heads with batch norm and the empirical characteristic function. Catches a statistic of one rank's rows,
    its gradient that stops at the exchange, and other directions on each rank."""
    ranks = on_two_ranks(step, [(RECIPES[name], [PAIR] * 3, numbers) for numbers in ([0, 1, 2], [3, 4, 5])])
    whole = step(RECIPES[name], [PAIR] * 6, range(6))
    assert set(whole.terms) == {"lejepa/prediction", "lejepa/sigreg"}
    assert len(whole.gradients) > 10
    for own, joint in ((ranks[0].terms, whole.terms), *((rank.gradients, whole.gradients) for rank in ranks)):
        assert own.keys() == joint.keys()
        for key, x in joint.items():
            torch.testing.assert_close(own[key], x, rtol=1e-8, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}")


def test_what_does_not_fit_is_refused() -> None:
    def problems(known: Plan, **options: Any) -> list[str]:
        return list(LeJepa.problems(LeJepaConfig(**options), known))

    one = Plan({"image": ModalityPlan(("global",), BackboneSpec(8, 6))})
    assert problems(one) == ["'lejepa' needs two views, of image; there is 1"]
    assert problems(plan("image"), knots=8) == [
        "'lejepa': knots: 8 is even; the integral is symmetric about its middle point"
    ]
    two = Plan({**plan("image").modalities, **plan("text", dim=5).modalities})
    both = {"modalities": ("image", "text")}
    assert problems(two, **both) == ["'lejepa' compares embeddings of one width D; the backbones give image 6, text 5"]
    assert problems(two, **both, hidden=8) == [], "heads give one width"
