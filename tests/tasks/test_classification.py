"""Accuracies, kNN and linear probes against torchmetrics and scikit-learn, and prompt templates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from score_values import values
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from distill_core.errors import BadSample, DataError
from distill_core.evaluate.sets import EvaluationSet
from distill_tasks.classes import accuracies, confusion, confusion_picture, ranks_of_class
from distill_tasks.logistic import choose_c, fit, logits
from distill_tasks.probes import Knn, LinearProbe, TrainSet, ranks_within_class
from distill_tasks.prompts import ensembles, prompts_of, templates_of
from distill_tasks.zero_shot import ZeroShot


class Look:
    """A model that encodes a vector as itself, and a word as its entry."""

    modalities = ("image", "text")
    device = torch.device("cpu")

    def __init__(self, words: dict[str, list[float]] | None = None) -> None:
        self.augment = {name: SimpleNamespace(decode=self.reader(name)) for name in self.modalities}
        self.words, self.side = words or {}, "student"

    @staticmethod
    def reader(name: str) -> Any:
        def decode(sample: Any, field: str | None = None) -> list[Any]:
            found = json.loads(sample["json"]).get(field or name)
            if found is None:
                raise BadSample("none")
            return [found]

        return decode

    def default_features(self, modality: str) -> str:
        return "embedding"

    def encode(self, modality: str, items: Sequence[Any], *, features: str = "embedding") -> Tensor:
        rows = [self.words[item] if isinstance(item, str) else item for item in items]
        return normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)


def samples(features: Tensor, classes: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        {"__key__": str(i), "__url__": "here", "json": json.dumps({"image": x, "class": c}).encode()}
        for i, (x, c) in enumerate(zip(features.tolist(), classes, strict=True))
    ]


def clusters(per_class: int, classes: int, dim: int = 6, spread: float = 0.8) -> tuple[Tensor, Tensor]:
    """Unit vectors round the classes' centres, in a random order."""
    y = torch.arange(classes).repeat_interleave(per_class)[torch.randperm(per_class * classes)]
    return normalize(torch.randn(classes, dim)[y] + spread * torch.randn(len(y), dim), dim=-1), y


@pytest.mark.slow
def test_accuracies_against_torchmetrics() -> None:
    """Would catch the mean over classes taken over samples, classes that do not occur, and a top-5 of top-4."""
    torchmetrics = pytest.importorskip("torchmetrics")
    scores, truth = torch.randn(211, 9), torch.randint(0, 8, (211,))  # class 8 never occurs
    found = accuracies(ranks_of_class(scores, truth), truth, 9)
    for name, options in (
        ("top1", {"average": "micro"}),
        ("top5", {"average": "micro", "top_k": 5}),
        ("mean_per_class", {"average": "none"}),
    ):
        value = torchmetrics.classification.MulticlassAccuracy(num_classes=9, **options)(scores, truth)
        assert found[name] == pytest.approx(
            100 * value[torch.unique(truth)].mean().item() if value.ndim else 100 * value
        )


def test_ties_and_nan_count_against_the_model() -> None:
    nan = float("nan")
    scores = torch.tensor([[0.5, 0.5, 0.1], [0.2, 0.9, 0.9], [nan, nan, nan], [nan, 2.0, 1.0], [1.0, 2.0, nan]])
    assert ranks_of_class(scores, torch.tensor([0, 0, 1, 1, 1])).tolist() == [1, 2, 3, 1, 1]
    assert ranks_of_class(torch.tensor([[nan]]), torch.tensor([0])).tolist() == [1]


@pytest.mark.slow
def test_confusion_against_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    truth, chosen = torch.randint(0, 7, (2, 500))
    assert (confusion(truth, chosen, 7) == sklearn.confusion_matrix(truth, chosen, labels=range(7))).all()
    assert confusion(truth, chosen, 7).shape == (7, 7)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [4, 60])
def test_confusion_pictures(classes: int) -> None:
    """A matrix, and the list of pairs where there are too many classes for one; nothing where nothing is confused."""
    truth = torch.arange(classes).repeat(3)
    shifted = confusion(truth, (truth + 1) % classes, classes)
    (shown,) = confusion_picture(shifted, [f"class {i}" for i in range(classes)], "mine", "knn of the student")
    assert (shown.caption, shown.context) == ("knn of the student on mine", {"set": "mine"})
    assert shown.picture.width > 300
    assert np.asarray(shown.picture).std() > 5
    none = list(confusion_picture(confusion(truth, truth, classes), [str(i) for i in range(classes)], "mine", "knn"))
    assert len(none) == (classes == 4)


@pytest.mark.parametrize("k", [1, 7, 500])
def test_knn_against_scikit_learn(k: int) -> None:
    """The same votes: would catch a weight of the distance, a temperature that multiplies, and neighbours of another
    class's row."""
    neighbors = pytest.importorskip("sklearn.neighbors")
    x, y = clusters(30, 5)
    asked, _ = clusters(11, 5)
    task = Knn(Knn.Config.model_validate_json(json.dumps({"k": k, "temperature": 0.2})))
    votes = task.predict(TrainSet(x, y, torch.arange(len(y))), 5, asked, torch.device("cpu"))

    def weights(distance: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.exp((1 - distance**2 / 2) / 0.2)  # |a - b|^2 = 2 - 2 cos

    theirs = neighbors.KNeighborsClassifier(n_neighbors=min(k, len(x)), weights=weights).fit(x.numpy(), y.numpy())
    share = theirs.predict_proba(asked.numpy())
    torch.testing.assert_close(votes / votes.sum(1, keepdim=True), torch.tensor(share).float(), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("c", [0.3, 30.0])
def test_logistic_regression_against_scikit_learn(c: float) -> None:
    """The same minimum: would catch a penalty on the bias, and C that multiplies the mean and not the sum."""
    linear = pytest.importorskip("sklearn.linear_model")
    x, y = clusters(40, 4)
    theirs = linear.LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(x.double().numpy(), y.numpy())
    asked = normalize(torch.randn(50, 6), dim=-1)
    mine = logits(asked, fit(x, y, c, 2000)).softmax(1)
    torch.testing.assert_close(mine, torch.tensor(theirs.predict_proba(asked.numpy())).float(), rtol=0, atol=5e-3)


@pytest.mark.slow
def test_a_fit_multiplies_no_subnormal_numbers() -> None:
    """They cost some processors a hundred times what others cost: a fit of 2,786 pictures took 122 s. Classes that are
    far apart but for a few samples have probabilities down to e^-200."""
    tiny = torch.finfo(torch.float32).tiny
    seen: list[float] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                tensors = [x for x in args if isinstance(x, torch.Tensor)]
                seen.append(max(((x != 0) & (x.abs() < tiny)).float().mean().item() for x in tensors))
            return func(*args, **(kwargs or {}))

    torch.manual_seed(0)
    x, y = clusters(40, 6, spread=0.3)
    y[::40] = (y[::40] + 1) % 6
    with Watch():
        weights = fit(x, y, 1e6, 200)
    assert logits(x, weights).log_softmax(1).min() < -87.4, "nothing here that would be subnormal"
    assert len(seen) > 20
    assert max(seen) == 0


def test_a_linear_probe_shows_its_fits() -> None:
    """Would catch a bar that stands still for minutes."""
    shown: dict[str, int] = {}

    def watch(steps: Any, what: str) -> Any:
        for step in steps:
            shown[what] = shown.get(what, 0) + 1
            yield step

    rows = samples(torch.eye(3)[[0, 1] * 6], ["x", "y"] * 6)
    learned = [EvaluationSet("train", rows)]
    scored = EvaluationSet("t", rows[:4], open_split=lambda split: learned, watch=watch)
    probe = LinearProbe(LinearProbe.Config.model_validate_json('{"cs": [1.0, 10.0, 100.0]}'))
    probe.run(Look(), [scored])  # type: ignore[arg-type]
    assert shown["fits for t"] == 3


def test_c_is_chosen_on_what_is_held_out() -> None:
    """Against a sweep with scikit-learn: would catch a C chosen on what was fitted, where the largest always wins."""
    linear = pytest.importorskip("sklearn.linear_model")
    torch.manual_seed(3)
    x, y = clusters(25, 4, spread=1.5)
    held = ranks_within_class(y, 0) % 5 == 4
    cs = (0.01, 1.0, 1000.0)
    right = [linear.LogisticRegression(C=c, max_iter=5000).fit(x[~held], y[~held]).score(x[held], y[held]) for c in cs]
    assert choose_c(x, y, held, cs, 1000) == cs[int(np.argmax(right))]
    assert choose_c(x, y, torch.zeros_like(held), cs, 1000) == 1.0


def sets_of(train: list[dict[str, Any]], *tests: list[dict[str, Any]]) -> list[EvaluationSet]:
    learned = [EvaluationSet("a", train[::2]), EvaluationSet("b", train[1::2])]
    return [
        EvaluationSet(f"t{i}", test, open_split=lambda split: learned if split == "train" else [])
        for i, test in enumerate(tests)
    ]


@pytest.mark.parametrize("task", ["knn", "linear_probe"])
def test_a_probe_by_hand(task: str) -> None:
    """Two classes on two axes; one asked of three is wrong, one has a class that nothing was learned of, one has none.

    Catches sets of the train split that are not pooled, classes numbered anew in each set, and unlabelled samples that
    are scored.
    """
    eye = torch.eye(3)
    cls = {"knn": Knn, "linear_probe": LinearProbe}[task]
    train = samples(eye[[0, 1] * 5], ["x", "y"] * 5)
    first = samples(eye[[0, 0, 1]], ["x", "y", "y"])
    second = samples(eye[[0, 1, 2, 0]], ["x", "y", "z", None])
    options = {"k": 3} if task == "knn" else {}
    probe = cls(cls.Config.model_validate_json(json.dumps(options)))
    scores = values(probe.run(Look(), sets_of(train, first, second)))  # type: ignore[arg-type]
    assert scores["t0/top1"] == pytest.approx(200 / 3)
    assert scores["t0/mean_per_class"] == 75.0
    assert scores["t1/top1"] == pytest.approx(200 / 3)
    assert scores["t0/learned_from"] == 10
    assert scores["top1"] == pytest.approx(200 / 3)
    assert len(list(probe.media(Look(), [], 4))) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("learn", [None, "train"])
def test_a_sample_s_items_stay_together(learn: str | None) -> None:
    """Two equal items a sample, classes at random: catches a fold that is asked what its other item taught (100 %),
    shots that count items, and samples of two sets that share a number."""
    x = normalize(torch.randn(24, 64), dim=-1)
    data = samples(x, [i % 2 for i in range(24)])
    model = Look()
    model.augment["image"].decode = lambda sample, field=None: [json.loads(sample["json"])["image"]] * 2
    options = {"k": 1, "learn": learn, "shots": 3, "draws": 1}
    seen = []

    class Seen(Knn):
        def predict(self, taught: TrainSet, classes: int, asked: Tensor, device: torch.device) -> Tensor:
            seen.append((taught.x, taught.y, asked))
            return super().predict(taught, classes, asked, device)

    train = [EvaluationSet(name, data[:12]) for name in ("a", "b")]
    task = Seen(Knn.Config.model_validate_json(json.dumps(options)))
    scores = values(task.run(model, [EvaluationSet("s", data, open_split=lambda split: train)]))  # type: ignore[arg-type]
    assert scores["s/learned_from"] == 6, "three samples of each of two classes"
    for taught, classes, asked in seen:
        assert torch.bincount(classes).tolist() == [6, 6], "each with both of its items"
        if learn is None:
            assert ((taught @ asked.T) < 0.99).all()
    assert sum(len(asked) for _, _, asked in seen) == 48


def test_c_is_chosen_on_whole_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five items a sample: catches a C that is chosen on items whose other items were fitted."""
    held_out = []

    def spy(x: Tensor, y: Tensor, held: Tensor, *rest: Any) -> float:
        held_out.append(held)
        return choose_c(x, y, held, *rest)

    monkeypatch.setattr("distill_tasks.probes.choose_c", spy)
    x, y = clusters(10, 2)
    owners = torch.arange(20).repeat_interleave(5)
    taught = TrainSet(x[owners], y[owners], owners)
    LinearProbe(LinearProbe.Config()).predict(taught, 2, x, torch.device("cpu"))
    parts = held_out[0].view(20, 5)
    assert (parts.all(1) == parts.any(1)).all()
    assert torch.bincount(y[parts[:, 0]]).tolist() == [2, 2], "a fifth of each class's samples"


def test_features_that_are_no_numbers() -> None:
    """kNN counts them wrong; a linear classifier cannot be learned from them, and says so."""
    rows = samples(clusters(5, 2)[0], [0, 1] * 5)
    model = Look()
    encode = model.encode
    model.encode = lambda *asked, **options: encode(*asked, **options).index_fill(0, torch.tensor([3]), torch.nan)  # type: ignore[method-assign]
    options = json.dumps({"learn": None, "folds": 2})
    scores = values(Knn(Knn.Config.model_validate_json(options)).run(model, [EvaluationSet("s", rows)]))  # type: ignore[arg-type]
    assert scores["top1"] <= 90.0
    with pytest.raises(DataError, match=r"'linear_probe': training features are not finite \(NaN or infinite\)"):
        LinearProbe(LinearProbe.Config.model_validate_json(options)).run(model, [EvaluationSet("s", rows)])  # type: ignore[arg-type]


def test_folds_never_see_themselves() -> None:
    """With random labels a nearest neighbour that finds itself is always right; and each sample is asked once."""
    x = normalize(torch.randn(200, 8), dim=-1)
    data = samples(x, torch.randint(0, 2, (200,)).tolist())
    knn = Knn(Knn.Config.model_validate_json('{"k": 1, "learn": null}'))
    scores = values(knn.run(Look(), [EvaluationSet("s", data)]))  # type: ignore[arg-type]
    assert 30 < scores["top1"] < 70
    assert scores["s/learned_from"] == 160
    twice = samples(torch.cat([x, x]), [*range(200), *range(200)])
    linear = LinearProbe(LinearProbe.Config.model_validate_json('{"learn": null, "folds": 2, "cs": [1000.0]}'))
    assert values(linear.run(Look(), [EvaluationSet("s", twice)]))["top1"] > 95  # type: ignore[arg-type]


def test_few_shot_learns_from_so_many_a_class() -> None:
    """Another draw is another choice; the score is the mean over draws."""
    x, y = clusters(20, 3, spread=2.0)
    asked, truth = clusters(30, 3, spread=2.0)
    sets = sets_of(samples(x, y.tolist()), samples(asked, truth.tolist()))
    x, y = (torch.cat([part[::2], part[1::2]]) for part in (x, y))  # the train sets, one behind the other
    config = Knn.Config.model_validate_json('{"k": 2, "shots": 2, "draws": 4}')
    scores = values(Knn(config).run(Look(), sets))  # type: ignore[arg-type]
    assert scores["t0/learned_from"] == 6
    assert scores["t0/top1_std"] > 0
    each = []
    for draw in range(4):
        chosen = ranks_within_class(y, draw) < 2
        assert torch.bincount(y[chosen]).tolist() == [2, 2, 2]
        taught = TrainSet(x[chosen], y[chosen], chosen.nonzero()[:, 0])
        votes = Knn(config).predict(taught, 3, asked, torch.device("cpu"))
        each.append(accuracies(ranks_of_class(votes, truth), truth, 3)["top1"])
    assert scores["top1"] == pytest.approx(sum(each) / 4)
    assert scores["t0/top1_std"] == pytest.approx(np.std(each, ddof=1))


def test_ranks_within_class() -> None:
    """Within each class every number once, whatever the seed."""
    y = torch.randint(0, 5, (100,))
    for seed in (0, 1):
        found = ranks_within_class(y, seed)
        for c in range(5):
            assert sorted(found[y == c].tolist()) == list(range(int((y == c).sum())))
    assert (ranks_within_class(y, 0) != ranks_within_class(y, 1)).any()


def test_what_a_probe_cannot_do() -> None:
    alone = EvaluationSet("s", samples(torch.eye(3), ["a", "b", "c"]))
    with pytest.raises(DataError, match="'s' stands alone: it has no split 'train'"):
        Knn(Knn.Config()).run(Look(), [alone])  # type: ignore[arg-type]
    bare = EvaluationSet("bare", samples(torch.eye(3), [None] * 3))
    with pytest.raises(DataError, match="'bare': no sample with image and 'class'"):
        Knn(Knn.Config.model_validate_json('{"learn": null}')).run(Look(), [bare])  # type: ignore[arg-type]


def test_labels_are_read_without_a_modality() -> None:
    """From a field, or from the json; numbers are classes too."""
    given = [
        {"__key__": "0", "__url__": "u", "cls": b"3\n"},
        {"__key__": "1", "__url__": "u", "json": b'{"cls": 4}'},
        {"__key__": "2", "__url__": "u", "json": b"no json"},
        {"__key__": "3", "__url__": "u", "json": b"[]"},
        {"__key__": "4", "__url__": "u"},
        {"__key__": "5", "__url__": "u", "cls": 3},
        {"__key__": "6", "__url__": "u", "cls": 3.5},
        {"__key__": "7", "__url__": "u", "json": b'{"cls": " 3 "}'},
    ]
    here = EvaluationSet("s", given)
    assert here.labels("cls") == {0: "3", 1: "4", 5: "3", 7: "3"}
    assert sorted(here.skipped) == [("2", "cls"), ("3", "cls"), ("6", "cls")], (
        "json that cannot be read is told, no class is no fault"
    )


def test_templates(tmp_path: Path) -> None:
    assert ensembles() == ["openai", "openai_simple"]
    eighty = templates_of("openai")
    assert len(eighty) == len(set(eighty)) == 80
    assert all(template.count("{}") == 1 for template in eighty)
    assert set(templates_of("openai_simple")) < set(eighty)
    file = tmp_path / "mine.txt"
    file.write_text("# mine\na {c}.\n\nthe {}\n")
    assert templates_of(str(file)) == ["a {}.", "the {}"]
    assert prompts_of(["x", "y"], ["a {}.", "the {}"]) == ["a x.", "the x", "a y.", "the y"]
    file.write_text("a thing\n")
    for given, said in (
        (str(tmp_path / "none.txt"), "none.txt: cannot be read"),
        (str(file), r"the template 'a thing' has no \{\} for the class"),
    ):
        with pytest.raises(DataError, match=said):
            templates_of(given)


def test_templates_of_an_option() -> None:
    """One template need not be a list; a name that is none is refused with the recipe."""
    assert ZeroShot.Config.model_validate_json('{"templates": "a {}"}').templates == ("a {}",)
    for given, said in (("opnai", "no templates named 'opnai', did you mean 'openai'"), (["a"], r"has no \{\}")):
        with pytest.raises(ValueError, match=said):
            ZeroShot.Config.model_validate_json(json.dumps({"templates": given}))


def test_the_openai_templates_are_those_of_an_independent_package() -> None:
    package = pytest.importorskip("clip_benchmark")
    file = Path(package.__file__).parent / "datasets" / "en_zeroshot_classification_templates.json"
    theirs = json.loads(file.read_text())["imagenet1k"]
    assert sorted(template.replace("{c}", "{}") for template in theirs) == sorted(templates_of("openai"))


def test_zero_shot_with_files(tmp_path: Path) -> None:
    """Classes that do not occur are chosen among too, and templates come from a file."""
    (tmp_path / "classes.txt").write_text("bird\nboat\ncat\n")
    (tmp_path / "templates.txt").write_text("a {c}\n")
    words = {"a bird": [1.0, 0.0], "a boat": [0.0, 1.0], "a cat": [0.8, 0.6]}
    data = samples(torch.tensor([[1.0, 0.0], [0.9, 0.5], [0.0, 1.0]]), ["bird", "bird", "boat"])
    options = {"templates": str(tmp_path / "templates.txt")}
    for more, top1 in (({}, 100.0), ({"classes": str(tmp_path / "classes.txt")}, 200 / 3)):
        task = ZeroShot(ZeroShot.Config.model_validate_json(json.dumps(options | more)))
        scores = values(task.run(Look(words), [EvaluationSet("s", data)]))  # type: ignore[arg-type]
        assert scores["top1"] == pytest.approx(top1)
        assert scores["s/classes"] == (3 if more else 2)
        (picture,) = task.media(Look(words), [], 4)  # type: ignore[arg-type]
        assert picture.context == {"set": "s"}
    (tmp_path / "classes.txt").write_text("boat\n")
    with pytest.raises(DataError, match="does not name 1 of the classes that occur, as 'bird'"):
        task.run(Look(words), [EvaluationSet("s", data)])  # type: ignore[arg-type]


def test_what_is_learned_from_and_scored_is_told() -> None:
    """Would catch 100 % of what was learned by heart without a word, and a warning where only keys coincide."""
    x, y = torch.eye(3), ["a", "b", "c"]
    for mine, of, both in (("u", "u", 3), ("u", "v", 0)):
        learned = EvaluationSet("l", [{**row, "__url__": of} for row in samples(x, y)])
        asked = [{**row, "__url__": mine} for row in samples(torch.cat([x, x[:1]]), [*y, "a"])]
        here = EvaluationSet("s", asked, open_split=lambda split, learned=learned: [learned])  # type: ignore[misc]
        scores = values(Knn(Knn.Config()).run(Look(), [here]))  # type: ignore[arg-type]
        assert "top5" not in scores, "it would be 100 of three classes"
        lines = [line for line in here.warnings if f"{both} of 4 scored samples are in the split 'train' too" in line]
        assert (len(lines), len(here.warnings)) == ((1, 1) if both else (0, 0))


@pytest.mark.parametrize(("shots", "learn", "fewest"), [(5, "train", 2), (2, "train", None), (5, None, 1)])
def test_fewer_samples_than_shots_are_told(shots: int, learn: str | None, fewest: int | None) -> None:
    """Would catch `shots: 1000` of a class of two without a word."""
    learned = samples(torch.eye(6)[[0, 0, 0, 1, 1]], ["a", "a", "a", "b", "b"])
    asked = samples(torch.eye(6)[[0, 0, 1, 1]], ["a", "a", "b", "b"])
    here, *_ = sets_of(learned, asked)
    knn = Knn(Knn.Config.model_validate_json(json.dumps({"shots": shots, "learn": learn, "folds": 2})))
    knn.run(Look(), [here])  # type: ignore[arg-type]
    told = [line for line in here.warnings if "`shots: " in line]
    if fewest is None:
        assert not told
    else:
        (line,) = told
        assert f"'knn': `shots: 5`, but the smallest class has {fewest} sample" in line
    assert knn.note() == "percent; 2 classes, chance top1 50; means of 3 draws"
