"""A modality that is only collated: losses read its views, and nothing else asks for its tower."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trainers import trainers

from distill_authoring.conformance import assert_conforms
from distill_core import (
    GLOBAL,
    AbsentModality,
    Augmentation,
    BackboneSpec,
    Loss,
    LossConfig,
    ModalityPlan,
    Needs,
    Outputs,
    Plan,
    Raw,
    Sample,
    View,
)
from distill_core.errors import RecipeErrors
from distill_core.outputs import Progress
from distill_core.parallel import compile_units
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import load_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Entry, Registry
from distill_core.train import Trainer


class Lengths(Augmentation):
    """Two numbers of a caption, drawn afresh each time: its words, with noise."""

    name = "lengths"

    @classmethod
    def roles(cls, config: Any) -> tuple[str, ...]:
        return (GLOBAL,)

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        if "txt" not in sample:
            raise AbsentModality("no txt")
        words = len(sample["txt"].split())
        return [View(np.array([words, rng.normal()], np.float32))]

    def decode(self, sample: Sample, field: str | None = None) -> list[Any]:
        return [len(sample["txt"].split())]

    def eval_view(self, item: Any) -> View:
        return View(np.array([item, 0], np.float32))


class CountConfig(LossConfig):
    raw: str = "lengths"


class Count(Loss):
    """Squared error of a linear map of the image's embedding against the raw numbers."""

    name = "count_words"
    Config = CountConfig
    partial = True

    def __init__(self, config: CountConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.map = nn.Linear(plan.modalities["image"].spec.dim, 2)

    @classmethod
    def needs(cls, config: CountConfig, plan: Plan) -> Needs:
        return Needs(student=("image",), raw=(config.raw,), views={config.raw: {"global": 1}})

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        expected = outputs.views[self.config.raw].groups[0].x[0]
        error = (self.map(outputs.student["image"].embedding[0]) - expected).square().mean()
        return {"count": error}, {"rows": torch.tensor(float(len(expected)))}


class CountAll(Count):
    """Needs the numbers of every sample."""

    name = "count_all_words"
    partial = False


class Pairs(Raw):
    """Takes two views."""

    name = "pairs"

    @classmethod
    def view_problems(cls, config: Any, views: ModalityPlan) -> Iterable[str]:
        if len(views.roles) != 2:
            yield f"it takes 2 views, not {len(views.roles)}"


RAW = ("augment.lengths=lengths", "backbone.lengths=raw", "loss.2=count_words")


@pytest.fixture
def more(registry: Registry) -> Registry:
    return Registry(
        [*registry.entries.values(), *(Entry(c, "outside", "outside") for c in (Lengths, Count, CountAll, Pairs))]
    )


@pytest.fixture
def recipe(tiny_recipe: Path, more: Registry) -> Callable[..., Recipe]:
    return lambda *overrides: load_recipe(tiny_recipe, registry=more, overrides=[*RAW, *overrides])


@pytest.fixture
def trainer(recipe: Callable[..., Recipe], tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    with trainers(tmp_path / "runs") as make:
        yield lambda *overrides, resume=None: make(recipe(*overrides), resume)


def test_conforms() -> None:
    assert_conforms(Raw)


def test_it_is_collated_and_not_encoded(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    """Catches a tower that is built for it, a fusion, teacher or evaluation that asks for one, views that are drawn
    otherwise when the run resumes."""
    whole = trainer("train.checkpoint.every=2", "data.workers=1")
    assert list(whole.objective.backbone) == ["image", "text"]
    assert list(whole.recipe.plan.modalities) == ["image", "text"]
    assert list(whole.recipe.plan.raw) == ["lengths"]
    outputs = whole.objective.represent(next(iter(whole.loader)), Progress(0, 4))
    assert outputs.views["lengths"].groups[0].x.shape == (1, 4, 2)
    assert "lengths" not in outputs.student
    assert "lengths" not in outputs.teacher["default"]
    whole = trainer("train.checkpoint.every=2", "name=whole")
    whole.run()
    assert "retrieval" in whole.folder.path.joinpath("report.json").read_text()
    stopped = tmp_path / "stopped"
    shutil.copytree(whole.folder.path, stopped)
    (stopped / "checkpoints" / "step-00000004.pt").unlink()
    resumed = trainer("train.checkpoint.every=2", "name=whole", resume=stopped)
    resumed.run()
    for name, x in resumed.objective.state_dict().items():
        assert torch.equal(x, whole.objective.state_dict()[name]), name


def test_samples_may_lack_it(trainer: Callable[..., Trainer]) -> None:
    """The loss is of those that have it. Catches rows of another sample, and a loss over all of them."""
    made = trainer("data.optional=[lengths]")
    batch = next(iter(made.loader))
    have = np.array([True, False, True, False])
    batch.presence = {"lengths": have}
    views = batch.views["lengths"]
    batch.views["lengths"] = views.map(lambda x: x[:, torch.from_numpy(have)])
    outputs = made.objective.represent(batch, Progress(0, 4))
    losses = made.objective.losses(outputs)
    assert losses.metrics["count_words/rows"] == 2
    loss: Any = made.objective.loss["count_words"]
    own = outputs.student["image"].embedding[0][[0, 2]]
    expected = (loss.map(own) - views.groups[0].x[0][[0, 2]]).square().mean()
    torch.testing.assert_close(losses.terms["count_words"], expected)


WEIGHTS = "weights: [{name: state_dict, source: x.pt, to: backbone}]"
COLLATED = "'lengths' is only collated (it has no tower): leave it out, or give backbone.lengths a tower"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("loss.0={name: clip, modalities: [image, lengths]}", "'lengths', which is only collated (it has no tower)"),
        ("loss.2.raw=length", "needs a modality 'length', did you mean 'lengths'?"),
        ("evaluate.tasks=[{name: retrieval, modalities: [image, lengths]}]", "only collated"),
        ("evaluate.tasks=[{name: knn, modality: lengths}]", "only collated"),
        ("teacher.modalities=[image, lengths]", "'lengths' is only collated (it has no tower)"),
        (f"teacher={{name: frozen, backbone: {{lengths: raw}}, {WEIGHTS}}}", f"'frozen': {COLLATED}"),
        (f"teacher={{name: frozen, augment: {{lengths: lengths}}, {WEIGHTS}}}", f"'frozen': {COLLATED}"),
        (f"teacher={{name: frozen, backbone: {{image: raw}}, {WEIGHTS}}}", "backbone.image: it encodes nothing; give"),
        ("teacher={augment: {lengths: lengths}}", f"'ema': augment: {COLLATED}"),
        ("teacher={of: [backbone.lengths]}", f"'ema': of: 'backbone.lengths': {COLLATED}"),
        ("masker={lengths: random_drop}", "there is no tower to hide its tokens from"),
    ],
)
def test_what_needs_a_tower_is_refused(override: str, line: str, recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeErrors) as caught:
        recipe(override)
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("backbone.lengths=pairs",), "backbone.lengths: it takes 2 views, not 1"),
        (("loss.2=count_all_words", "data.optional=[lengths]"), "'count_all_words' needs 'lengths' of every sample"),
    ],
)
def test_it_is_asked_as_a_tower_is(overrides: tuple[str, ...], line: str, recipe: Callable[..., Recipe]) -> None:
    """Catches checks of modalities that leave out those without a tower."""
    with pytest.raises(RecipeErrors) as caught:
        recipe(*overrides)
    assert line in str(caught.value)


def test_losses_whose_samples_vary_in_number_are_not_compiled(recipe: Callable[..., Recipe]) -> None:
    """Catches losses that torch compiles anew for each number, where what is lacking has no tower."""
    vary, same = (build_objective(recipe(*options)) for options in (("data.optional=[lengths]",), ()))
    towers = 2 * sum(len(tower.units()) for tower in vary.backbone.values())  # student and teacher
    assert compile_units(vary, "eager") == towers
    assert compile_units(same, "eager") > towers


def test_views_that_cannot_be_stacked() -> None:
    collate = Raw.collator(None)
    with pytest.raises(ValueError, match="differ in shape"):
        collate([[View(np.zeros(2))], [View(np.zeros(3))]], [0, 1])
    views = collate([[View(1), View(np.zeros(3), "local")], [View(2), View(np.ones(3), "local")]], [0, 1])
    assert views.groups[0].x.tolist() == [[1, 2]]
    assert views.roles == ("global", "local")
    assert BackboneSpec(0, 0, has_tokens=False) == Raw.spec(None)
