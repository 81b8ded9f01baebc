"""What `distill check-plugin` does with losses that call heads, as a stranger's package has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill_authoring.conformance import check
from distill_core import ComponentConfig, ConformanceCase, Head, Loss, LossConfig, Needs, Outputs, Plan, same_dim
from distill_core.tools import ConformanceCases


class Shared(Head):
    """Embeddings of two modalities, of one width, to 4 numbers."""

    name = "shared"

    def __init__(self, config: Any, plan: Plan) -> None:
        super().__init__(config, plan)
        self.map = nn.Linear(plan.modalities["image"].spec.dim, 4)

    @classmethod
    def needs(cls, config: Any, plan: Plan) -> Needs:
        return Needs(student=("image", "text"))

    @classmethod
    def problems(cls, config: Any, plan: Plan) -> Any:
        return same_dim(cls.name, ("image", "text"), plan)

    def forward(self, x: Tensor) -> Tensor:
        mapped: Tensor = self.map(x)
        return mapped


class Follows(Loss):
    """Squared distance of the head's first view, and of the other modality's, to what the teacher's copy makes."""

    name = "follows"
    Config = LossConfig

    @classmethod
    def needs(cls, config: Any, plan: Plan) -> Needs:
        return Needs(
            student=("image", "text"), teacher={"default": {"image": ()}}, heads=("one",),
            teacher_heads={"default": ("one",)},
        )  # fmt: skip

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        head = outputs.heads["one"]
        with torch.no_grad():
            goal = outputs.ema(head)(outputs.teacher["default"]["image"].pooled[:1])
        terms = [(head(outputs.student[m].pooled) - goal).float().square().mean() for m in ("image", "text")]
        return {"distance": terms[0] + terms[1]}, {}


def test_a_loss_may_read_a_copy_of_a_head_that_refuses_some_plans() -> None:
    """The head takes one width, which the suite varies, and a recipe with a teacher that is no copy is refused. Would
    catch a suite that has no copy for the loss, or blames it for plans that no recipe has."""
    cases = ConformanceCases([ConformanceCase(Follows, heads=lambda config: {"one": (Shared, ComponentConfig())})])
    failed = [
        result
        for result in check(Follows, cases=cases, only=["terms", "gradients", "purity"])
        if result.status == "failed"
    ]
    assert not failed, failed


def test_a_head_that_no_case_gives_is_named() -> None:
    """Would catch the advice to add to `needs` what it names already."""
    (result,) = check(Follows, only=["terms"])
    assert "ConformanceCase(Follows, heads=" in str(result)
