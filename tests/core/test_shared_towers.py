"""A tower that two modalities share: one set of weights in training, teachers, checkpoints and evaluation."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from trainers import trainers

import distill_core
from distill_core.outputs import Progress
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import load_recipe, parse_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.train import Trainer

Make = Callable[..., Trainer]
THREE = (
    "augment.video={name: random_crop, size: 16}", "fusion=null",
    "loss=[{name: clip}, {name: clip, id: moving, modalities: [video, text]}]",
    "evaluate.tasks=[{name: retrieval, modalities: [video, text]}]",
)  # fmt: skip
VIT = "{name: vit, image_size: 16, patch: 8, width: 16, layers: 2, heads: 2, dim: 16}"
SHARED, OWN = "backbone.video={same: image}", "backbone.video={same: image, own: [proj, transformer.resblocks.1]}"


@pytest.fixture
def recipe(tiny_recipe: Path, registry: Registry) -> Callable[..., Recipe]:
    return lambda *overrides: load_recipe(tiny_recipe, registry=registry, overrides=[*THREE, *overrides])


@pytest.fixture
def trainer(recipe: Callable[..., Recipe], tmp_path: Path) -> Iterator[Make]:
    with trainers(tmp_path / "runs") as make:
        yield lambda *overrides, resume=None: make(recipe(*overrides), resume)


def test_both_modalities_train_one_tower(recipe: Callable[..., Recipe]) -> None:
    """Catches a second set of weights, weights that are trained or averaged twice, and a teacher with towers apart."""
    objective = build_objective(recipe(SHARED, "teacher.momentum=0.5"))
    alone = build_objective(recipe("augment.video=null", "loss=[clip]", "evaluate=null", "teacher=null"))
    trained = [name for name, _, _ in objective.trainable((), {}) if name.startswith("backbone.")]
    assert trained == [name for name, _, _ in alone.trainable((), {}) if name.startswith("backbone.")]
    teacher = objective.teachers["default"]
    assert teacher.get_submodule("backbone.video") is teacher.get_submodule("backbone.image")
    before = {name: x.clone() for name, x in teacher.backbone.state_dict().items()}  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in objective.backbone.parameters():
            parameter += 1
    teacher.after_step(Progress(0, 2))
    for name, x in teacher.backbone.state_dict().items():  # type: ignore[union-attr]
        torch.testing.assert_close(x, before[name] + 0.5, msg=name)


def test_parts_of_its_own(recipe: Callable[..., Recipe]) -> None:
    """Catches parts that are shared all the same, others that are not, and a teacher whose copies share nothing."""
    objective = build_objective(recipe(OWN))
    for side in (objective.backbone, objective.teachers["default"].get_submodule("backbone")):
        image, video = (dict(side[name].named_parameters()) for name in ("image", "video"))  # type: ignore[index]
        apart = {name for name in image if image[name] is not video[name]}
        assert apart == {"proj"} | {name for name in image if name.startswith("transformer.resblocks.1.")}
    names = [name for name, _, _ in objective.trainable((), {}) if name.startswith("backbone.video.")]
    assert sorted(name.removeprefix("backbone.video.") for name in names) == sorted(apart)


@pytest.mark.parametrize("shared", [SHARED, OWN])
def test_it_trains_resumes_and_is_scored(shared: str, trainer: Make, tmp_path: Path) -> None:
    """The resumed run is the one that was not stopped, bit for bit; `load` gives the towers that were trained."""
    whole = trainer(shared, "train.checkpoint.every=2")
    whole.run()
    expected = whole.objective.state_dict()
    stopped = tmp_path / "stopped"
    shutil.copytree(whole.folder.path, stopped)
    (stopped / "checkpoints" / "step-00000004.pt").unlink()
    resumed = trainer(shared, "train.checkpoint.every=2", resume=stopped)
    assert resumed.state.step == 2
    resumed.run()
    for name, x in resumed.objective.state_dict().items():
        assert torch.equal(x, expected[name]), name
    for teacher in (False, True):
        model = distill_core.load(whole.folder.path, teacher=teacher)
        image, video = model.backbone["image"], model.backbone["video"]
        assert (image is video) is (shared == SHARED)
        saved = Checkpoints(whole.folder.path).read()["objective"]
        prefix = "teacher.default." if teacher else ""
        assert torch.equal(video.state_dict()["proj"], saved[f"{prefix}backbone.video.proj"])
    scores = whole.folder.path.joinpath("report.json").read_text()
    assert "video_to_text/R@1" in scores


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["backbone.video={same: vedio}"], "no entry 'vedio' (there are: image, text)"),
        (["backbone.video={same: video}"], "cannot be the same as itself"),
        (["backbone.video={same: [image]}"], "same: must be the name of the entry whose component it takes"),
        (["backbone.image={same: video}", "backbone.video={same: image}"], "is the same as 'image' itself"),
        (["backbone.video={same: image, width: 32}"], "'width' is that of 'image'"),
        (["backbone.video={same: image, own: proj}"], "must be a list of names of parts"),
        (["backbone.video={same: image, own: [ln_port]}"], "'ln_port' names no part of 'vit', did you mean 'ln_post'?"),
        ([SHARED, "freeze=[backbone.video]"], "is that of another modality: name backbone.image"),
        ([SHARED, "train.lr_decay={backbone.video: 0.5}"], "is that of another modality: name backbone.image"),
        ([OWN, "train.parallel.shard=2"], "backbone.video: shares all of 'image' but its `own` parts, which train.par"),
        ([f"teachers={{big: {{name: frozen, backbone: {{image: {VIT}, video: {{same: image, own: [proj]}}}}}}}}",
          "train.parallel.shard=all"], "backbone.video: shares all of 'image' but its `own` parts, which train.parall"),
        (["backbone.video={same: text}"], "'clip_text' reads texts, and the views of its modality are arrays (3 x 16"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(overrides: list[str], line: str, tiny_recipe: Path, registry: Registry) -> None:
    """With the place in the recipe, before anything is built."""
    with pytest.raises(distill_core.UserError) as caught:
        load_recipe(tiny_recipe, registry=registry, overrides=[*THREE, *overrides])
    assert line in str(caught.value)


def test_a_recipe_with_a_shared_tower_reads_itself(recipe: Callable[..., Recipe], registry: Registry) -> None:
    for shared in (SHARED, OWN):
        resolved = recipe(shared)
        again = parse_recipe(resolved.to_yaml(), "again.yaml", registry=registry)
        assert again == resolved
        assert again != recipe(f"backbone.video={VIT}")


@pytest.mark.parametrize("own", [{}, {"own": ["proj"]}])
def test_the_entry_that_takes_a_tower_may_stand_first(
    own: dict[str, list[str]], recipe: Callable[..., Recipe], registry: Registry
) -> None:
    """Its parameters are those of the entry that has the component, all the same. Catches a `freeze` that names no part
    of the model, or leaves the shared weights to be trained."""
    written = recipe(SHARED, "freeze=[backbone.image]", "teacher=null").to_dict()
    towers = written["backbone"]
    written["backbone"] = {"video": {"same": "image", **own}, "image": towers["image"], "text": towers["text"]}
    resolved = parse_recipe(yaml.safe_dump(written, sort_keys=False), "first.yaml", registry=registry)
    assert next(iter(resolved.backbone)) == "video"
    objective = build_objective(resolved)
    trained = [name for name, _, _ in objective.trainable(resolved.freeze, {}) if not name.startswith("backbone.text.")]
    assert [name for name in trained if name.startswith("backbone.")] == (["backbone.video.proj"] if own else [])


def test_an_embedding_is_trained_where_its_tower_is(recipe: Callable[..., Recipe]) -> None:
    """Catches class tokens that are scored in place of an embedding which another modality trains, or that is loaded,
    and a projection of its own that nothing trains."""
    alone = ("loss=[clip]", "teacher=null", "evaluate=null")
    assert recipe(SHARED, *alone).untrained_embeddings() == frozenset()
    assert recipe(OWN, *alone).untrained_embeddings() == {"video"}
    loaded = ("loss=[{name: clip, modalities: [video, text]}]", "teacher=null", "evaluate=null")
    assert recipe(SHARED, *loaded).untrained_embeddings() == frozenset()
    assert recipe(f"backbone.video={VIT}", *loaded).untrained_embeddings() == {"image"}


def test_a_frozen_teacher_may_share_its_towers(trainer: Make) -> None:
    """Its weights are those of one tower. Catches a second tower that is never loaded, and features of it."""
    run = trainer(SHARED, "name=first")
    run.run()
    frozen = (
        f"teachers={{big: {{name: frozen, backbone: {{image: {VIT}, video: {{same: image}}}}, "
        f"weights: [{{name: state_dict, source: {run.folder.path}, to: backbone.image}}]}}}}"
    )
    made = trainer(SHARED, "name=second", frozen)
    teacher = made.objective.teachers["big"]
    network = teacher.network  # type: ignore[attr-defined]
    assert network.backbone["image"] is network.backbone["video"]
    teacher.prepare()
    batch = next(iter(made.loader))
    outputs = made.objective.represent(batch, Progress(0, 4))
    expected = run.objective.backbone["image"]
    for name in ("image", "video"):
        alone = expected(made.objective.on_device(batch).views[name].only(("global",)))
        torch.testing.assert_close(outputs.teacher["big"][name].pooled, alone.pooled)
