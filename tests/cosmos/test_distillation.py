"""Distillation between modalities against plain loops: which blocks of pairs enter, hard and soft targets."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import distill_core.outputs
import distill_cosmos.soft_targets
import distill_vl.contrastive
from distill_core.batch import Batch, Group, Views
from distill_core.errors import RecipeErrors
from distill_core.outputs import Features, Fused, Outputs, Progress, Rows
from distill_core.plan import BackboneSpec, ModalityPlan, Plan, TeacherPlan
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import parse_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry
from distill_cosmos.losses import CrossModalDistillation

D = 5
STUDENT_VIEWS = {"image": 4, "text": 3}
TEACHER_VIEWS = {"image": 2, "text": 1}
NAMES = ("image_to_image", "image_to_text", "text_to_image", "text_to_text")
SUBSETS = [subset for n in range(1, 5) for subset in itertools.combinations(NAMES, n)]


def make_loss(**options: Any) -> CrossModalDistillation:
    plan = Plan(
        {name: ModalityPlan(("global",) * views, BackboneSpec(7, D)) for name, views in STUDENT_VIEWS.items()},
        {"default": TeacherPlan({name: tuple(range(views)) for name, views in TEACHER_VIEWS.items()})},
        fusion=True,
    )
    loss = CrossModalDistillation(CrossModalDistillation.Config(**options), plan).double()
    with torch.no_grad():
        loss.logit_scale.fill_(1.3)
    return loss


def make_outputs(seed: int, batch: int, *, teachers: tuple[str, ...] = ("image", "text")) -> Outputs:
    generator = torch.Generator().manual_seed(seed)

    def random(views: int) -> Tensor:
        return torch.randn(views, batch, D, generator=generator, dtype=torch.float64)

    pooled = {name: random(views).requires_grad_() for name, views in STUDENT_VIEWS.items()}
    fused = {name: F.normalize(x, dim=-1) for name, x in pooled.items()}
    teacher = {name: Features(random(TEACHER_VIEWS[name])) for name in teachers}
    student = {name: Features(x) for name, x in pooled.items()}
    return Outputs(
        {},
        student,
        {"default": teacher},
        {m: Fused(x) for m, x in fused.items()},
        None,
        Progress(0, 1),
        lambda module: module,
    )


def unit(x: Tensor) -> Tensor:
    return x / (x * x).sum(-1, keepdim=True).sqrt()


def one_pair(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """a, b [B, D]: row by row, minus the log-probability of its own column, in both directions."""
    total = torch.zeros((), dtype=torch.float64)
    for x, y in ((a, b), (b, a)):
        for i in range(len(x)):
            logits = torch.stack([scale * (x[i] * y[j]).sum() for j in range(len(y))])
            total = total - (logits[i] - torch.log(torch.exp(logits).sum()))
    return total / (2 * len(a))


def by_hand(outputs: Outputs, names: tuple[str, ...], scale: Tensor) -> dict[str, Tensor]:
    blocks = {}
    for name in names:
        student, teacher = name.split("_to_")
        rows = unit(outputs.student[student].pooled)
        columns = unit(outputs.teacher["default"][teacher].pooled)
        blocks[name] = torch.stack([one_pair(a, b, scale) for a in rows for b in columns]).mean()
    return blocks


def same_gradients(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    """Of both, in each leaf that either reads."""
    found = torch.autograd.grad(ours, leaves, retain_graph=True, allow_unused=True)
    for mine, wanted in zip(found, torch.autograd.grad(theirs, leaves, allow_unused=True), strict=True):
        assert (mine is None) == (wanted is None)
        if mine is not None:
            torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("names", [None, *SUBSETS])
def test_mean_over_the_chosen_blocks(names: tuple[str, ...] | None) -> None:
    """Catches a block that enters unasked, one left out, weights by views instead of by blocks, and lost gradients."""
    loss, outputs = make_loss(pairs=names), make_outputs(3, 4)
    terms, metrics = loss(outputs)
    expected = by_hand(outputs, names or NAMES, loss.logit_scale.exp())
    total = torch.stack(list(expected.values())).mean()
    torch.testing.assert_close(terms["cross_modal_distillation"], total, rtol=1e-10, atol=1e-10)
    assert set(metrics) == {"scale", *(names or NAMES)}
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value.detach(), rtol=1e-10, atol=1e-10)
    leaves = [loss.logit_scale, *(f.pooled for f in outputs.student.values())]
    same_gradients(terms["cross_modal_distillation"], total, leaves)


def test_the_order_of_names_does_not_matter() -> None:
    outputs = make_outputs(5, 3)
    one, other = (make_loss(pairs=names)(outputs)[0] for names in (NAMES[:3], NAMES[2::-1]))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("names", "calls", "read"),
    [
        (None, [(7, 3)], {"fused.image", "fused.text", "teacher.image", "teacher.text"}),
        (("image_to_image",), [(4, 2)], {"fused.image", "teacher.image"}),
        (("text_to_image", "image_to_image"), [(7, 2)], {"fused.image", "fused.text", "teacher.image"}),
        (
            ("image_to_image", "text_to_text"),
            [(4, 2), (3, 1)],
            {"fused.image", "fused.text", "teacher.image", "teacher.text"},
        ),
        (
            ("image_to_text", "text_to_image", "text_to_text"),
            [(4, 1), (3, 3)],
            {"fused.image", "fused.text", "teacher.image", "teacher.text"},
        ),
    ],
)
def test_only_what_is_needed_is_computed_and_gathered(
    names: tuple[str, ...] | None, calls: list[tuple[int, int]], read: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a collective for what no block reads, and a second one for what two products read."""
    seen: list[tuple[int, int]] = []
    original = distill_vl.contrastive.multi_view_info_nce

    def counting(a: Tensor, b: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append((a.shape[0], b.shape[0]))
        return original(a, b, *rest, **options)

    gathered: list[int] = []

    def gather(x: Tensor, dim: int) -> Tensor:
        gathered.append(x.data_ptr())
        return x

    monkeypatch.setattr(distill_vl.contrastive, "multi_view_info_nce", counting)
    monkeypatch.setattr(distill_vl.contrastive, "world_size", lambda: 2)
    monkeypatch.setattr(distill_core.outputs, "all_gather", gather)
    outputs = make_outputs(1, 4)
    chosen = make_loss(pairs=names)
    chosen(outputs)
    assert seen == calls
    made = {f"fused.{m}": f for m, f in outputs.fused.items()}
    made |= {f"teacher.{m}": f for m, f in outputs.teacher["default"].items()}  # type: ignore[dict-item]
    assert sorted(gathered) == sorted(made[name].embedding.data_ptr() for name in read)
    named = {id(rows): view for part in chosen.gathers(outputs) for rows, view in part.origins}
    assert named == {id(made[name].rows): len(made[name].rows) - 1 for name in read}, "all views of what is read"


def test_a_teacher_of_one_modality_is_enough_for_its_blocks() -> None:
    outputs = make_outputs(2, 4, teachers=("image",))
    loss = make_loss(pairs=("image_to_image", "text_to_image"))
    assert torch.isfinite(loss(outputs)[0]["cross_modal_distillation"])
    with pytest.raises(KeyError):
        make_loss()(outputs)


RECIPE = """\
augment:
  image: {{name: multi_crop, size: 16, local_size: 8, global: 2, local: 1}}
{text_views}
backbone:
  image: {{name: vit, image_size: 16, patch: 8, width: 16, layers: 1, heads: 2, dim: 16}}
{text_tower}
fusion: identity
loss:
  - {{name: cross_modal_distillation, pairs: {pairs}}}
teacher: {{modalities: [image]}}
data: {{source: {{name: webdataset, urls: x.tar}}}}
train: {{steps: 4}}
tracking: null
"""
TEXT_VIEWS = "  text: {name: text_crop, global: 2, local: 1}"
TEXT_TOWER = "  text: {name: clip_text, context: 8, width: 16, layers: 1, heads: 2, dim: %d}"


@pytest.fixture
def parse(registry: Registry) -> Callable[..., Recipe]:
    def parse(pairs: str, *, text: bool = True, dim: int = 16) -> Recipe:
        recipe = RECIPE.format(
            pairs=pairs, text_views=TEXT_VIEWS if text else "", text_tower=TEXT_TOWER % dim if text else ""
        )
        return parse_recipe(recipe, "r.yaml", registry=registry)

    return parse


def picture_views(generator: torch.Generator) -> Views:
    sizes = ((2, 16, "global"), (1, 8, "local"))
    return Views([Group(torch.randn(v, 3, 3, s, s, generator=generator), role) for v, s, role in sizes])


@pytest.mark.parametrize("text", [True, False])
def test_self_distillation_of_pictures_alone(parse: Callable[..., Recipe], text: bool) -> None:
    """A teacher of pictures only, with texts in the recipe or without any, as the user would write it."""
    torch.manual_seed(0)
    objective = build_objective(parse("[image_to_image]", text=text))
    generator = torch.Generator().manual_seed(1)
    views = {"image": picture_views(generator)}
    if text:
        ids = torch.randint(1, 48, (3, 3, 6), generator=generator)
        views["text"] = Views([Group(ids[:2], "global"), Group(ids[2:], "local")])
    losses = objective.losses(objective.represent(Batch(views, ["a", "b", "c"]), Progress(0, 1)))
    losses.total.backward()
    assert set(losses.metrics) == {f"cross_modal_distillation/{name}" for name in ("scale", "image_to_image")}
    for name, parameter in objective.named_parameters():
        if name.startswith("backbone.image."):
            assert parameter.grad is not None, name
        if name.startswith("backbone.text."):
            assert parameter.grad is None, name


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ("[image_to_txt]", "'cross_modal_distillation' has no pair 'image_to_txt', did you mean 'image_to_text'?"),
        ("[q]", "no pair 'q' (there are: image_to_image, image_to_text, text_to_image, text_to_text)"),
        ("[image_to_image, image_to_image]", "'cross_modal_distillation' has the pair 'image_to_image' twice"),
        ("[image_to_text]", "needs a teacher of 'text'; this recipe's teacher sees none of its views"),
        ("null", "needs a teacher of 'text'; this recipe's teacher sees none of its views"),
        ("[]", "at least 1 item"),
    ],
)
def test_what_is_wrong_with_pairs_is_one_line(parse: Callable[..., Recipe], pairs: str, message: str) -> None:
    with pytest.raises(RecipeErrors) as caught:
        parse(pairs)
    assert len(caught.value.lines) == 1
    assert caught.value.lines[0].startswith("r.yaml:9: loss.0")
    assert message in caught.value.lines[0]


def test_modalities_that_are_read_must_be_there_and_of_one_width(parse: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeErrors, match="needs a modality 'text'"):
        parse("[text_to_image]", text=False)
    parse("[image_to_image]", dim=8)
    with pytest.raises(RecipeErrors, match="one width D; the backbones give text 8, image 16"):
        parse("[text_to_image]", dim=8)


# soft targets


def soft_by_hand(outputs: Outputs, name: str, scale: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One block with all its logits: (mean cross-entropy, mean entropy of the targets)."""
    student, teacher = name.split("_to_")
    losses, entropies = [], []
    for f in unit(outputs.student[student].pooled):
        for t in unit(outputs.teacher["default"][teacher].pooled):
            for turned in (False, True):
                a, b = (t, f) if turned else (f, t)
                p = torch.exp(scale * a @ b.T)
                p = p / p.sum(1, keepdim=True)
                q = torch.zeros_like(p)
                own_views = unit(outputs.teacher["default"][student].pooled)
                for w in own_views:
                    c, d = (t, w) if turned else (w, t)
                    e = torch.exp(c @ d.T / temperature)
                    q = q + e / e.sum(1, keepdim=True) / len(own_views)
                losses.append(-(q * p.log()).sum(1).mean())
                entropies.append(-(q * q.log()).sum(1).mean())
    return torch.stack(losses).mean(), torch.stack(entropies).mean()


@pytest.mark.parametrize("names", [NAMES, ("image_to_image",), ("text_to_image", "image_to_text"), NAMES[1:]])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_soft_targets_are_the_teachers_own_similarities(names: tuple[str, ...], batch: int) -> None:
    """Catches targets of another sample, modality or direction, a temperature on the wrong side, wrong gradients."""
    outputs = make_outputs(11, batch)
    loss = make_loss(pairs=names, targets="soft", teacher_temperature=0.3)
    terms, metrics = loss(outputs)
    blocks = {name: soft_by_hand(outputs, name, loss.logit_scale.exp(), 0.3) for name in names}
    total = torch.stack([value for value, _ in blocks.values()]).mean()
    torch.testing.assert_close(terms["cross_modal_distillation"], total, rtol=1e-10, atol=1e-10)
    for name, (value, _) in blocks.items():
        torch.testing.assert_close(metrics[name], value.detach(), rtol=1e-10, atol=1e-10)
    entropy = torch.stack([value for _, value in blocks.values()]).mean()
    torch.testing.assert_close(metrics["target_entropy"], entropy, rtol=1e-10, atol=1e-10)
    assert total >= entropy - 1e-12
    leaves = [loss.logit_scale, *(f.pooled for f in outputs.student.values())]
    same_gradients(terms["cross_modal_distillation"], total, leaves)


def test_sharp_targets_within_a_modality_are_hard_ones() -> None:
    """One teacher view: as the temperature goes to 0, its similarities become the sample itself."""
    outputs = make_outputs(4, 6)
    outputs.teacher["default"]["image"].pooled = outputs.teacher["default"]["image"].pooled[:1]
    soft = make_loss(pairs=("image_to_image",), targets="soft", teacher_temperature=1e-4)(outputs)
    hard = make_loss(pairs=("image_to_image",))(outputs)
    torch.testing.assert_close(soft[0], hard[0], rtol=1e-12, atol=1e-12)
    assert soft[1]["target_entropy"] < 1e-12


@pytest.mark.parametrize("block", [1, 7, 40])
def test_runs_of_rows_do_not_change_soft_targets(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, loss = make_outputs(8, 7), make_loss(targets="soft", teacher_temperature=0.1)
    whole, metrics = loss(outputs)
    monkeypatch.setattr(distill_cosmos.soft_targets, "_BLOCK", block)
    parts, more = loss(outputs)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(more, metrics, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("targets", ["hard", "soft"])
def test_ranks_together_have_the_joint_batchs_loss_and_gradients(targets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks of two rows, each given what its gather would bring."""
    joint, loss = make_outputs(13, 6), make_loss(targets=targets, teacher_temperature=0.2)
    leaves = [loss.logit_scale, *(f.pooled for f in joint.student.values())]
    whole = loss(joint)[0]["cross_modal_distillation"]
    wanted = torch.autograd.grad(whole, leaves, retain_graph=True)
    monkeypatch.setattr(distill_vl.contrastive, "world_size", lambda: 3)
    terms = []
    for rank in range(3):
        rows = slice(2 * rank, 2 * rank + 2)
        monkeypatch.setattr(distill_core.outputs, "rank", lambda rank=rank: rank)
        assert joint.fused
        own = Outputs(
            {},
            {},
            {"default": {m: Features(f.pooled[:, rows]) for m, f in joint.teacher["default"].items()}},
            {m: Fused(f.pooled[:, rows]) for m, f in joint.fused.items()},
            None,
            Progress(0, 1),
            lambda module: module,
        )
        for mine, whole_batch in ((own.fused, joint.fused), (own.teacher["default"], joint.teacher["default"])):
            for m in ("image", "text"):
                mine[m]._rows = Rows(mine[m].embedding, lambda f=whole_batch[m]: f.embedding)  # type: ignore[misc]
        terms.append(loss(own)[0]["cross_modal_distillation"])
    mean = torch.stack(terms).mean()
    torch.testing.assert_close(mean, whole, rtol=1e-10, atol=1e-10)
    for mine, reference in zip(torch.autograd.grad(mean, leaves), wanted, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-10)


def test_soft_targets_ask_for_a_teacher_of_the_students_modality(parse: Callable[..., Recipe]) -> None:
    parse("[image_to_image], targets: soft")
    parse("[text_to_image]")
    with pytest.raises(RecipeErrors, match="rows of all ranks for soft targets: take exchange: gather"):
        parse("[image_to_image], targets: soft, exchange: ring")
    with pytest.raises(RecipeErrors, match="needs a teacher of 'text'"):
        parse("[text_to_image], targets: soft")


@pytest.mark.parametrize("targets", ["hard", "soft"])
def test_bf16_autocast(parse: Callable[..., Recipe], targets: str) -> None:
    torch.manual_seed(0)
    objective = build_objective(parse(f"[image_to_image], targets: {targets}", text=False))
    views = {"image": picture_views(torch.Generator().manual_seed(1))}
    exact = objective.losses(objective.represent(Batch(views, ["a", "b", "c"]), Progress(0, 1))).total
    with torch.autocast("cpu", torch.bfloat16):
        rough = objective.losses(objective.represent(Batch(views, ["a", "b", "c"]), Progress(0, 1))).total
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=5e-2, atol=0)
    rough.backward()
    for name, parameter in objective.backbone["image"].named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
