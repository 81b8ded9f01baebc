"""Retrieval and zero-shot scores against brute force and by hand, and the trained model as a user loads it."""

from __future__ import annotations

import io
import json
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
from torch import Tensor
from torch.nn.functional import normalize

import distill_core
from distill_core.components import ComponentConfig, Evaluation
from distill_core.data.shards import Shards
from distill_core.data.webdataset_source import WebDatasetSource
from distill_core.errors import BadSample, DataError, UserError
from distill_core.evaluate.retrieval import Retrieval
from distill_core.evaluate.sets import EvaluationSet
from distill_core.evaluate.zero_shot import ZeroShot
from distill_core.model import Model
from distill_core.registry import Entry, Registry
from distill_core.resolve import load_recipe
from distill_core.tracking import RunFolder
from distill_core.train import Trainer

Vector = list[float]


class Given:
    """In place of a modality's augmentation: its items are vectors (or words) that the sample's json holds."""

    def __init__(self, name: str) -> None:
        self.name = name

    def read(self, sample: Any, field: str | None = None) -> list[Any]:
        found = json.loads(sample["json"]).get(field or self.name)
        if found is None:
            raise BadSample("none")
        return found if isinstance(found, list) else [found]


class Look:
    """A model that encodes a vector as itself, and a word as its entry."""

    modalities = ("image", "text")
    device = torch.device("cpu")

    def __init__(self, words: dict[str, Vector] | None = None) -> None:
        self.augment = {name: Given(name) for name in self.modalities}
        self.words = words or {}

    def encode(self, modality: str, items: Sequence[Any], *, features: str = "embedding") -> Tensor:
        rows = [self.words[item] if isinstance(item, str) else item for item in items]
        return normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)


def as_set(folder: Path, samples: Sequence[dict[str, Any]], name: str = "data") -> EvaluationSet:
    path = folder / f"{name}.tar"
    with tarfile.open(path, "w") as tar:
        for i, sample in enumerate(samples):
            data = json.dumps(sample).encode()
            entry = tarfile.TarInfo(f"s{i:04d}.json")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return EvaluationSet(name, Shards([str(path)]))


def retrieve(model: Any, *sets: EvaluationSet, **options: Any) -> dict[str, float]:
    return Retrieval(Retrieval.Config.model_validate_json(json.dumps(options))).run(model, sets)


def brute_recall(queries: Any, targets: Any, query_of: Any, target_of: Any, k: int) -> float:
    """Sort all targets by similarity, foreign ones first among equals, and look among the first k."""
    hits = 0
    for query, owner in zip(queries, query_of, strict=True):
        order = sorted(range(len(targets)), key=lambda j: (-float(np.dot(query, targets[j])), target_of[j] == owner))
        hits += any(target_of[j] == owner for j in order[:k])
    return 100 * hits / len(queries)


def test_retrieval_against_brute_force(tmp_path: Path) -> None:
    """Unequal numbers of captions, whole-number vectors so that ties are exact. Catches wrong owners, directions
    swapped, the mean over the wrong side, and a second caption of the query's own that counts as a rival."""
    rng = np.random.default_rng(0)
    count = 37
    samples, items = [], {"image": ([], []), "text": ([], [])}
    for i in range(count):
        sample = {"image": [rng.integers(-2, 3, 4).tolist()], "text": rng.integers(-2, 3, (1 + i % 4, 4)).tolist()}
        samples.append(sample)
    model = Look()
    model.encode = lambda modality, rows, **features: torch.tensor(list(rows), dtype=torch.float32)  # type: ignore[method-assign]
    for i, sample in enumerate(samples):
        for name, (vectors, owners) in items.items():
            vectors += sample[name]
            owners += [i] * len(sample[name])
    scores = retrieve(model, as_set(tmp_path, samples), ks=[1, 3, 10])
    for a, b in (("image", "text"), ("text", "image")):
        for k in (1, 3, 10):
            expected = brute_recall(items[a][0], items[b][0], items[a][1], items[b][1], k)
            assert scores[f"data/{a}_to_{b}/R@{k}"] == pytest.approx(expected), (a, k)
    one_and_five = [
        brute_recall(items[a][0], items[b][0], items[a][1], items[b][1], k)
        for a, b in (("image", "text"), ("text", "image"))
        for k in (1, 5)
    ]
    assert scores["M"] == scores["data/M"] == pytest.approx(sum(one_and_five) / 4)
    assert scores["data/candidates"] == sum(1 + i % 4 for i in range(count))


def test_retrieval_by_hand(tmp_path: Path) -> None:
    """Two pictures, three captions: the second picture's nearest caption is the first's, by a tie that counts against
    it; its own is next."""
    samples = [
        {"image": [[1.0, 0.0]], "text": [[1.0, 0.0], [0.0, 1.0]]},
        {"image": [[0.0, 1.0]], "text": [[0.0, 1.0]]},
    ]
    scores = retrieve(Look(), as_set(tmp_path, samples), ks=[1, 2])
    assert scores["data/image_to_text/R@1"] == 50.0
    assert scores["data/image_to_text/R@2"] == 100.0
    # of the captions, [1, 0] finds its picture; [0, 1] of the first finds the second's; [0, 1] of the second its own
    assert scores["data/text_to_image/R@1"] == pytest.approx(200 / 3)
    assert scores["data/text_to_image/R@2"] == 100.0
    assert scores["R@1"] == pytest.approx((50 + 200 / 3) / 2)
    assert scores["M"] == pytest.approx((50 + 100 + 200 / 3 + 100) / 4)


@pytest.mark.parametrize("count", [33, 257])
def test_collapsed_and_broken_embeddings_score_nothing(tmp_path: Path, count: int) -> None:
    """Catches a score of 100 for a model whose embeddings are all one, or NaN: every comparison with NaN is false."""
    rng = np.random.default_rng(0)
    one = rng.standard_normal(48).tolist()
    for vector in (one, [float("nan")] * 48):
        samples = [{"image": [vector], "text": [vector], "class": f"c{i % 11}"} for i in range(count)]
        model = Look({f"c{i}": vector for i in range(11)})
        scores = retrieve(model, as_set(tmp_path, samples))
        assert scores["R@10"] <= 5.0
        assert scores["M"] <= 5.0
        shot = ZeroShot(ZeroShot.Config()).run(model, [as_set(tmp_path, samples)])  # type: ignore[arg-type]
        assert shot["top1"] == 0.0
        assert shot["top5"] == 0.0


@pytest.mark.parametrize(("captions", "said"), [(1, "8 candidates"), (3, "8 to 24 candidates")])
def test_the_chance_that_retrieval_tells(tmp_path: Path, captions: int, said: str) -> None:
    """Of random embeddings, whatever the number of captions: a query's own are 1 in 8. Would catch 1 in 24."""
    task = Retrieval(Retrieval.Config())
    one = np.eye(8).tolist()
    task.run(Look(), [as_set(tmp_path, [{"image": [v], "text": [v] * captions} for v in one])])  # type: ignore[arg-type]
    assert task.note() == f"percent, both directions; {said}, chance R@1 12.5; M: mean of R@1 and R@5"


def test_sets_are_averaged_and_unreadable_samples_left_out(tmp_path: Path) -> None:
    """Catches sets that are pooled, and numbering that slips where a sample cannot be read on one side."""
    eye = np.eye(4).tolist()
    right = as_set(tmp_path, [{"image": [v], "text": [v]} for v in eye], "right")
    wrong = as_set(tmp_path, [{"image": [eye[i]], "text": [eye[i - 1]]} for i in range(4)], "wrong")
    scores = retrieve(Look(), right, wrong)
    assert (scores["right/M"], scores["right/image_to_text/R@1"], scores["wrong/image_to_text/R@1"]) == (100, 100, 0)
    assert scores["R@1"] == 50.0
    holes = [
        {"image": [eye[0]]},
        {"image": [eye[1]], "text": [eye[1]]},
        {"text": [eye[2]]},
        {"image": [eye[3]], "text": [eye[3]]},
    ]
    scores = retrieve(Look(), as_set(tmp_path, holes, "holes"), ks=[1])
    assert scores["holes/candidates"] == 2
    assert scores["holes/image_to_text/R@1"] == scores["holes/text_to_image/R@1"] == 100.0
    with pytest.raises(DataError, match="'none': no sample with both image and text"):
        retrieve(Look(), as_set(tmp_path, [{"image": [eye[0]]}, {"text": [eye[0]]}], "none"))


def test_another_field_may_be_retrieved(tmp_path: Path) -> None:
    """Catches a cache of items or embeddings that mixes two fields up."""
    eye = np.eye(3).tolist()
    data = as_set(tmp_path, [{"image": [eye[i]], "text": [eye[i]], "name": [eye[i - 1]]} for i in range(3)])
    model = Look()
    assert retrieve(model, data, ks=[1])["R@1"] == 100.0
    assert retrieve(model, data, ks=[1], fields={"text": "name"})["R@1"] == 0.0
    assert retrieve(model, data, ks=[1])["R@1"] == 100.0


def test_zero_shot_by_hand(tmp_path: Path) -> None:
    """Three classes, two prompts each. A class's centre is the normalised mean of its normalised prompts.

    Catches prompts summed before they are normalised, classes mixed up with templates, the mean over classes taken
    over samples, and ties that count for the model.
    """
    words = {
        "a bird": [1.0, 0.0, 0.0], "the bird": [0.0, 1.0, 0.0],  # centre (1, 1, 0) / sqrt 2
        "a boat": [0.0, 30.0, 0.0], "the boat": [0.0, 2.0, 0.0],  # centre (0, 1, 0)
        "a cat": [0.0, 0.0, 5.0], "the cat": [0.0, 7.0, 0.0],  # centre (0, 1, 1) / sqrt 2: prompts count the same
    }  # fmt: skip
    samples = [
        {"image": [[1.0, 0.2, 0.0]], "class": "bird"},  # .85 bird, .2 boat: right
        {"image": [[1.0, 0.0, 0.0]], "class": "bird"},  # right
        {"image": [[0.0, 1.0, 0.0]], "class": "bird"},  # boat: wrong
        {"image": [[0.0, 1.0, 0.1]], "class": "boat"},  # right
        {"image": [[0.0, 0.5, 1.0]], "class": "cat"},  # 1.06 cat against .5: right
        {"image": [[1.0, 0.0, 1.0]], "class": "cat"},  # a tie of bird and cat: wrong
        {"image": [[0.0, 1.0, 0.5]], "class": "cat"},  # 1.06 cat, 1 boat: right; wrong if lengths of prompts counted
        {"image": [[0.0, 1.0, 0.5]]},  # no class: left out
        {"class": "cat"},  # no picture: left out
    ]
    task = ZeroShot(ZeroShot.Config.model_validate_json('{"templates": ["a {}", "the {}"]}'))
    scores = task.run(Look(words), [as_set(tmp_path, samples)])  # type: ignore[arg-type]
    assert scores["data/classes"] == 3
    assert scores["data/top1"] == pytest.approx(100 * 5 / 7)
    assert scores["data/mean_per_class"] == pytest.approx(100 * (2 / 3 + 1 + 2 / 3) / 3)
    assert "top5" not in scores, "of three classes it would be 100"
    assert task.note() == "percent; 3 classes, chance top1 33.3"


def test_zero_shot_top5_and_sets(tmp_path: Path) -> None:
    """Eight classes in a row: a picture at the place of class i has class j at rank |i - j|-ish. Averages over sets."""
    words = {f"c{i}": [float(np.cos(i / 10)), float(np.sin(i / 10))] for i in range(8)}
    at = [words[f"c{i}"] for i in range(8)]
    first = as_set(tmp_path, [{"image": [at[0]], "class": f"c{i}"} for i in range(8)], "first")
    second = as_set(tmp_path, [{"image": [at[i]], "class": f"c{i}"} for i in range(8)], "second")
    scores = ZeroShot(ZeroShot.Config()).run(Look(words), [first, second])  # type: ignore[arg-type]
    assert scores["first/top1"] == scores["first/mean_per_class"] == 12.5
    assert scores["first/top5"] == 62.5
    assert scores["second/top1"] == 100.0
    assert (scores["top1"], scores["top5"]) == (56.25, 81.25)


def test_zero_shot_without_classes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample has a field 'class'"):
        ZeroShot(ZeroShot.Config()).run(Look(), [as_set(tmp_path, [{"image": [[1.0]]}])])  # type: ignore[arg-type]


class Store(Evaluation):
    """Keeps the embeddings that evaluations work on."""

    name = "store"
    Config = ComponentConfig
    seen: ClassVar[list[dict[str, Tensor]]] = []

    def run(self, model: Model, sets: Sequence[EvaluationSet]) -> dict[str, float]:
        self.seen.append({m: sets[0].embeddings(model, m)[0] for m in model.modalities})
        return {"M": 1.0}


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
    with pytest.raises(UserError, match="no features 'class_tokens'; there are 'embedding' and 'class_token'"):
        model.encode("image", pictures, features="class_tokens")


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
    plain = model.augment["image"].plain

    def slow(item: Any) -> Any:
        names.add(threading.current_thread().name)
        time.sleep(0.001 * (id(item) % 7))
        return plain(item)

    for module in ("distill_core.model", "distill_core.evaluate.sets"):
        monkeypatch.setattr(f"{module}.reading_threads", lambda device: 3)
    monkeypatch.setattr(model.augment["image"], "plain", slow)
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
    with pytest.raises(UserError, match=r"this run trained no teacher of 'image'"):
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
    assert result.scores == {}
    assert result.failed == ["the data source has no split 'test'"]
    assert "not evaluated: the data source has no split 'test'" in capsys.readouterr().err
