"""Student, teacher, fusion and losses put together, against hand arithmetic on towers of a few numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill_core.batch import Batch, Group, View, Views
from distill_core.contracts.schedule import Cosine, Scheduled
from distill_core.interfaces import Backbone, FusionHead, Loss, LossConfig
from distill_core.objective import Objective
from distill_core.outputs import Encoded, Features, Fused, Outputs, Progress, Rows
from distill_core.plan import BackboneSpec, ModalityPlan, Needs, Plan, TeacherPlan
from distill_core.teachers.copies import CopiedTeacher, Ema, EmaConfig

W, D, L, B = 3, 2, 4, 5


class Mean(Backbone):
    """x [N, L, W] -> pooled: the mean token times a matrix; tokens: x plus a number."""

    name = "mean"

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.proj = nn.Parameter(torch.randn(W, D))
        self.shift = nn.Parameter(torch.randn(()))
        self.register_buffer("seen", torch.zeros(()))
        self.calls: list[tuple[int, bool, bool]] = []

    @classmethod
    def spec(cls, config: Any) -> BackboneSpec:
        return BackboneSpec(W, D)

    @classmethod
    def collator(cls, config: Any) -> Callable[[list[list[View]]], Views]:
        raise NotImplementedError

    def encode(self, x: Tensor, *, tokens: bool, token_mask: Tensor | None) -> Encoded:
        self.calls.append((x.shape[0], tokens, token_mask is not None))
        if self.training:
            self.seen += 1
        if token_mask is not None:
            x = x.masked_fill(token_mask[..., None], 0.0)
        pooled = x.mean(1) @ self.proj
        return Encoded(pooled, x + self.shift, x[..., 0] > 0) if tokens else Encoded(pooled)


class SumFusion(FusionHead):
    name = "sum"
    forwards = 0

    def forward(self, features: dict[str, Features]) -> dict[str, Fused]:
        self.forwards += 1
        return {m: Fused(nn.functional.normalize(f.pooled, dim=-1)) for m, f in features.items()}


class Pull(Loss):
    """Mean squared distance between the student and a number, or the teacher."""

    name = "pull"

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        target = outputs.teacher["default"]["a"].pooled if outputs.teacher else torch.ones(())
        return {"pull": (outputs.student["a"].pooled[:1] - target[:1]).square().mean()}, {"one": torch.ones(())}


class PullFused(Pull):
    """Reads fused views, too."""

    @classmethod
    def needs(cls, config: Any, plan: Plan) -> Needs:
        return Needs(fused=("a", "b"))


class Two(Loss):
    """Two terms, and a head that the teacher keeps an average of."""

    name = "two"
    teacher_modules = ("head",)

    def __init__(self, config: Any, plan: Plan) -> None:
        super().__init__(config, plan)
        self.head = nn.Linear(D, D)
        self.other = nn.Linear(D, D)

    @classmethod
    def needs(cls, config: Any, plan: Plan) -> Needs:
        return Needs(teacher={"default": {"a": ()}})

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        mine = self.head(outputs.student["a"].pooled)
        with torch.no_grad():
            theirs = outputs.ema(self.head)(outputs.student["a"].pooled)
        return {"x": (mine - theirs).square().mean() + mine.mean(), "y": self.other(mine).mean()}, {}


def objective_of(
    *losses: Loss | type[Loss],
    teacher: EmaConfig | None = None,
    needs: Sequence[Needs] = (),
    taught: Sequence[str] = ("a", "b"),
    weights: Sequence[float] = (),
) -> Objective:
    roles = teacher.views if teacher is not None else ()
    views = tuple(i for i, role in enumerate(("global", "global", "local")) if role in roles)
    plan = Plan(
        {name: ModalityPlan(("global", "global", "local"), BackboneSpec(W, D)) for name in ("a", "b")},
        {"default": TeacherPlan(dict.fromkeys(taught, views))} if teacher is not None else {},
        True,
    )
    built = {}
    for i, cls in enumerate(losses):
        weight = weights[i] if weights else 1.0
        built[cls.name] = cls(LossConfig(weight=weight), plan)  # type: ignore[operator]
    objective = Objective({"a": Mean(), "b": Mean()}, plan, needs, loss=built, fusion=SumFusion(None, plan))
    if teacher is not None:
        objective.add_teacher("default", partial(Ema, teacher))
    return objective


def teacher_of(objective: Objective) -> Any:
    """The one that losses read by default."""
    teacher = objective.teachers["default"]
    assert isinstance(teacher, CopiedTeacher)
    return teacher


@pytest.fixture
def batch() -> Batch:
    def views() -> Views:
        mask = torch.rand(2, B, L) < 0.5
        mask[..., 0] = False  # a sample without any token has no direction
        groups = [Group(torch.randn(2, B, L, W), "global", token_mask=mask), Group(torch.randn(1, B, L, W), "local")]
        return Views(groups)

    return Batch({"a": views(), "b": views()}, ["k"] * B)


def test_momentum() -> None:
    """Hand-computed. Catches a cosine that runs the wrong way, or is measured in other than the whole run."""

    def ema(momentum: float | Scheduled[Any]) -> Ema:
        teacher = teacher_of(objective_of(Pull, teacher=EmaConfig(momentum=momentum)))  # type: ignore[arg-type]
        assert isinstance(teacher, Ema)
        return teacher

    fixed = ema(momentum=0.97)
    assert [fixed.momentum(Progress(step, 10)) for step in (0, 5, 9)] == [0.97] * 3
    cosine = ema(momentum=Scheduled.by(Cosine, start=0.9, end=1.0))
    expected = [1 - 0.1 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert [cosine.momentum(Progress(step, 8)) for step in range(8)] == pytest.approx(expected, rel=1e-12)
    assert cosine.momentum(Progress(0, 8)) == pytest.approx(0.9)
    assert cosine.momentum(Progress(4, 8)) == pytest.approx(0.95)


@pytest.mark.parametrize("order", ["before_optimizer", "after_optimizer"])
def test_order_of_teacher_and_optimiser(batch: Batch, order: str) -> None:
    """teacher = m teacher + (1 - m) student, with the student from before or from after the step."""
    config = EmaConfig(momentum=Scheduled.by(Cosine, start=0.75, end=0.25), update=order)  # type: ignore[arg-type]
    objective = objective_of(Pull, teacher=config)
    teacher_of(objective).backbone["a"].proj.data.add_(1.0)
    optimizer = torch.optim.SGD(objective.backbone.parameters(), lr=0.5)
    for step in range(3):
        progress = Progress(step, 4)
        momentum = 0.25 + 0.5 * (1 + math.cos(math.pi * step / 4)) / 2
        optimizer.zero_grad()
        outputs = objective.represent(batch, progress)
        objective.losses(outputs).total.backward()
        old_teacher = teacher_of(objective).backbone["a"].proj.clone()
        old_student = objective.backbone["a"].proj.detach().clone()
        new_student = old_student - 0.5 * objective.backbone["a"].proj.grad
        objective.before_optimizer(progress)
        optimizer.step()
        objective.after_step(outputs, progress)
        student = old_student if order == "before_optimizer" else new_student
        torch.testing.assert_close(objective.backbone["a"].proj.data, new_student)
        torch.testing.assert_close(
            teacher_of(objective).backbone["a"].proj,
            momentum * old_teacher + (1 - momentum) * student,
        )
        assert (new_student - old_student).abs().max() > 1e-4


def test_teacher_is_out_of_the_gradients_reach(batch: Batch) -> None:
    """Catches gradients into the teacher, teacher parameters that are trained, a teacher in training mode, and buffers
    that it moves itself or never takes from the student."""
    objective = objective_of(Pull, Two, teacher=EmaConfig())
    objective.train()
    outputs = objective.represent(batch, Progress(0, 1))
    assert not outputs.teacher["default"]["a"].pooled.requires_grad
    assert outputs.student["a"].pooled.requires_grad
    objective.losses(outputs).total.backward()
    teacher = teacher_of(objective)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert objective.backbone["a"].proj.grad is not None
    assert not any(name.startswith("teacher") for name, _, _ in objective.trainable([], {}))
    assert objective.backbone["a"].training
    assert not teacher.backbone["a"].training
    assert teacher.backbone["a"].seen == 0
    objective.after_step(outputs, Progress(0, 1))
    assert teacher.backbone["a"].seen == objective.backbone["a"].seen > 0


def test_teacher_starts_as_the_student_and_keeps_a_copy() -> None:
    objective = objective_of(Pull, teacher=EmaConfig())
    mine, theirs = objective.backbone["a"].proj, teacher_of(objective).backbone["a"].proj
    assert torch.equal(mine, theirs)
    assert mine.data_ptr() != theirs.data_ptr()


def test_a_half_precision_student_has_a_float32_teacher() -> None:
    """Catches an average that never moves: 0.001 of a bf16 difference is below its resolution."""
    objective = objective_of(Pull)
    student = objective.backbone["a"].to(torch.bfloat16)
    nn.init.ones_(student.proj)
    teacher = Ema(EmaConfig(momentum=0.999), "default", TeacherPlan({"a": (0,)}), objective)
    nn.init.constant_(student.proj, 1.5)
    teacher.move(Progress(0, 1))
    torch.testing.assert_close(teacher.backbone["a"].proj, torch.full_like(teacher.backbone["a"].proj, 1.0005))


def test_the_teachers_copy_of_a_losses_head(batch: Batch) -> None:
    """Catches a head that is not averaged, one that is though it was not asked for, and a lost copy in the state."""
    objective = objective_of(Two, teacher=EmaConfig(momentum=0.5))
    loss = objective.loss["two"]
    copy = objective.ema(loss.head)
    assert torch.equal(copy.weight, loss.head.weight)
    assert copy is not loss.head
    with pytest.raises(KeyError):
        objective.ema(loss.other)
    before = copy.weight.clone()
    loss.head.weight.data += 2.0
    outputs = objective.represent(batch, Progress(0, 1))
    assert outputs.ema(loss.head) is copy
    objective.after_step(outputs, Progress(0, 1))
    torch.testing.assert_close(copy.weight, before + 1.0)
    assert any(key.startswith("teacher.default.loss.two.head.") for key in objective.state_dict())
    with pytest.raises(KeyError):
        objective_of(Two).ema(loss.head)


def test_tokens_of_the_needed_views_alone(batch: Batch) -> None:
    """Catches tokens computed for nobody, of the wrong view, or in the wrong rows, and masks lost on the way."""
    needs = [Needs(tokens={"a": (1,)}), Needs(tokens={"a": (1, 2), "b": (0,)}, teacher={"default": {"a": (0,)}})]
    objective = objective_of(Pull, teacher=EmaConfig(), needs=needs)
    outputs = objective.represent(batch, Progress(0, 1))
    a, b = objective.backbone["a"], objective.backbone["b"]
    assert [(n, tokens) for n, tokens, _ in a.calls] == [(B, False), (B, True), (B, True)]
    assert [(n, tokens) for n, tokens, _ in b.calls] == [(B, True), (B, False), (B, False)]
    assert sorted(outputs.student["a"].tokens) == sorted(outputs.student["a"].masks) == [1, 2]
    assert sorted(outputs.student["b"].tokens) == [0]
    assert sorted(outputs.teacher["default"]["a"].tokens) == [0]
    assert sorted(outputs.teacher["default"]["b"].tokens) == []
    x = [group.x for group in batch.views["a"].groups]
    hidden = batch.views["a"].groups[0].token_mask
    assert hidden is not None
    seen = x[0].masked_fill(hidden[..., None], 0.0)
    torch.testing.assert_close(outputs.student["a"].tokens[1], seen[1] + a.shift)
    torch.testing.assert_close(outputs.student["a"].tokens[2], x[1][0] + a.shift)
    assert torch.equal(outputs.student["a"].masks[2], x[1][0, ..., 0] > 0)
    expected = torch.cat([seen, x[1]]).mean(2) @ a.proj
    torch.testing.assert_close(outputs.student["a"].pooled, expected)


def test_views_without_tokens_go_in_one_call_a_group(batch: Batch) -> None:
    objective = objective_of(Pull)
    objective.represent(batch, Progress(0, 1))
    assert [(n, tokens) for n, tokens, _ in objective.backbone["a"].calls] == [(2 * B, False), (B, False)]


def test_only_the_student_sees_masks(batch: Batch) -> None:
    """As in masked modelling. Catches a teacher that is given masked input."""
    objective = objective_of(Pull, teacher=EmaConfig())
    outputs = objective.represent(batch, Progress(0, 1))
    assert [masked for _, _, masked in objective.backbone["a"].calls] == [True, False]
    teacher = teacher_of(objective)
    assert [masked for _, _, masked in teacher.backbone["a"].calls] == [False]
    x = batch.views["a"].groups[0].x
    torch.testing.assert_close(outputs.teacher["default"]["a"].pooled, x.mean(2) @ teacher.backbone["a"].proj)


def test_terms_are_weighted_and_named(batch: Batch) -> None:
    """Catches a weight that scales one term of several, or the logged value, and names that collide."""
    objective = objective_of(Pull, Two, teacher=EmaConfig(), weights=(0.5, 3.0))
    losses = objective.losses(objective.represent(batch, Progress(0, 1)))
    assert set(losses.terms) == {"pull", "two/x", "two/y"}
    assert set(losses.metrics) == {"pull/one"}
    expected = 0.5 * losses.terms["pull"] + 3 * (losses.terms["two/x"] + losses.terms["two/y"])
    torch.testing.assert_close(losses.total, expected)
    assert losses.terms["pull"] > 0 or losses.terms["two/x"] != 0


def test_modalities_of_the_teacher(batch: Batch) -> None:
    objective = objective_of(Pull, teacher=EmaConfig(modalities=("a",)), taught=("a",))
    assert list(teacher_of(objective).backbone) == ["a"]
    assert list(objective.represent(batch, Progress(0, 1)).teacher["default"]) == ["a"]


@pytest.mark.parametrize(("roles", "count"), [(("global",), 2), (("local",), 1), (("global", "local"), 3)])
def test_views_of_the_teacher(batch: Batch, roles: tuple[str, ...], count: int) -> None:
    objective = objective_of(Pull, teacher=EmaConfig(views=roles))
    assert objective.represent(batch, Progress(0, 1)).teacher["default"]["b"].pooled.shape == (count, B, D)


def test_fusion_only_where_a_loss_reads_it(batch: Batch) -> None:
    assert objective_of(Pull).represent(batch, Progress(0, 1)).fused == {}
    objective = objective_of(PullFused)
    outputs = objective.represent(batch, Progress(0, 1))
    assert outputs.fused
    assert objective.fusion.forwards == 1  # type: ignore[union-attr]


class ReadsFusedA(Loss):
    """Fused views of one modality, of a fusion that names none and so reads all."""

    name = "reads_fused_a"
    partial = True

    @classmethod
    def needs(cls, config: Any, plan: Plan) -> Needs:
        return Needs(fused=("a",))

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        fused, student = outputs.fused["a"].pooled, outputs.student["a"].pooled
        return {"sum": fused.sum()}, {"rows": torch.tensor(fused.shape[1]), "others": torch.tensor(student.shape[1])}


def test_fused_views_are_of_the_samples_that_have_all(batch: Batch) -> None:
    """Catches features of other samples beside them, where the fusion does not say what it reads."""
    objective = objective_of(ReadsFusedA)
    have = np.array([True, False, True, False, True])
    batch.presence = {"b": have}
    batch.views["b"] = batch.views["b"].map(lambda x: x[:, torch.from_numpy(have)])
    outputs = objective.represent(batch, Progress(0, 1))
    losses = objective.losses(outputs)
    assert (losses.metrics["reads_fused_a/rows"], losses.metrics["reads_fused_a/others"]) == (3, 3)
    expected = nn.functional.normalize(outputs.student["a"].pooled[:, torch.from_numpy(have)], dim=-1).sum()
    torch.testing.assert_close(losses.total, expected)


class Replaces(Pull):
    """Its buffer is another tensor after each step."""

    name = "replaces"

    def __init__(self, config: Any, plan: Plan) -> None:
        super().__init__(config, plan)
        self.register_buffer("steps", torch.zeros(()))

    def after_step(self, outputs: Outputs, progress: Progress) -> None:
        self.steps = self.steps + 1


def test_a_buffer_that_is_replaced_is_put_back_too(batch: Batch) -> None:
    """Catches state that moves at a step which is not finite."""
    objective = objective_of(Replaces)
    outputs = objective.represent(batch, Progress(0, 2))
    for finite, steps in ((True, 1), (False, 1), (True, 2)):
        objective.after_step(outputs, Progress(0, 2), torch.tensor(finite))
        assert objective.loss["replaces"].steps == steps


def test_embeddings(batch: Batch) -> None:
    """Catches half-precision or un-normalised embeddings, and another tensor for each loss that asks."""
    objective = objective_of(PullFused, teacher=EmaConfig())
    outputs = objective.represent(batch, Progress(0, 1))
    outputs.student["a"].pooled = outputs.student["a"].pooled.to(torch.bfloat16)
    embedding = outputs.student["a"].embedding
    assert embedding.dtype == torch.float32
    torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(3, B))
    assert outputs.student["a"].embedding is embedding
    assert outputs.student["a"].gathered is embedding, "one process gathers nothing"
    assert outputs.fused["b"].embedding.shape == (3, B, D)
    assert outputs.teacher["default"]["b"].embedding.shape == (2, B, D)
    some = outputs.student["a"].rows[:1]
    assert torch.equal(some.embedding, embedding[:1])
    assert torch.equal(some.gathered, embedding[:1])
    both = Rows.cat([outputs.student["a"].rows, outputs.fused["b"].rows])
    assert both.embedding.shape == both.gathered.shape == (6, B, D)
