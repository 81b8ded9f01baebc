"""The trained model as a user loads it: what it encodes, and what it refuses."""

from __future__ import annotations

import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from score_values import reported
from torch import Tensor

import distill_core
from distill_core.contracts.task import Task, TaskConfig
from distill_core.data.webdataset_source import WebDatasetSource
from distill_core.errors import UserError
from distill_core.evaluate.run import evaluate
from distill_core.evaluate.score import Score
from distill_core.evaluate.sets import EvaluationSet
from distill_core.model import Model
from distill_core.recipe.build import build_objective, models_of
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Entry, Registry
from distill_core.run.folder import RunFolder
from distill_core.train import Trainer


class Store(Task):
    """Keeps the embeddings that evaluations work on."""

    name = "store"
    Config = TaskConfig
    seen: ClassVar[list[dict[str, Tensor]]] = []

    def run(self, model: Model, sets: Sequence[EvaluationSet]) -> list[Score]:
        self.seen.append({m: sets[0].embeddings(model, m)[0] for m in model.modalities})
        return [Score(None, "M", 1.0)]


@pytest.fixture
def trained(tiny_recipe: Path, registry: Registry, tmp_path: Path) -> SimpleNamespace:
    """A run whose validation at step 2 and test at step 4 are kept, student then teacher."""
    Store.seen.clear()
    recipe = load_recipe(
        tiny_recipe,
        registry=Registry([*registry.entries.values(), Entry(Store, "mine", "mine")]),
        overrides=[
            "evaluate={every: 2, validation: test, tasks: [{name: store}]}",
            "train.checkpoint={every: 2, best: student/store/M}",
            "train.optimizer.lr=0.01",
        ],
    )
    folder = RunFolder.create(tmp_path / "runs", recipe)
    Trainer(recipe, folder, quiet=True).run()
    # a user's session does not know the test's task
    kept = folder.path / "recipe.yaml"
    kept.write_text(kept.read_text().replace("name: store", "name: retrieval"))
    return SimpleNamespace(
        run=str(folder.path), shard=tiny_recipe.parent / "shards" / "test-000.tar", seen=list(Store.seen)
    )


def contents(shard: Path) -> tuple[list[bytes], list[str]]:
    with tarfile.open(shard) as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    pictures = [data for name, data in files.items() if name.endswith(".png")]
    return pictures, [data.decode() for name, data in files.items() if name.endswith(".txt")]


def test_load_encodes_as_evaluation_did(trained: SimpleNamespace) -> None:
    """Catches a side, a checkpoint or a picture's preparation that differs from what was scored."""
    pictures, texts = contents(trained.shard)
    # validation at 2 (student, teacher), validation and test at 4
    assert len(trained.seen) == 6
    for options, seen in (
        ({}, trained.seen[4]),
        ({"teacher": True}, trained.seen[5]),
        ({"checkpoint": "2"}, trained.seen[0]),
        ({"checkpoint": "best"}, trained.seen[0]),
        ({"checkpoint": "best", "teacher": True}, trained.seen[1]),
    ):
        model = distill_core.load(trained.run, **options)
        assert model.modalities == ("image", "text")
        for modality, items in (("image", pictures), ("text", texts)):
            encoded = model.encode(modality, items)
            assert encoded.shape == (4, 16)
            assert encoded.dtype == torch.float32
            assert not encoded.requires_grad
            torch.testing.assert_close(encoded.norm(dim=-1), torch.ones(4))
            torch.testing.assert_close(encoded, seen[modality], rtol=0, atol=2e-6, msg=f"{options} {modality}")
    assert (trained.seen[4]["image"] - trained.seen[5]["image"]).abs().max() > 1e-4
    assert (trained.seen[4]["image"] - trained.seen[0]["image"]).abs().max() > 1e-4


def test_class_token_is_what_the_embedding_is_projected_from(trained: SimpleNamespace) -> None:
    """Catches features behind the projection, and those of another token."""
    pictures, texts = contents(trained.shard)
    model = distill_core.load(trained.run)
    for modality, items, projection in (("image", pictures, "proj"), ("text", texts, "text_projection")):
        classes = model.encode(modality, items, features="class_token")
        width = model.backbone[modality].config.width
        assert classes.shape == (len(items), width)
        torch.testing.assert_close(classes.norm(dim=-1), torch.ones(len(items)))
        projected = torch.nn.functional.normalize(classes @ getattr(model.backbone[modality], projection), dim=-1)
        torch.testing.assert_close(projected, model.encode(modality, items), rtol=0, atol=1e-5)
        assert model.encode(modality, [], features="class_token").shape == (0, width)
    with pytest.raises(UserError, match="no features 'class_tokens'; there are embedding, class_token, mean_token"):
        model.encode("image", pictures, features="class_tokens")


@pytest.mark.slow
def test_encode_takes_what_people_have(trained: SimpleNamespace, tmp_path: Path) -> None:
    """Bytes, paths, PIL pictures and arrays of one picture are one embedding; batches do not change it."""
    pictures, texts = contents(trained.shard)
    model = distill_core.load(trained.run)
    path = tmp_path / "one.png"
    path.write_bytes(pictures[0])
    opened = Image.open(path)
    given = [pictures[0], str(path), path, opened, np.asarray(opened.convert("RGB"))]
    encoded = model.encode("image", given)
    torch.testing.assert_close(encoded, encoded[:1].expand(5, -1), rtol=0, atol=1e-6)
    torch.testing.assert_close(model.encode("image", str(path)), encoded[:1], rtol=0, atol=1e-6)
    torch.testing.assert_close(model.encode("image", path), encoded[:1], rtol=0, atol=1e-6)
    torch.testing.assert_close(model.encode("image", opened), encoded[:1], rtol=0, atol=1e-6)
    assert model.encode("text", texts[0]).shape == (1, 16)
    assert model.encode("text", []).shape == (0, 16)
    whole = model.encode("text", [*texts, "a", "a much longer text of many more words than the others have"])
    model.batch_size = 1
    torch.testing.assert_close(model.encode("text", texts), whole[:4], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_threads_read_ahead_in_order(trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU. Catches items that come as their threads finish, and a bad one that takes others with it."""
    model = distill_core.load(trained.run)
    pictures, _ = contents(trained.shard)
    items = [*pictures, *pictures[::-1], *pictures]
    samples = [{"__key__": str(i), "__url__": "here", "png": item} for i, item in enumerate(items)]
    samples[3]["png"] = b"no picture"
    samples[9]["png"] = pictures[0][:80]
    alone = model.encode("image", items)
    threads_alone = EvaluationSet("data", samples)
    expected = threads_alone.embeddings(model, "image")
    names = set()
    plain = model.augment["image"].eval_view

    def slow(item: Any) -> Any:
        names.add(threading.current_thread().name)
        time.sleep(0.001 * (id(item) % 7))
        return plain(item)

    for module in ("distill_core.model", "distill_core.evaluate.sets"):
        monkeypatch.setattr(f"{module}.reading_threads", lambda device: 3)
    monkeypatch.setattr(model.augment["image"], "eval_view", slow)
    torch.testing.assert_close(model.encode("image", items), alone, rtol=0, atol=1e-6)
    ahead = EvaluationSet("data", samples)
    found = ahead.embeddings(model, "image")
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-6)
    assert found[1].tolist() == expected[1].tolist() == [i for i in range(len(items)) if i not in (3, 9)]
    assert ahead.skipped == threads_alone.skipped
    assert len(names) > 1
    assert threading.current_thread().name not in names
    with pytest.raises(UserError, match="image 5: not a readable picture"):
        model.encode("image", [*pictures, *pictures[:1], b"no picture", *pictures])


def test_what_cannot_be_encoded(trained: SimpleNamespace, tmp_path: Path) -> None:
    """One clear line each, with the place of the item."""
    model = distill_core.load(trained.run)
    pictures, _ = contents(trained.shard)
    for modality, items, said in (
        ("images", ["x"], r"no modality 'images', did you mean 'image'\?"),
        ("image", [pictures[0], b"no picture"], r"image 1: not a readable picture"),
        ("image", [str(tmp_path / "nowhere.png")], r"image 0: not a readable picture: .*nowhere\.png"),
        ("image", [pictures[0][:80]], r"image 0: not a readable picture"),
        ("image", [7], r"image 0: not a readable picture"),
        ("text", ["a", 3], r"text 1: not a text: int"),
    ):
        with pytest.raises(UserError, match=said) as error:
            model.encode(modality, items)
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_what_cannot_be_loaded(trained: SimpleNamespace, tmp_path: Path, tiny_recipe: Path, registry: Registry) -> None:
    with pytest.raises(UserError, match=r"no such run folder, did you mean 'tiny'\?"):
        distill_core.load(trained.run[:-1])
    with pytest.raises(UserError, match=r"no checkpoint '3'; there are 2, 4, best"):
        distill_core.load(trained.run, checkpoint="3")
    options = [
        "fusion=null",
        "teacher=null",
        "loss=[{name: contrastive}]",
        "evaluate=null",
        "train.steps=1",
        "name=plain",
    ]
    recipe = load_recipe(tiny_recipe, registry=registry, overrides=options)
    plain = RunFolder.create(tmp_path / "runs", recipe)
    Trainer(recipe, plain, quiet=True).run()
    with pytest.raises(UserError, match=r"this run trained no teacher"):
        distill_core.load(str(plain.path), teacher=True)


Write = Callable[..., list[Path]]


def test_a_source_that_turns_out_to_lack_a_split(
    tiny_recipe: Path, registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a silent run without scores, where the source could not tell beforehand."""

    class Vague(WebDatasetSource):
        name = "vague"

        @classmethod
        def splits(cls, config: Any) -> None:
            return None

    more = Registry([*registry.entries.values(), Entry(Vague, "mine", "mine")])
    overrides = ["data.source.name=vague", "data.source.test=null", "train.steps=1"]
    recipe = load_recipe(tiny_recipe, registry=more, overrides=overrides)
    folder = RunFolder.create(tmp_path / "runs", recipe)
    result = Trainer(recipe, folder, quiet=True).run()
    assert result.scores == []
    assert result.failed == ["the data source has no split 'test'"]
    assert "not evaluated: the data source has no split 'test'" in capsys.readouterr().err


IMAGE_TEACHER = ("fusion=null", "loss=[{name: contrastive}]", "teacher={modalities: [image], momentum: 0.5}")


def test_a_teacher_of_fewer_modalities_is_scored_by_what_it_can_do(
    tiny_recipe: Path, registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SILC and TIPS. Would catch a teacher that is not scored at all, one scored by the student's text tower, and tasks
    left out without a word."""
    tasks = "evaluate.tasks=[retrieval, {name: retrieval, id: again}, {name: knn, label: txt, learn: null}]"
    recipe = load_recipe(tiny_recipe, registry=registry, overrides=[*IMAGE_TEACHER, tasks])
    folder = RunFolder.create(tmp_path / "runs", recipe)
    ended = Trainer(recipe, folder, quiet=False).run()
    assert ended.failed == []
    assert {"student/retrieval/M", "student/knn/top1", "teacher/knn/top1"} <= reported(ended.scores).keys()
    assert not [score for score in ended.scores if score.side == "teacher" and score.task != "knn"]
    said = "the teacher has no text, so retrieval, again cannot score it"
    assert said in " ".join(capsys.readouterr().err.split())
    teacher = distill_core.load(str(folder.path), teacher=True)
    assert teacher.modalities == ("image",)
    assert teacher.encode("image", np.zeros((1, 16, 16, 3), np.uint8)).shape == (1, 16)
    with pytest.raises(UserError, match="the teacher has no modality 'text'"):
        teacher.encode("text", ["a bird"])


def test_tasks_of_the_first_modality_are_not_scored_with_a_teachers_own_first(
    tiny_recipe: Path, registry: Registry
) -> None:
    """Would catch a probe of texts beside a teacher's probe of pictures, under one name."""
    text = tiny_recipe.read_text(encoding="utf-8")
    first = "  image: {name: multi_crop, size: 16, local_size: 8, global: 2, local: 1}\n"
    second = "  text: {name: text_crop, global: 2, local: 1}\n"
    assert first + second in text
    tiny_recipe.write_text(text.replace(first + second, second + first), encoding="utf-8")
    tasks = "evaluate.tasks=[{name: knn, label: txt, learn: null}]"
    recipe = load_recipe(tiny_recipe, registry=registry, overrides=[*IMAGE_TEACHER, tasks])
    models = models_of(recipe, build_objective(recipe), torch.device("cpu"))
    found = evaluate(recipe, models, recipe.data.source.build(), "test")
    assert {score.side for score in found.scores} == {"student"}
    assert found.warnings == ["the teacher has no text, so knn cannot score it"]


def test_a_teacher_without_the_fusion_is_scored_by_what_it_can_do(tiny_recipe: Path, registry: Registry) -> None:
    """Would catch a task that fails for both sides because the teacher has no fusion, and the student's fusion used
    with the teacher's towers."""
    tasks = "evaluate.tasks=[retrieval, conditioned_retrieval]"
    recipe = load_recipe(tiny_recipe, registry=registry, overrides=[tasks])
    models = models_of(recipe, build_objective(recipe), torch.device("cpu"))
    assert models["student"].fusion is not None
    assert models["teacher"].modalities == models["student"].modalities
    found = evaluate(recipe, models, recipe.data.source.build(), "test")
    assert found.failed == []
    assert {(score.side, score.task) for score in found.scores} == {
        ("student", "retrieval"), ("teacher", "retrieval"), ("student", "conditioned_retrieval"),
    }  # fmt: skip
    assert found.warnings == ["the teacher has no fusion, so conditioned_retrieval cannot score it"]


def test_what_no_loss_trains_is_not_what_is_scored(tiny_recipe: Path, registry: Registry) -> None:
    """DINO, iBOT. Would catch a projection that stays as it was drawn, taken for the model's embedding."""
    alone = [
        "augment.text=null", "backbone.text=null", "fusion=null", "teacher=null", "loss=[{name: koleo}]",
        "backbone.image.dim=8",
    ]  # fmt: skip
    tasks = "evaluate.tasks=[{name: knn, label: txt, learn: null}, {name: knn, id: asked, label: txt, learn: null, \
features: embedding}]"
    recipe = load_recipe(tiny_recipe, registry=registry, overrides=[*alone, tasks])
    models = models_of(recipe, build_objective(recipe), torch.device("cpu"))
    model, items = models["student"], np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    assert torch.equal(model.encode("image", items), model.encode("image", items, features="class_token"))
    assert model.encode("image", items).shape == (3, 16)
    assert model.encode("image", items, features="embedding").shape == (3, 8)
    found = evaluate(recipe, models, recipe.data.source.build(), "test")
    assert "on class tokens, since no loss trains the embedding" in found.notes["knn"]
    assert "class tokens" not in found.notes["asked"]
    trained = load_recipe(tiny_recipe, registry=registry)
    assert trained.untrained_embeddings() == frozenset()
