"""Maskers between the teachers' pass and the student's, as a stranger's package would write one: tokens are kept by the
teacher's attention, several times a view, and a loss reads which were dropped."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill_authoring.conformance import assert_conforms
from distill_core import (
    Batch,
    Component,
    DataError,
    Features,
    Group,
    Loss,
    Mask,
    Masker,
    Needs,
    Objective,
    Outputs,
    Plan,
    Progress,
    TowerInput,
    View,
    hookimpl,
)
from distill_core.data.batches import Collate, Item
from distill_core.errors import RecipeErrors
from distill_core.gradient_cache import GradientCache
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import parse_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_core.run.replay import replay_step
from distill_core.tools import example_batch
from distill_core.train import Trainer


class Spotlight(Masker):
    """Keeps the half of the tokens to which the teacher attends most, with noise that each of three masks draws."""

    name = "spotlight"
    drops = True

    @classmethod
    def times(cls, config: Any) -> int:
        return 3

    @classmethod
    def extras(cls, config: Any) -> tuple[str, ...]:
        return ("noise",)

    @classmethod
    def reads(cls, config: Any, modality: str, plan: Plan) -> Needs:
        return Needs(attention={"default": {modality: plan.modalities[modality].views(config.role)}})

    def draw(self, grid: tuple[int, ...], rng: np.random.Generator) -> Mask:
        tokens = int(np.prod(grid))
        noise = rng.random(tokens, dtype=np.float32) / tokens
        return Mask(keep=np.arange(tokens // 2), extra={"noise": noise})

    def choose(self, group: Group, teacher: Mapping[str, Features]) -> Group:
        attention = torch.stack([of_view.mean(1) for of_view in teacher["default"].attention.values()])  # [V, B, L]
        assert group.keep is not None
        scores = attention.repeat(3, 1, 1) + group.extra["noise"]
        return replace(group, keep=scores.topk(group.keep.shape[-1]).indices.sort(-1).values)


class Attended(Masker):
    """Hides as many tokens as are drawn: with a teacher's attention those that it reads most, without as they are."""

    name = "attended"
    hides = True

    def draw(self, grid: tuple[int, ...], rng: np.random.Generator) -> Mask:
        hidden = np.zeros(int(np.prod(grid)), bool)
        hidden[rng.permutation(len(hidden))[: rng.integers(1, len(hidden))]] = True
        return Mask(hidden=hidden)

    def choose(self, group: Group, teacher: Mapping[str, Features]) -> Group:
        if not teacher:
            return group
        attention = torch.stack([of_view.mean(1) for of_view in teacher["default"].attention.values()])  # [V, B, L]
        assert group.token_mask is not None
        rank = attention.argsort(-1, descending=True).argsort(-1)
        return replace(group, token_mask=rank < group.token_mask.sum(-1, keepdim=True))


class Recall(Loss):
    """Each time that a view is seen, the mean of its kept tokens comes near the teacher's mean of the others."""

    name = "recall"

    def __init__(self, config: Any, plan: Plan) -> None:
        super().__init__(config, plan)
        image = plan.modalities["image"]
        self.pairs = [(s, t) for t in plan.teacher_views("default", "image") for s in image.shown(t)]
        self.teacher_views = plan.teacher_views("default", "image")
        self.map = torch.nn.Linear(image.spec.width, plan.teacher_spec("default", "image").width)

    @classmethod
    def needs(cls, config: Any, plan: Plan) -> Needs:
        image, seen = plan.modalities["image"], plan.teacher_views("default", "image")
        return Needs(
            teacher={"default": {"image": seen}},
            tokens={"image": tuple(s for t in seen for s in image.shown(t))},
            dropped=("image",),
            embeddings=(),
        )

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        student, teacher = outputs.student["image"], outputs.teacher["default"]["image"]
        groups = {start + i: (g, i) for start, g in outputs.views["image"].numbered() for i in range(len(g.x))}
        terms = []
        for s, t in self.pairs:
            target = teacher.tokens[self.teacher_views.index(t)]
            group, place = groups[s]
            others = group.dropped(target.shape[1])[place]
            aim = target.take_along_dim(others[..., None], 1).mean(1)
            terms.append((self.map(student.tokens[s].mean(1)) - aim).float().square().mean())
        return {"recall": torch.stack(terms).mean()}, {}


class Plugin:
    """A stranger's."""

    @staticmethod
    @hookimpl
    def distill_components() -> list[type]:
        return [Spotlight, Attended, Recall]


@pytest.fixture(scope="module")
def more(registry: Registry) -> Registry:
    return Registry([*registry.entries.values(), *Registry.of(Plugin).entries.values()])


@pytest.mark.slow
@pytest.mark.parametrize("component", [Spotlight, Attended, Recall], ids=lambda component: component.name)
def test_conforms(component: type[Component]) -> None:
    assert_conforms(component)


RECIPE = """
augment:
  image: {name: random_crop, size: 24}
  text: {name: caption}
backbone:
  image: {name: vit, image_size: 24, patch: 4, width: 32, layers: 2, heads: 2, dim: 16}
  text: {name: clip_text, width: 32, layers: 1, heads: 2, dim: 16}
masker: {image: spotlight}
loss: [{name: clip}]
teacher: {momentum: 0.9}
data: {source: {name: webdataset, urls: "FOLDER/train-{000..001}.tar"}, batch_size: 3, workers: 1}
train: {steps: 6, checkpoint: {every: 2, keep: 9}, threads: 1, device: cpu, log_every: 1}
tracking: null
"""


def recipe_of(more: Registry, *overrides: str, text: str = RECIPE) -> Recipe:
    return parse_recipe(text, "r.yaml", registry=more, overrides=overrides)


def made(recipe: Recipe, size: int = 5) -> tuple[Objective, Batch]:
    """In double precision, with weights that are no longer small."""
    torch.manual_seed(0)
    objective = build_objective(recipe).double()
    for parameter in objective.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    on_device = objective.on_device

    def double(batch: Batch) -> Batch:
        views = {
            m: of.map(lambda x: x.double() if x.is_floating_point() else x) for m, of in on_device(batch).views.items()
        }
        return replace(batch, views=views)

    objective.on_device = double  # type: ignore[method-assign]
    return objective, example_batch(recipe, size)


def test_the_student_sees_each_view_once_with_each_mask(more: Registry) -> None:
    """Catches pixels that are copied, masks that a teacher sees, views that are numbered otherwise than the plan says,
    and masks of another time; the kept tokens are those of the most attention."""
    recipe = recipe_of(more)
    plan = recipe.plan.modalities["image"]
    assert plan.roles == ("global", "repeated", "repeated")
    assert plan.shown(0) == (0, 1, 2)
    assert plan.shapes == ((3, 24, 24),) * 3
    assert recipe.plan.masked_views("default", "image") == {0: (0, 1, 2)}
    assert recipe.plan.masked_views("nobody", "image") == {}
    assert recipe.plan.teacher_spec("nobody", "image") == plan.spec
    objective, batch = made(recipe)
    assert [tuple(group.x.shape) for group in batch.views["image"].groups] == [(1, 5, 3, 24, 24)]
    outputs = objective.represent(batch, Progress(0, 1))
    groups = outputs.views["image"].groups
    assert [group.role for group in groups] == ["global", "repeated", "repeated"]
    assert len({group.x.data_ptr() for group in groups}) == 1
    (whole,) = objective.on_device(batch).views["image"].groups
    tower = objective.teachers["default"].backbone["image"]
    attention = tower.class_attention(whole.x[0]).mean(1)
    drawn = batch.views["image"].groups[0].extra["noise"]
    student = outputs.student["image"]
    assert student.pooled.shape == (3, 5, 16)
    for k, group in enumerate(groups):
        scores = attention + drawn[k]
        expected = scores.argsort(-1, descending=True)[:, :18].sort(-1).values
        assert torch.equal(group.keep[0], expected)
        alone = objective.backbone["image"].encode_together
        (seen,) = alone([TowerInput(whole.x[0], keep=expected)])
        torch.testing.assert_close(student.pooled[k], seen.pooled, rtol=1e-9, atol=1e-12)
        others = group.dropped(36)[0]
        assert torch.equal(torch.cat([expected, others], 1).sort(-1).values, torch.arange(36).expand(5, -1))
        assert bool((others.diff(dim=-1) > 0).all())
    theirs = outputs.teacher["default"]["image"]
    torch.testing.assert_close(theirs.pooled[0], tower.encode(whole.x[0], tokens=False, token_mask=None).pooled)


def test_a_few_samples_at_a_time_see_the_same_masks(more: Registry) -> None:
    """Gradients by parts of the batch are those of the whole, though masks are chosen by a teacher that the second pass
    does not run. Catches masks of the draw alone, and those of other samples."""
    objective, batch = made(recipe_of(more))
    parts = copy.deepcopy(objective)
    parts.on_device = objective.on_device  # type: ignore[method-assign]
    outputs = objective.represent(batch, Progress(0, 4))
    objective.losses(outputs).total.backward()
    cache = GradientCache(parts, batch, Progress(0, 4), 2)
    for one, other in zip(outputs.views["image"].groups, cache.outputs.views["image"].groups, strict=True):
        assert torch.equal(one.keep, other.keep)
    parts.losses(cache.outputs).total.backward()
    cache.backward()
    for one, other in zip(objective.backbone.parameters(), parts.backbone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-10)


def test_where_tokens_are_hidden_follows_the_mask(more: Registry) -> None:
    """What a worker has located (`Group.hidden`) stands for the mask that was drawn. Catches places of a mask that was
    replaced, and a device that is waited for to locate one that was not."""
    recipe = recipe_of(more, "masker.image=attended", "backbone.image.masking={roles: []}")
    masker, views = recipe.maskers()["image"], example_batch(recipe, 5).views["image"]
    (drawn,) = views.groups
    (same,) = masker.chosen(views, {}).groups
    assert same.hidden is drawn.hidden is not None
    attention = torch.rand(5, 2, 36, generator=torch.Generator().manual_seed(0))
    (other,) = masker.chosen(views, {"default": Features(torch.zeros(1, 5, 16), attention={0: attention})}).groups
    assert other.token_mask is not None
    assert drawn.token_mask is not None
    assert torch.equal(other.token_mask.sum(-1), drawn.token_mask.sum(-1))
    assert not torch.equal(other.token_mask, drawn.token_mask)
    (places,) = other.places()
    assert torch.equal(places, other.token_mask[0].flatten().nonzero()[:, 0])


def test_a_sample_has_its_masks_whatever_the_batch(more: Registry) -> None:
    """A function of the sample's visit: catches draws by the batch, as public codes make them."""
    recipe = recipe_of(more)
    whole = example_batch(recipe, 4).views["image"].groups[0].extra["noise"]
    some = example_batch(recipe, 2).views["image"].groups[0].extra["noise"]
    assert torch.equal(whole[:, :2], some)


@pytest.mark.slow
def test_a_resumed_run_and_a_replayed_step_see_the_same_masks(
    more: Registry, tmp_path: Path, write_shards: Callable[..., list[Path]]
) -> None:
    """A whole run with a loss that reads the dropped tokens, over a stage that masks otherwise. Catches masks that
    depend on the process, the worker or the step's number, and a stage whose masks never come."""
    write_shards(tmp_path, 2, 6)
    recipe = recipe_of(
        more,
        "loss.1={name: recall}",
        "stages=[{at: 4, set: {masker.image: {name: random_drop, share: 0.25}}}]",
        text=RECIPE.replace("FOLDER", str(tmp_path)),
    )
    folder = RunFolder.create(tmp_path / "runs", recipe)
    Trainer(recipe, folder, quiet=True).run()
    end = Checkpoints(folder.path).read()["objective"]
    logged = {row["step"]: row["loss"] for row in folder.rows() if "loss" in row}
    for step in (3, 5):
        assert replay_step(recipe, RunFolder(folder.path), step, quiet=True).loss == logged[step]
    for start in ("2", "4"):
        again = parse_recipe((folder.path / "recipe.yaml").read_text(), "recipe.yaml", registry=more)
        Trainer(again, RunFolder(folder.path), resume=start, quiet=True).run()
        finished = Checkpoints(folder.path).read()["objective"]
        assert all(torch.equal(tensor, finished[name]) for name, tensor in end.items())


FROZEN = (
    "teacher={name: frozen, cache: features, weights: [{name: state_dict, source: x.pt, to: backbone}], backbone: "
    "{image: {name: vit, image_size: 24, patch: 4, width: 32, layers: 2, heads: 2, dim: 16}}}"
)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (FROZEN, "'spotlight' reads layers or the attention of the teacher 'default', which its cache lacks"),
        ("masker={imge: spotlight}", "masker.imge: no modality 'imge', did you mean 'image'?"),
        ("masker.image.role=local", "'spotlight': role: no view of 'image' has the role 'local'"),
        (
            "masker={text: random_drop}",
            "'random_drop' drops tokens of 'text', which backbone.text cannot: take another",
        ),
        (
            "masker.image=attended",
            "'attended' hides tokens of 'image', which backbone.image cannot: add `masking: {roles: []}` to its",
        ),
        ("masker={text: attended}", "'attended' hides tokens of 'text', which backbone.text cannot: take another"),
        ("loss.1={name: gram}", "'gram' reads all tokens of global views of 'image', and masker.image drops some"),
        ("teacher=null", "'spotlight' needs a teacher; this recipe has none"),
        ("teacher.modalities=[text]", "'spotlight' needs a teacher of 'image'; this recipe's teacher sees none"),
        ("teacher.views=[global, repeated]", "views: only the student sees a view a second time"),
        ("train.parallel.shard=2", "'spotlight' reads how a teacher attends, which train.parallel.shard does not"),
        ("backbone.image.masking={}", "masking.roles: global views have a masker in this recipe"),
    ],
)
def test_what_does_not_fit_is_refused(more: Registry, override: str, message: str) -> None:
    """Each by one line, before anything is built."""
    with pytest.raises(RecipeErrors) as caught:
        recipe_of(more, override)
    assert any(message in line for line in caught.value.lines), caught.value.lines


def test_a_cache_holds_no_layers(more: Registry) -> None:
    """Catches a run that ends at its first step."""
    data2vec = ("masker={image: {name: inverse_blocks, masks: 2, block: 2}}", "loss=[{name: data2vec, top: 1}]")
    recipe_of(more, *data2vec, FROZEN.replace(" cache: features,", ""))
    with pytest.raises(RecipeErrors, match="'data2vec' reads layers or the attention of the teacher 'default', which"):
        recipe_of(more, *data2vec, FROZEN)


def test_a_loss_that_reads_dropped_tokens_needs_a_masker(more: Registry) -> None:
    """Also one whose tokens are only hidden is not enough."""
    with pytest.raises(RecipeErrors, match="'recall' needs dropped tokens of 'image'; add"):
        recipe_of(more, "masker=null", "loss.1={name: recall}")


def test_masks_of_other_shapes_end_the_run_with_a_reason(more: Registry) -> None:
    """Views that have masks or extras of their own: another package's tower may draw some that no plan knows of."""
    recipe = recipe_of(more)
    masker = recipe.maskers()["image"]

    def collate(samples: Any, seeds: Any) -> Any:
        views = recipe.backbone["image"].cls.collator(recipe.backbone["image"].config)(samples, seeds)
        views.groups[0].keep = torch.zeros(1, len(samples), 1, dtype=torch.long)
        return views

    items = [Item("a", {"image": [View(torch.zeros(3, 24, 24), extra={"noise": 1})]}, 1)]
    with pytest.raises(DataError, match="'spotlight' draws the extra 'noise', which its views have already"):
        Collate({"image": recipe.collators()["image"]}, maskers={"image": masker})(items)
    with pytest.raises(DataError, match="masked twice: by the backbone's collator, and by 'spotlight'"):
        Collate({"image": collate}, maskers={"image": masker})(items)
