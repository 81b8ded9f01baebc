"""A tower that reads two modalities as one sequence."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from one_tower import CASES, OneTower, Together
from PIL import Image
from trainers import trainers

from distill_authoring.conformance import assert_conforms
from distill_core.batch import Batch, Group, Views, join_views
from distill_core.contracts.cases import ConformanceCases
from distill_core.errors import RecipeErrors, UserError
from distill_core.outputs import Progress
from distill_core.recipe.resolve import load_recipe, parse_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Entry, Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.train import Trainer

JOINT = ("backbone.image+text=one_tower", "loss.2=together")


@pytest.fixture
def more(registry: Registry) -> Registry:
    return Registry([*registry.entries.values(), *(Entry(c, "outside", "outside") for c in (OneTower, Together))])


@pytest.fixture
def recipe(tiny_recipe: Path, more: Registry) -> Callable[..., Recipe]:
    return lambda *overrides: load_recipe(tiny_recipe, registry=more, overrides=[*JOINT, *overrides])


@pytest.fixture
def trainer(recipe: Callable[..., Recipe], tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    with trainers(tmp_path / "runs") as make:
        yield lambda *overrides, resume=None: make(recipe(*overrides), resume)


@pytest.mark.slow
def test_conforms() -> None:
    assert_conforms(OneTower, cases=ConformanceCases(CASES))


def test_it_reads_what_the_modalities_collate(trainer: Callable[..., Trainer]) -> None:
    """By the tower itself, on the same pixels and ids. Catches views that are paired otherwise, pixels that are not
    normalised, local views, and a teacher's copy that reads something else."""
    made = trainer()
    batch = next(iter(made.loader))
    outputs = made.objective.represent(batch, Progress(0, 4))
    assert made.recipe.plan.modalities["image+text"].roles == ("global", "global")
    views = made.objective.on_device(batch).views
    image, text = (next(g for g in views[name].groups if g.role == "global") for name in ("image", "text"))
    tower: Any = made.objective.backbone["image+text"]
    for view in range(2):
        from distill_core.interfaces import TowerInput

        parts = {"image": TowerInput(image.x[view]), "text": TowerInput(text.x[view])}
        (alone,) = tower.encode_together([TowerInput(image.x[view], parts=parts, tokens=True)])
        torch.testing.assert_close(outputs.student["image+text"].pooled[view], alone.pooled)
    assert list(outputs.student["image+text"].tokens) == [0]
    teacher = outputs.teacher["default"]["image+text"]
    torch.testing.assert_close(teacher.pooled, outputs.student["image+text"].pooled)


def test_it_trains_resumes_and_encodes(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    """The resumed run is the one that was not stopped, bit for bit; a loaded model encodes pairs, and other
    modalities are scored as without the joint tower."""
    whole = trainer("train.checkpoint.every=2")
    whole.run()
    stopped = tmp_path / "stopped"
    shutil.copytree(whole.folder.path, stopped)
    (stopped / "checkpoints" / "step-00000004.pt").unlink()
    resumed = trainer("train.checkpoint.every=2", resume=stopped)
    resumed.run()
    for name, x in resumed.objective.state_dict().items():
        assert torch.equal(x, whole.objective.state_dict()[name]), name
    rows = [row for row in whole.folder.rows() if "terms" in row]
    assert {"together/near", "together/size"} <= set(rows[0]["terms"])
    assert "retrieval" in whole.folder.path.joinpath("report.json").read_text()


def test_a_model_encodes_pairs(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    from distill_core.evaluate.sets import EvaluationSet
    from distill_core.recipe.build import models_of

    made = trainer()
    model = models_of(made.recipe, made.objective, torch.device("cpu"))["student"]
    assert model.modalities == ("image", "text")
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(3)]
    pairs = [{"image": picture, "text": word} for picture, word in zip(pictures, ("a", "b c", "d"), strict=True)]
    embedded = model.encode("image+text", pairs)
    assert embedded.shape == (3, 16)
    torch.testing.assert_close(embedded[1:2], model.encode("image+text", [pairs[1]]))
    swapped = model.encode("image+text", [{"image": pictures[0], "text": "b c"}])
    assert (swapped - embedded[0]).abs().max() > 1e-4
    with pytest.raises(UserError, match="is a mapping with image, text"):
        model.encode("image+text", ["a"])
    samples = next(iter(made.recipe.data.source.build().samples("test").values()))
    items, owners = EvaluationSet("test", samples).embeddings(model, "image+text")
    assert len(items) == len(owners) > 0


def test_samples_may_lack_a_modality(trainer: Callable[..., Trainer]) -> None:
    """The joint tower sees those that have both. Catches an image with another sample's text, and a loss over all."""
    made = trainer("data.optional=[image, text]", "fusion=null", "loss.1=null")
    batch = next(iter(made.loader))
    has = {"image": np.array([True, True, False, True]), "text": np.array([True, False, True, True])}
    whole = made.objective.represent(batch, Progress(0, 4)).student["image+text"].pooled
    some = Batch(
        {n: v.map(lambda x, n=n: x[:, torch.from_numpy(has[n])]) for n, v in batch.views.items()},  # type: ignore[misc]
        batch.keys,
        presence=has,
    )
    for name, views in some.views.items():
        for group in views.groups:
            group.lengths = None if group.lengths is None else group.lengths[:, has[name]]
            group.hidden = None
    outputs = made.objective.represent(some, Progress(0, 4))
    torch.testing.assert_close(outputs.student["image+text"].pooled, whole[:, [0, 3]])
    assert made.objective.losses(outputs).metrics["together/rows"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("optional", [False, True])
def test_two_ranks_train_what_one_does(optional: bool, tiny_recipe: Path, tmp_path: Path) -> None:
    """With samples that lack a text, too, of which ranks have different numbers. Catches a joint tower whose gradients
    are not averaged, and a mean over a rank's own pairs where it is one over all."""
    changes = [*JOINT, "evaluate=null", "train.steps=2", "train.optimizer.eps=1e-3"]
    changes += ["fusion=null", "loss.1=null", "data.optional=[text]"] if optional else []
    if optional:
        _without_text(tiny_recipe.parent / "shards", every=3)
    script, environment = Path(__file__).with_name("distributed_joint_tower.py"), {**os.environ, "OMP_NUM_THREADS": "1"}
    states = []
    for ranks in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if ranks == 2 else []
        batch = f"data.batch_size={8 // ranks}"
        command = [sys.executable, *launch, str(script), str(tiny_recipe), str(tmp_path / f"r{ranks}"), *changes, batch]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        states.append(Checkpoints(tmp_path / f"r{ranks}" / "tiny").read()["objective"])
    one, two = states
    assert any(name.startswith("backbone.image+text.") for name in one)
    for name, x in one.items():
        torch.testing.assert_close(two[name], x, rtol=1e-4, atol=2e-5, msg=name)


def _without_text(folder: Path, every: int) -> None:
    """Takes the text of every so many training samples out of their shards."""
    for path in folder.glob("train-*.tar"):
        with tarfile.open(path) as tar:
            members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
        texts = [member.name for member, _ in members if member.name.endswith(".txt")]
        with tarfile.open(path, "w") as tar:
            for member, data in members:
                if member.name not in texts[::every]:
                    tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("backbone.image+text=vit", "'vit' reads one modality, and 'image+text' names several"),
        ("backbone.image=one_tower", "'one_tower' reads several modalities at once"),
        ("backbone.image+sound={name: one_tower}", "no entry 'sound' in backbone, which collates its views"),
        ("backbone.text+text={name: one_tower}", "names a modality twice"),
        ("augment.image.global=1", "pairs the global views of its modalities, of which there are image 1, text 2"),
        ("masker={image+text: random_drop}", "sees every token; mask one of them: masker.image or masker.text"),
        ("data.optional=[image+text]", "is read where a sample has image and text: name one of these"),
        ("loss.2.joint=image+texts", "needs a modality 'image+texts', did you mean 'image+text'?"),
    ],
)
def test_what_makes_no_sense_is_refused(override: str, line: str, recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeErrors) as caught:
        recipe(override)
    assert line in str(caught.value)


def test_a_recipe_reads_itself_and_raw_parts_do(recipe: Callable[..., Recipe], more: Registry) -> None:
    resolved = recipe(
        "loss=[together]", "loss.0.joint=image+text", "fusion=null", "backbone.image=raw", "evaluate=null"
    )
    assert parse_recipe(resolved.to_yaml(), "again.yaml", registry=more) == resolved
    assert set(resolved.plan.modalities) == {"text", "image+text"}


def test_views_that_do_not_pair() -> None:
    one, two = (Views([Group(torch.zeros(count, 3, 2))]) for count in (1, 2))
    with pytest.raises(ValueError, match="not as many of one shape"):
        join_views({"a": one, "b": two}, ("global",))
    joined = join_views({"a": two, "b": two}, ("global",))
    part = joined.part(1, 3)
    assert part.groups[0].parts["b"].x.shape == (2, 2, 2)
