"""DINO's, iBOT's and KoLeo's losses against plain loops in float64; what moves, what stays, what is refused."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from distill_core.errors import RecipeErrors, UserError
from distill_core.outputs import Outputs, Progress
from distill_core.recipe.resolve import parse_recipe
from distill_core.registry import Registry
from distill_dino.prototypes import spread
from distill_dino.targets import Targets, sinkhorn_knopp
from distill_vl.heads import DINOHead

CENTRINGS = ["ema", "sinkhorn_knopp"]
WARM = 0.04 + (0.07 - 0.04) * (2 / 10) / 0.3  # steps.PROGRESS is 2 of 10; the warm-up takes 0.3 of the run


class Said:
    """What the transcribed head says of the features of a step, as nested lists."""

    def __init__(self, transcription: ModuleType, made: Any, id: str, outputs: Outputs) -> None:
        self.transcription, self.outputs = transcription, outputs
        self.student_head = made.loss[id].head
        self.teacher_head = made.get_submodule(f"teacher.default.loss.{id}.head")

    def logits(self, head: DINOHead, x: torch.Tensor) -> list[float]:
        layers = [(p.weight.tolist(), p.bias.tolist()) for p in head.mlp if isinstance(p, nn.Linear)]
        assert len(layers) == 3
        return self.transcription.head(x.tolist(), layers, head.last_layer.tolist())  # type: ignore[no-any-return]

    def classes(self, who: str, view: int, token: int = 0) -> list[list[float]]:
        features = (self.outputs.student if who == "student" else self.outputs.teacher["default"])["image"]
        head = self.student_head if who == "student" else self.teacher_head
        return [self.logits(head, x) for x in features.class_tokens[view, :, token]]

    def patches(self, who: str, view: int) -> list[list[list[float]]]:
        features = (self.outputs.student if who == "student" else self.outputs.teacher["default"])["image"]
        head = self.student_head if who == "student" else self.teacher_head
        return [[self.logits(head, x) for x in row] for row in features.tokens[view]]

    def targets(self, rows: list[list[float]], centring: str, center: torch.Tensor) -> list[list[float]]:
        if centring == "ema":
            return self.transcription.centred(rows, center.tolist(), WARM)  # type: ignore[no-any-return]
        return self.transcription.balanced(rows, WARM)  # type: ignore[no-any-return]


def class_loss(said: Said, centring: str, center: torch.Tensor, token: int = 0, views: range = range(4)) -> float:
    teacher = [said.classes("teacher", view, token) for view in range(2)]
    flat = said.targets([row for view in teacher for row in view], centring, center)
    targets = [flat[: len(teacher[0])], flat[len(teacher[0]) :]]
    student = [said.classes("student", view, token) for view in views]
    return said.transcription.dino(student, targets, list(views), [0, 1], 0.1)  # type: ignore[no-any-return]


def patch_loss(
    said: Said, masks: torch.Tensor, pairs: list[tuple[int, int]], centring: str, center: torch.Tensor
) -> float:
    """`masks` [P, B, L] of the student's views in `pairs` of (student's, teacher's own number)."""
    teacher = [said.patches("teacher", t) for _, t in pairs]
    places = [tuple(place) for place in masks.nonzero().tolist()]
    flat = said.targets([teacher[v][b][patch] for v, b, patch in places], centring, center)
    targets: list[list[list[list[float]]]] = [[[[] for _ in row] for row in view] for view in teacher]
    for (v, b, patch), target in zip(places, flat, strict=True):
        targets[v][b][patch] = target
    student = [said.patches("student", s) for s, _ in pairs]
    return said.transcription.ibot(student, targets, masks.tolist(), 0.1)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("centring", CENTRINGS)
@pytest.mark.parametrize("token", [0, 1])
def test_dino(steps: ModuleType, transcription: ModuleType, centring: str, token: int) -> None:
    """Catches a pair of the same view, a missing centre, a swapped temperature, the student's head for the teacher,
    the wrong class token, and Sinkhorn-Knopp within one view."""
    made = steps.objective(f"[{{name: dino, {steps.HEAD}, centring: {centring}, class_token: {token}}}]")
    outputs = made.represent(steps.batch(), steps.PROGRESS)
    losses = made.losses(outputs)
    expected = class_loss(Said(transcription, made, "dino", outputs), centring, made.loss["dino"].targets.center, token)
    assert list(losses.terms) == ["dino"]
    assert losses.terms["dino"].item() == pytest.approx(expected, rel=1e-10)
    assert losses.metrics["dino/teacher_temperature"].item() == pytest.approx(WARM)


def test_dino_of_some_roles(steps: ModuleType, transcription: ModuleType) -> None:
    """Local to global alone: no global view of the student takes part."""
    made = steps.objective(f"[{{name: dino, {steps.HEAD}, student_roles: [local]}}]")
    outputs = made.represent(steps.batch(), steps.PROGRESS)
    said = Said(transcription, made, "dino", outputs)
    expected = class_loss(said, "ema", made.loss["dino"].targets.center, views=range(2, 4))
    assert made.losses(outputs).terms["dino"].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("centring", CENTRINGS)
@pytest.mark.parametrize("shared", [True, False])
def test_ibot(steps: ModuleType, transcription: ModuleType, centring: str, shared: bool) -> None:
    """Catches patches that are seen and yet predicted, another weight of samples with few hidden patches or none, and
    the class tokens' centre on patches."""
    options = f"centring: {centring}, shared_head: {str(shared).lower()}"
    made = steps.objective(f"[{{name: ibot, {steps.HEAD}, {options}}}]")
    batch = steps.batch()
    outputs = made.represent(batch, steps.PROGRESS)
    losses = made.losses(outputs)
    said, loss = Said(transcription, made, "ibot", outputs), made.loss["ibot"]
    masks = batch.views["image"].groups[0].token_mask
    patch = patch_loss(said, masks, [(0, 0), (1, 1)], centring, loss.targets.center)
    assert set(losses.terms) == ({"ibot/patch", "ibot/class"} if shared else {"ibot"})
    assert losses.terms["ibot/patch" if shared else "ibot"].item() == pytest.approx(patch, rel=1e-10)
    if shared:
        expected = class_loss(said, centring, loss.class_targets.center)
        assert losses.terms["ibot/class"].item() == pytest.approx(expected, rel=1e-10)
    assert losses.metrics["ibot/masked"].item() == pytest.approx(masks.float().mean().item())
    places = masks.nonzero().tolist()
    student, teacher = ([said.patches(who, view) for view in range(2)] for who in ("student", "teacher"))
    targets = said.targets([teacher[v][b][i] for v, b, i in places], centring, loss.targets.center)
    each = [
        transcription.cross_entropy(target, student[v][b][i], 0.1)
        for target, (v, b, i) in zip(targets, places, strict=True)
    ]
    assert losses.metrics["ibot/patch_cross_entropy"].item() == pytest.approx(sum(each) / len(each), rel=1e-10)


COPIES = "size: 12, local_size: 4, global: 2, local: 2, masked: 1"


def test_ibot_of_masked_copies(steps: ModuleType, transcription: ModuleType) -> None:
    """The student's masked copy (view 4) against the teacher's whole view 0; the class tokens see no mask."""
    recipe = steps.RECIPE.replace("size: 12, local_size: 4, global: 2, local: 2", COPIES).replace(
        "masking: {}", "masking: {roles: [masked]}"
    )
    losses = f"[{{name: ibot, {steps.HEAD}, role: masked, target_role: global}}]"
    made = steps.objective(losses, recipe)
    batch = steps.batch(masked_copies=True)
    outputs = made.represent(batch, steps.PROGRESS)
    assert list(outputs.student["image"].tokens) == [4]
    assert list(outputs.teacher["default"]["image"].tokens) == [0]
    terms, loss = made.losses(outputs).terms, made.loss["ibot"]
    said, masks = Said(transcription, made, "ibot", outputs), batch.views["image"].groups[2].token_mask
    assert terms["ibot/patch"].item() == pytest.approx(
        patch_loss(said, masks, [(4, 0)], "ema", loss.targets.center), rel=1e-10
    )
    assert terms["ibot/class"].item() == pytest.approx(class_loss(said, "ema", loss.class_targets.center), rel=1e-10)


def test_ibot_without_a_hidden_patch(steps: ModuleType) -> None:
    """A small batch may have none: a term of 0 with gradients, and a centre that stays."""
    for centring in CENTRINGS:
        made = steps.objective(f"[{{name: ibot, {steps.HEAD}, centring: {centring}}}]")
        batch = steps.batch()
        batch.views["image"].groups[0].token_mask[:] = False
        outputs = made.represent(batch, steps.PROGRESS)
        losses = made.losses(outputs)
        assert losses.terms["ibot/patch"].item() == 0
        losses.total.backward()
        before = made.loss["ibot"].targets.center.clone()
        made.after_step(outputs, steps.PROGRESS)
        assert torch.equal(made.loss["ibot"].targets.center, before)


def test_the_centre_moves_after_the_step_by_the_teachers_mean(steps: ModuleType, transcription: ModuleType) -> None:
    """Catches a centre that moves in forward, by the student's logits, by seen patches, or with momentum and its
    complement swapped."""
    made = steps.objective(f"[{{name: dino, {steps.HEAD}, center_momentum: 0.8}}, {{name: ibot, {steps.HEAD}}}]")
    batch = steps.batch()
    outputs = made.represent(batch, steps.PROGRESS)
    dino, ibot = made.loss["dino"].targets, made.loss["ibot"].targets
    first = {name: x.clone() for name, x in made.named_buffers()}
    made.losses(outputs)
    made.losses(outputs)
    assert all(torch.equal(x, first[name]) for name, x in made.named_buffers())
    of_dino, of_ibot = (Said(transcription, made, id, outputs) for id in ("dino", "ibot"))
    rows = [row for view in range(2) for row in of_dino.classes("teacher", view)]
    masks = batch.views["image"].groups[0].token_mask
    patches = [of_ibot.patches("teacher", view) for view in range(2)]
    hidden = [patches[v][b][i] for v, b, i in masks.nonzero().tolist()]
    classes = [row for view in range(2) for row in of_ibot.classes("teacher", view)]
    expected = [
        (dino.center, transcription.moved_center(dino.center.tolist(), rows, 0.8)),
        (ibot.center, transcription.moved_center(ibot.center.tolist(), hidden, 0.9)),
        (
            made.loss["ibot"].class_targets.center,
            transcription.moved_center(made.loss["ibot"].class_targets.center.tolist(), classes, 0.9),
        ),
    ]
    made.after_step(outputs, steps.PROGRESS)
    for center, row in expected:
        assert center.tolist() == pytest.approx(row, rel=1e-10)
    again = {name: x.clone() for name, x in made.named_buffers()}
    made.after_step(outputs, steps.PROGRESS)
    assert all(torch.equal(x, again[name]) for name, x in made.named_buffers()), "one step moves it once"


def test_the_state_keeps_centres(steps: ModuleType) -> None:
    """A resumed run must not start from a centre of 0."""
    made = steps.objective(steps.BOTH)
    state = made.state_dict()
    centers = {name for name in state if name.endswith("center")}
    assert {"loss.dino.targets.center", "loss.ibot.targets.center", "loss.ibot.class_targets.center"} <= centers
    other = steps.objective(steps.BOTH)
    for name in centers:
        other.get_buffer(name).zero_()
    other.load_state_dict(state)
    a, b = (x.losses(x.represent(steps.batch(), steps.PROGRESS)).terms for x in (made, other))
    assert {name: term.item() for name, term in a.items()} == {name: term.item() for name, term in b.items()}


def test_gradients_reach_the_student_alone(steps: ModuleType) -> None:
    """And the prototypes not during the first part of the run."""
    made = steps.objective(f"[{{name: dino, {steps.HEAD}, freeze_last_layer: 0.2}}, {{name: ibot, {steps.HEAD}}}]")
    for progress, frozen in ((Progress(1, 10), True), (Progress(2, 10), False)):
        made.zero_grad()
        made.losses(made.represent(steps.batch(), progress)).total.backward()
        missing = {name for name, p in made.named_parameters() if p.grad is None and not name.startswith("teacher.")}
        # the embedding is nobody's here
        assert missing == {"backbone.image.proj"} | ({"loss.dino.head.last_layer"} if frozen else set())
        assert all(p.grad is None for p in made.teacher.parameters())


def test_the_teachers_temperature_rises(steps: ModuleType) -> None:
    ramp = "teacher_temperature: {name: ramp, start: 0.02, end: 0.07, until: 0.5}"
    made = steps.objective(f"[{{name: dino, {steps.HEAD}, {ramp}}}]")
    loss = made.loss["dino"]
    values = [loss.temperature(Progress(step, 100)) for step in (0, 25, 50, 99)]
    assert values == pytest.approx([0.02, 0.045, 0.07, 0.07])
    loss = steps.objective(f"[{{name: dino, {steps.HEAD}}}]").loss["dino"]
    values = [loss.temperature(Progress(step, 100)) for step in (0, 15, 30, 99)]
    assert values == pytest.approx([0.04, 0.055, 0.07, 0.07]), "DINO's own: 30 epochs of 100"


def test_head_is_torchs_weight_norm() -> None:
    """Against `torch.nn.utils.parametrizations.weight_norm`, lengths learned and fixed, values and gradients."""
    torch.manual_seed(1)
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    for norm in (True, False):
        head = DINOHead(6, 9, hidden=7, bottleneck=5, layers=3, norm_last_layer=norm).double()
        names = {name for name, _ in head.named_parameters() if not name.startswith("mlp")}
        assert names == ({"last_layer"} if norm else {"last_layer", "last_layer_length"})
        if head.last_layer_length is not None:
            head.last_layer_length.data.uniform_(0.5, 2.0)
        plain = nn.utils.parametrizations.weight_norm(nn.Linear(5, 9, bias=False).double())
        weights = plain.parametrizations.weight
        weights.original1.data.copy_(head.last_layer.data)
        lengths = torch.ones(9, 1) if head.last_layer_length is None else head.last_layer_length.data[:, None]
        weights.original0.data.copy_(lengths)
        expected = plain(nn.functional.normalize(head.mlp(x), dim=-1))
        torch.testing.assert_close(head(x), expected, rtol=1e-12, atol=1e-12)
        weight = torch.randn_like(expected)
        (head(x) * weight).sum().backward()
        (expected * weight).sum().backward()
        torch.testing.assert_close(head.last_layer.grad, weights.original1.grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(head(x, freeze_last_layer=True), head(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert DINOHead(6, 9, hidden=7, bottleneck=5)(x.float()).dtype == torch.float32


def test_sinkhorn_knopp_balances_and_does_not_overflow() -> None:
    torch.manual_seed(2)
    logits = torch.randn(40, 5)
    logits[:, 0] += 5.0  # left alone, everything would go to the first prototype
    p = sinkhorn_knopp(logits, 1.0)
    torch.testing.assert_close(p.sum(1), torch.ones(40))
    assert logits.softmax(1).sum(0)[0] > 30
    assert p.sum(0).max() < 10
    assert torch.isfinite(sinkhorn_knopp(logits * 50, 0.04)).all()


@pytest.mark.parametrize("centring", CENTRINGS)
def test_padding_has_no_part_in_targets(centring: str) -> None:
    """Catches padded rows in the moving mean, in the shares of prototypes, and in what is reported."""
    torch.manual_seed(3)
    logits, real = torch.randn(20, 5, dtype=torch.float64), torch.rand(20) < 0.6
    logits[~real] += 9.0
    padded, plain = (Targets(5, centring, 0.9).double() for _ in range(2))  # type: ignore[arg-type]
    seen, expected = padded(logits, 0.5, real=real), plain(logits[real], 0.5)
    torch.testing.assert_close(seen[real], expected, rtol=1e-10, atol=1e-10)
    for targets in (padded, plain):
        targets.move()
    torch.testing.assert_close(padded.center, plain.center, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(spread(seen, real=real), spread(expected), rtol=1e-10, atol=1e-10)


def test_metrics_tell_the_two_collapses() -> None:
    k = 8
    uniform = spread(torch.full((2, 5, k), 1 / k))
    assert uniform["teacher_entropy"].item() == pytest.approx(math.log(k), rel=1e-6)
    one = spread(torch.eye(k)[torch.zeros(10, dtype=torch.long)])
    assert one["teacher_entropy"].item() == 0
    assert one["mean_target_entropy"].item() == 0
    healthy = spread(torch.eye(k))
    assert healthy["teacher_entropy"].item() == 0
    assert healthy["mean_target_entropy"].item() == pytest.approx(math.log(k), rel=1e-6)


def test_koleo(steps: ModuleType, transcription: ModuleType) -> None:
    """Catches a row that is its own nearest, views mixed or averaged, lengths that count, and another weight."""
    made = steps.objective("[{name: koleo}]")
    outputs = made.represent(steps.batch(), steps.PROGRESS)
    term = made.losses(outputs).terms["koleo"]
    expected = transcription.koleo(outputs.student["image"].class_tokens[:2, :, 0].tolist())
    assert term.item() == pytest.approx(expected, rel=1e-10)
    assert made.losses(outputs).total.item() == pytest.approx(0.1 * expected, rel=1e-10)
    single = made.represent(steps.batch(2, 3), steps.PROGRESS)
    made.losses(single).total.backward()
    assert made.losses(single).terms["koleo"].item() == 0


def test_masks_that_are_missing_are_named(steps: ModuleType) -> None:
    made = steps.objective(f"[{{name: ibot, {steps.HEAD}}}]")
    outputs = made.represent(steps.batch(masked_copies=True), steps.PROGRESS)
    with pytest.raises(UserError, match=r"'ibot' needs the global views of 'image' masked; name the role in"):
        made.losses(outputs)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("teacher: {}", "", "'LOSS' needs a teacher; this recipe has none"),
        ("modality: image", "modality: picture", "'LOSS' needs a modality 'picture'"),
        ("teacher: {}", "teacher: {views: [local]}", "IBOT needs the teacher's tokens of view 0 of 'image'"),
        ("masking: {}", "masking: null", "IBOT needs masked views of 'image'; its backbone cannot hide tokens"),
        ("global: 2, local: 2", "global: 1, local: 0", "'LOSS' needs a view of 'image' beside the teacher's own"),
        ("modality: image", "class_token: 2", "DINO needs class token 2 of 'image'; its backbone gives 2"),
        ("modality: image", "target_role: masked", "IBOT needs 2 masked view"),
        (
            "modality: image",
            "student_roles: [global, locl]",
            "DINO: student_roles: no view has the role 'locl', did you mean 'local'",
        ),
    ],
)
@pytest.mark.parametrize("loss", ["dino", "ibot"])
def test_needs(steps: ModuleType, registry: Registry, loss: str, old: str, new: str, line: str) -> None:
    if line[:4] in ("DINO", "IBOT") and line[:4].lower() != loss:
        pytest.skip("of the other loss")
    recipe = steps.RECIPE.replace("LOSSES", f"[{{name: {loss}, modality: image}}]")
    parse_recipe(recipe, "r.yaml", registry=registry)
    line = line.replace("LOSS", loss).replace("DINO", "'dino'").replace("IBOT", "'ibot'")
    with pytest.raises(RecipeErrors, match=line):
        parse_recipe(recipe.replace(old, new), "r.yaml", registry=registry)
