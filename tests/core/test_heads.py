"""Heads of a recipe, as a stranger's package writes them: losses, teachers and the trained model have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distill_core
from distill_core import (
    Decoder,
    Encoded,
    Head,
    Loss,
    LossConfig,
    Model,
    Needs,
    Outputs,
    Plan,
    UserError,
)
from distill_core.errors import RecipeErrors
from distill_core.recipe.resolve import load_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Entry, Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_core.train import Trainer

Checked = Callable[..., Recipe]


class Projection(Head):
    """An image's class token to 8 numbers."""

    name = "projection"

    def __init__(self, config: Any, plan: Plan) -> None:
        super().__init__(config, plan)
        self.map = nn.Linear(plan.modalities["image"].spec.dim, 8)

    @classmethod
    def needs(cls, config: Any, plan: Plan) -> Needs:
        return Needs(student=("image",))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., 8]."""
        out: Tensor = self.map(x)
        return out


class FollowsTheCopyConfig(LossConfig):
    """Which head."""

    head: str = "shared"
    """The head."""
    teacher: str = "default"
    """The teacher with the copy."""


class FollowsTheCopy(Loss):
    """Squared distance of the head's output for the second view and the teacher's head's for the teacher's first."""

    name = "follows_the_copy"
    Config = FollowsTheCopyConfig

    @classmethod
    def needs(cls, config: Any, plan: Plan) -> Needs:
        head, teacher = config.head, config.teacher
        return Needs(teacher={teacher: {"image": ()}}, heads=(head,), teacher_heads={teacher: (head,)})

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        head, teacher = outputs.heads[self.config.head], self.config.teacher
        goal = outputs.ema(head, teacher)(outputs.teacher[teacher]["image"].pooled[0])
        return {"distance": (head(outputs.student["image"].pooled[1]) - goal).square().mean()}, {}


class Spread(FollowsTheCopy):
    """Minus the variance of the same head's outputs."""

    name = "spread"

    @classmethod
    def needs(cls, config: Any, plan: Plan) -> Needs:
        return Needs(heads=(config.head,))

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"spread": -outputs.heads[self.config.head](outputs.student["image"].pooled[0]).var(0).mean()}, {}


HEADS = "heads={shared: projection}"
LOSSES = ("fusion=null", "loss.1={name: follows_the_copy}", "loss.2={name: spread, weight: 0.1}")


@pytest.fixture
def strangers(registry: Registry) -> Registry:
    return Registry(
        [*registry.entries.values(), *(Entry(cls, "s", "s") for cls in (Projection, FollowsTheCopy, Spread))]
    )


@pytest.fixture
def checked(tiny_recipe: Path, strangers: Registry) -> Checked:
    def load(*overrides: str) -> Recipe:
        return load_recipe(tiny_recipe, registry=strangers, overrides=["evaluate=null", *overrides])

    return load


def train(recipe: Recipe, folder: Path, resume: str | None = None) -> Trainer:
    run = RunFolder(folder) if resume is not None else RunFolder.create(folder.parent, recipe)
    trainer = Trainer(recipe, run, resume=resume, quiet=True)
    trainer.run()
    trainer.folder.unlock()
    return trainer


def test_two_losses_share_a_head_and_a_teacher_has_its_average(checked: Checked, tmp_path: Path) -> None:
    """Would catch a head that each loss has of its own, one that nothing trains, and a copy that never moves, or that
    receives gradients."""
    recipe = checked(HEADS, *LOSSES, "teacher.momentum=0.5")
    assert recipe.to_dict()["heads"] == {"shared": {"name": "projection"}}
    before = {}
    trainer = Trainer(recipe, RunFolder.create(tmp_path, recipe), quiet=True)
    for name, tensor in trainer.state.objective.state_dict().items():
        before[name] = tensor.clone()
    trainer.run()
    after = trainer.state.objective.state_dict()
    own, copied = "heads.shared.map.weight", "teacher.default.heads.shared.map.weight"
    assert torch.equal(before[own], before[copied])
    assert not torch.equal(after[own], before[own])
    assert not torch.equal(after[copied], before[copied])
    assert not torch.equal(after[copied], after[own])
    assert not trainer.state.objective.get_submodule("teacher.default.heads.shared.map").weight.requires_grad


SNAPSHOT = ("teachers={old: {name: snapshot, every: 2, source: default}}", "loss.1.teacher=old")


def test_a_snapshot_of_a_teacher_has_that_teachers_copy_of_a_head(checked: Checked, tmp_path: Path) -> None:
    """No loss reads the source's copy. Would catch a source that has none, one that never moves, and a snapshot of the
    student's head in its place."""
    recipe = checked(HEADS, *LOSSES, *SNAPSHOT, "teacher.momentum=0.5", "train.steps=2", "name=old")
    assert not any("cannot be built" in line for line in recipe.warnings)
    state = train(recipe, tmp_path / "old").state.objective.state_dict()
    student, average, snapshot = (f"{at}heads.shared.map.weight" for at in ("", "teacher.default.", "teacher.old."))
    assert torch.equal(state[snapshot], state[average])
    assert not torch.equal(state[average], state[student])


def test_a_resumed_run_has_the_same_head_and_copy(checked: Checked, tmp_path: Path) -> None:
    """Would catch a head, or a teacher's copy of it, that a checkpoint leaves out."""
    options = (HEADS, *LOSSES, "train.checkpoint={every: 2, keep: 9}")
    whole = train(checked("name=whole", *options), tmp_path / "whole").state.objective.state_dict()
    train(checked("name=half", *options), tmp_path / "half")
    Checkpoints(tmp_path / "half").path(4).unlink()
    resumed = train(checked("name=half", *options), tmp_path / "half", resume="last").state.objective.state_dict()
    assert resumed.keys() == whole.keys()
    assert any(name.startswith("teacher.default.heads.") for name in resumed)
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0)


def test_a_stage_may_bring_a_head(checked: Checked, tmp_path: Path) -> None:
    """Would catch weights of before that a stage with a new head draws again."""
    stage = "stages=[{at: 2, set: {heads: {shared: projection}, loss.1: {name: spread}}}]"
    trainer = train(checked("fusion=null", "loss.1=null", "teacher=null", stage, "name=staged"), tmp_path / "staged")
    assert trainer.state.stage == 1
    assert "heads.shared.map.weight" in trainer.state.objective.state_dict()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ((*LOSSES,), "'follows_the_copy' needs a head 'shared'; this recipe has no `heads`"),
        ((HEADS, *LOSSES, "loss.2.head=share"), "'spread' needs a head 'share', did you mean 'shared'?"),
        ((HEADS, *LOSSES, "teacher={of: [backbone.image]}"), "needs a copy of the head 'shared', which the teacher"),
        (
            (HEADS, *LOSSES, *SNAPSHOT, "teacher={of: [backbone.image, backbone.text]}"),
            "needs a copy of the head 'shared', which the teacher 'old' has not",
        ),
        ((HEADS, *LOSSES, "teacher={of: [backbone.image, heads.other]}"), "'heads.other' names no head of this recipe"),
        (("heads={'a b': projection}",), "a head's name is a word"),
        ((HEADS, *LOSSES, "freeze=[heads.other]"), "'heads.other' names no part of the model"),
        (
            ("heads={decoder: caption_decoder}", "loss.2={name: captioning}", "train.parallel.micro_batch=2"),
            "'captioning' reads tokens, which train.parallel.micro_batch does not keep",
        ),
        ((HEADS, "loss.2={name: captioning, head: shared}"), "the head 'shared' is no decoder"),
        (
            ("heads={decoder: caption_decoder}", "loss.2={name: captioning, parallel: 0.5}"),
            "must be a `caption_decoder` with parallel: true",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_built(
    checked: Checked, options: tuple[str, ...], line: str
) -> None:
    with pytest.raises(RecipeErrors) as caught:
        checked(*options)
    assert line in str(caught.value)


def test_a_head_that_no_loss_calls_is_a_warning(checked: Checked) -> None:
    assert any("no loss of this recipe calls the head 'shared'" in line for line in checked(HEADS).warnings)


def test_a_head_can_be_frozen(checked: Checked, tmp_path: Path) -> None:
    """Would catch a path that `freeze` does not know, and a frozen head that moves."""
    trainer = train(checked(HEADS, *LOSSES, "freeze=[heads.shared]", "name=frozen"), tmp_path / "frozen")
    state = trainer.state.objective.state_dict()
    assert torch.equal(state["heads.shared.map.weight"], state["teacher.default.heads.shared.map.weight"])


def test_the_trained_model_has_the_heads(
    checked: Checked, strangers: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the teacher those that it has copies of. Would catch weights that are drawn anew."""
    monkeypatch.setattr(Registry, "discover", lambda *_: strangers)
    trainer = train(checked(HEADS, *LOSSES, "name=loaded"), tmp_path / "loaded")
    state = trainer.state.objective.state_dict()
    for teacher, prefix in ((False, ""), (True, "teacher.default.")):
        model = distill_core.load(tmp_path / "loaded", teacher=teacher)
        weight = dict(model.heads["shared"].named_parameters())["map.weight"]
        assert torch.equal(weight, state[f"{prefix}heads.shared.map.weight"])
        assert not weight.requires_grad
    rows = [json.loads(line) for line in (tmp_path / "loaded" / "metrics.jsonl").read_text().splitlines()]
    assert {"follows_the_copy", "spread"} <= rows[0]["terms"].keys()


DECODER = (
    "heads={decoder: {name: caption_decoder, width: 16, layers: 1, heads: 2}}",
    "loss.2={name: captioning}",
    "name=writes",
)


@pytest.fixture
def writer(checked: Checked, tmp_path: Path) -> Model:
    train(checked(*DECODER), tmp_path / "writes")
    return distill_core.load(tmp_path / "writes")


def greedy(model: Model, image: Any, count: int) -> list[int]:
    """The likeliest ids, one after the other, from the decoder itself."""
    decoder, augment = model.heads["decoder"], model.augment["image"]
    assert isinstance(decoder, Decoder)
    views = model.features("image", [[augment.eval_view(image)]], tokens_of=(0,))
    ids = [49406]
    for _ in range(count):
        encoded = {"image": Encoded(views.pooled[0], views.tokens[0])}
        ids.append(int(decoder(encoded, torch.tensor([ids]))[0, -1].argmax()))
    return ids


def test_generate_writes_what_the_decoder_finds_likeliest(writer: Model) -> None:
    """Would catch images of a batch that are mixed up, tokens of another view, a lost start, a prompt left out."""
    rng = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (20, 24, 3), generator=rng, dtype=torch.uint8).numpy() for _ in range(5)]
    writer.batch_size = 2
    found = writer.generate("image", images, longest=6)
    tower: Any = writer.backbone["text"]
    assert found == tower.detokenize(torch.tensor([greedy(writer, image, 5) for image in images]))
    prompted = writer.generate("image", images[:2], prompt="a red bird", longest=8)
    assert all(text.startswith("a red bird ") for text in prompted)
    beams = writer.generate("image", images, beams=3, longest=6)
    assert len(beams) == 5
    assert all(isinstance(text, str) for text in beams)


def test_generate_says_what_is_missing(writer: Model) -> None:
    """And refuses to write nothing: a division by zero, or a `longest` of 0 that is taken for no limit."""
    with pytest.raises(UserError, match="beams must be at least 1, not 0"):
        writer.generate("image", [], beams=0)
    with pytest.raises(UserError, match="longest must be at least 1, not 0"):
        writer.generate("image", [], longest=0)
    with pytest.raises(UserError, match="does not write about 'text' alone: it reads image"):
        writer.generate("text", ["a"])
    with pytest.raises(UserError, match=r"no decoder 'decode', did you mean 'decoder'\?"):
        writer.generate("image", [], head="decode")
    writer.heads.clear()
    with pytest.raises(UserError, match="the student has no decoder among its heads"):
        writer.generate("image", [])
