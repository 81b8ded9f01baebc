"""Tokens of layers before the last, from the towers to a loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill_authoring.conformance import assert_conforms, check
from distill_core import (
    Backbone,
    BackboneSpec,
    Batch,
    Features,
    Group,
    Loss,
    LossConfig,
    ModalityPlan,
    Needs,
    Outputs,
    Plan,
    Progress,
    TeacherPlan,
    View,
    Views,
)
from distill_core.objective import Objective
from distill_core.presence import Present
from distill_core.recipe.needs import unmet
from distill_core.teachers.copies import Ema, EmaConfig
from distill_vl.clip_text import ClipText
from distill_vl.masked_text import BertText
from distill_vl.transformer import Sequences
from distill_vl.vit import VisionTransformer

SMALL = {"width": 32, "layers": 3, "heads": 2, "dim": 24}


def vit(**options: Any) -> VisionTransformer:
    return VisionTransformer(VisionTransformer.Config(image_size=16, patch=4, class_tokens=2, **SMALL, **options))


def block_by_block(tower: Any, x: Tensor, *, causal: bool) -> list[Tensor]:
    """What each block gives of one sequence [L, W], alone."""
    given = []
    for block in tower.transformer.resblocks:
        x = block(x, Sequences.of((1, len(x)), causal=causal))
        given.append(x)
    return given


def test_layers_of_a_vit() -> None:
    """Crops of two sizes in one pass, different layers of each: against one crop after the other, block after block.
    Catches class tokens among the patches, rows of the other size, and the final norm."""
    torch.manual_seed(0)
    tower = vit()
    views = Views([Group(torch.randn(2, 3, 3, 16, 16)), Group(torch.randn(2, 3, 3, 8, 8), "local")])
    features = tower(views, tokens_of=(1, 2, 3), layers_of={0: (1,), 2: (1, 3), 1: (2,)})
    assert {layer: sorted(of) for layer, of in features.layers.items()} == {0: [1], 2: [1, 3], 1: [2]}
    for layer, of in features.layers.items():
        for view, tokens in of.items():
            crops = views.groups[view // 2].x[view % 2]
            for crop, own in zip(crops, tokens, strict=True):
                expected = block_by_block(tower, tower._embed(crop[None], None)[0], causal=False)[layer][2:]
                torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("of", "padding"), [(ClipText, "context"), (ClipText, "longest"), (BertText, None)])
def test_layers_of_texts(of: type[Backbone], padding: str | None) -> None:
    """Packed with texts whose tokens nobody needs. Catches rows of a neighbour, in the last layer and before it."""
    torch.manual_seed(0)
    options = {"context": 12, **SMALL} if padding is None else {"context": 12, "padding": padding, **SMALL}
    tower: Any = of(of.Config(**options))
    texts = ["a gull", "a gull over the harbour", "gulls"]
    collate = of.collator(tower.config)
    views = collate([[View(text), View(text[::-1][:6])] for text in texts], [1, 2, 3])
    features = tower(views, tokens_of=(1,), layers_of={0: (1,), 2: (1,)})
    (group,) = views.groups
    for i, ids in enumerate(group.x[1]):
        count = int(ids.argmax()) + 1
        embedded = tower.token_embedding(ids[:count]) + tower.positional_embedding[:count]
        start = tower.ln_pre(embedded) if of is BertText else embedded
        for layer in (0, 2):
            expected = block_by_block(tower, start, causal=of is ClipText)[layer]
            torch.testing.assert_close(features.layers[layer][1][i, :count], expected, rtol=1e-4, atol=1e-5)


class Regression(Loss):
    """The student's first layer regresses the mean of two layers of the teacher, as data2vec does with its top ones."""

    name = "regression"
    Config = LossConfig

    @classmethod
    def needs(cls, config: Any, plan: Plan) -> Needs:
        read = {"image": (0,)}
        return Needs(
            student=("image",),
            tokens=read,
            layers={"image": (0,)},
            teacher={"default": read},
            teacher_layers={"default": {"image": (1, 2)}},
            embeddings=(),
        )

    @classmethod
    def problems(cls, config: Any, plan: Plan) -> Any:
        specs = plan.teachers["default"].specs if "default" in plan.teachers else {}
        if "image" in specs and specs["image"].width != plan.modalities["image"].spec.width:
            yield "regression: student and teacher have one width W"

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        layers = outputs.teacher["default"]["image"].layers
        target = (layers[1][0] + layers[2][0]) / 2
        student = outputs.student["image"]
        errors = (student.layers[0][0].float() - target.float()).square().mean(-1)
        real = torch.ones_like(errors, dtype=torch.bool)
        for features in (student, outputs.teacher["default"]["image"]):
            real = real & features.masks.get(0, real)
        return {"loss": ((errors * real).sum(1) / real.sum(1)).mean()}, {}


def test_a_loss_of_layers_conforms() -> None:
    """Its features hold the layers that it needs, and no others."""
    assert_conforms(Regression)


def test_layers_of_some_samples() -> None:
    """Where others lack the modality, and where a replayed step leaves one out: rows of the same samples as tokens."""
    tokens = torch.randn(4, 3, 2)
    present = Present(np.array([[True, False, True, True]]))
    some = Features(torch.randn(1, 4, 2), {0: tokens}, layers={5: {0: tokens + 1}}).of(present)
    assert torch.equal(some.layers[5][0], some.tokens[0] + 1)
    assert torch.equal(some.layers[5][0], tokens[[0, 2, 3]] + 1)


class Forgetful(Ema):
    """A teacher that says that it has the student's layers, and does not hand them on."""

    name = "forgetful"

    def encode(self, batch: Batch, tokens_of: Any) -> dict[str, Features]:
        return {name: replace(x, layers={}) for name, x in super().encode(batch, tokens_of).items()}


def test_a_teacher_without_the_layers_that_it_says_does_not_conform() -> None:
    """A loss would meet a KeyError in the first step."""
    assert [result.status for result in check(Ema, only=["layers"])] == ["ok"]
    (result,) = check(Forgetful, only=["layers"])
    assert result.status == "failed"
    assert "does not hand on the layer 0" in result.message


def test_layers_of_student_and_teacher_reach_a_loss() -> None:
    """Only those needed, of the views needed; the teacher numbers its own, as it sees the second alone."""
    torch.manual_seed(0)
    tower = vit()
    spec = type(tower).spec(tower.config)
    roles = ("local", "global")
    plan = Plan({"image": ModalityPlan(roles, spec)}, {"default": TeacherPlan({"image": (1,)}, {"image": spec})})
    needs = [
        Needs(
            tokens={"image": (0,)},
            layers={"image": (1,)},
            teacher={"default": {"image": (1,)}},
            teacher_layers={"default": {"image": (0, 2)}},
        ),
        Needs(tokens={"image": (1,)}),
    ]
    objective = Objective({"image": tower}, plan, needs)
    objective.add_teacher("default", lambda name, plan, student: Ema(EmaConfig(), name, plan, student))
    objective.teachers["default"].start(())
    views = Views([Group(torch.randn(1, 2, 3, 8, 8), "local"), Group(torch.randn(1, 2, 3, 16, 16))])
    outputs = objective.represent(Batch({"image": views}, ["a", "b"]), Progress(0, 1))
    student, teacher = outputs.student["image"], outputs.teacher["default"]["image"]
    assert sorted(student.tokens) == [0, 1]
    assert {layer: sorted(of) for layer, of in student.layers.items()} == {1: [0]}
    assert {layer: sorted(of) for layer, of in teacher.layers.items()} == {0: [0], 2: [0]}
    expected = tower(views, tokens_of=(1,), layers_of={2: (1,)}).layers[2][1]
    torch.testing.assert_close(teacher.layers[2][0], expected)


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (Needs(tokens={"image": (0,)}, layers={"image": (1, 3)}),
         "needs layer 3 of 'image'; its backbone has layers 0 to 2"),
        (Needs(layers={"image": (1,)}), "needs layers of 'image' of no view: name their views in Needs.tokens"),
        (
            Needs(teacher={"default": {"image": (0,)}}, teacher_layers={"default": {"image": (0,)}}),
            "needs layer 0 of 'image'; the teacher 'default' hands on its last layer's tokens alone",
        ),
    ],
)  # fmt: skip
def test_layers_that_a_recipe_lacks(needs: Needs, message: str) -> None:
    """Refused before anything is built."""
    teacher = TeacherPlan({"image": (0,)}, {"image": BackboneSpec(32, 24)})
    plan = Plan({"image": ModalityPlan(("global",), BackboneSpec(32, 24, layers=3))}, {"default": teacher})
    assert list(unmet("some_loss", needs, plan, {"image"})) == [f"'some_loss' {message}"]
