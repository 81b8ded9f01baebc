"""Retrieval and zero-shot scores against brute force and by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from score_values import values
from tars import write_tar
from torch import Tensor
from torch.nn.functional import normalize

from distill_core.data.shard import Shards
from distill_core.data.tar_shards import TarShard
from distill_core.errors import BadSample, DataError
from distill_core.evaluate.sets import EvaluationSet
from distill_tasks.retrieval import Retrieval
from distill_tasks.zero_shot import ZeroShot

Vector = list[float]


class Given:
    """In place of a modality's augmentation: its items are vectors (or words) that the sample's json holds."""

    def __init__(self, name: str) -> None:
        self.name = name

    def decode(self, sample: Any, field: str | None = None) -> list[Any]:
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
    path = write_tar(
        folder / f"{name}.tar",
        [(f"s{i:04d}", {"json": json.dumps(sample).encode()}) for i, sample in enumerate(samples)],
    )
    return EvaluationSet(name, Shards([TarShard(path)]))


def retrieve(model: Any, *sets: EvaluationSet, **options: Any) -> dict[str, float]:
    return values(Retrieval(Retrieval.Config.model_validate_json(json.dumps(options))).run(model, sets))


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
        shot = values(ZeroShot(ZeroShot.Config()).run(model, [as_set(tmp_path, samples)]))  # type: ignore[arg-type]
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
    scores = values(task.run(Look(words), [as_set(tmp_path, samples)]))  # type: ignore[arg-type]
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
    scores = values(ZeroShot(ZeroShot.Config()).run(Look(words), [first, second]))  # type: ignore[arg-type]
    assert scores["first/top1"] == scores["first/mean_per_class"] == 12.5
    assert scores["first/top5"] == 62.5
    assert scores["second/top1"] == 100.0
    assert (scores["top1"], scores["top5"]) == (56.25, 81.25)


def test_zero_shot_without_classes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample has a field 'class'"):
        ZeroShot(ZeroShot.Config()).run(Look(), [as_set(tmp_path, [{"image": [[1.0]]}])])  # type: ignore[arg-type]
