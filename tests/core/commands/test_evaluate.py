"""`distill eval`: a checkpoint's file, embeddings that are kept, pictures, tasks with benchmarks of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from score_values import reported

from distill_core.cli import main
from distill_core.errors import RecipeErrors
from distill_core.evaluate import sets
from distill_core.model import Model
from distill_core.objective import Objective
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import load_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_core.train import Trainer

Score = Callable[..., dict[str, float]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, registry: Registry, write_shards: Callable[..., list[Path]]) -> Path:
    """A run of two steps with a checkpoint at each, beside its shards and a folder of two classes."""
    from tests.conftest import RECIPE

    folder = tmp_path_factory.mktemp("eval")
    for prefix in ("train", "validation", "test"):
        write_shards(folder / "shards", 1, 6, prefix=prefix)
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name, channel in (("red", 0), ("blue", 2)):
            (folder / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 90, (16, 16, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    (folder / "r.yaml").write_text(RECIPE.format(folder=folder / "shards"))
    overrides = ["train.steps=2", "train.checkpoint.every=1", "name=tiny"]
    recipe = load_recipe(folder / "r.yaml", registry=registry, overrides=overrides)
    made = RunFolder.create(folder / "runs", recipe)
    Trainer(recipe, made, quiet=True).run()
    return made.path


@pytest.fixture
def score(capsys: pytest.CaptureFixture[str]) -> Score:
    def score(*arguments: Any) -> dict[str, float]:
        main(["eval", *map(str, arguments), "--json"])
        return reported(json.loads(capsys.readouterr().out))

    return score


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modality of each call of a model's `encode` by a set."""
    calls: list[str] = []
    encode = Model.encode

    def counted(self: Model, modality: str, items: Any, **features: Any) -> Any:
        calls.append(modality)
        return encode(self, modality, items, **features)

    monkeypatch.setattr(sets.Model, "encode", counted)
    return calls


@pytest.mark.slow
def test_a_checkpoint_s_file_is_a_run(run: Path, score: Score) -> None:
    """Catches the last checkpoint scored in place of the one that was named."""
    for name, option in (("step-00000001.pt", "1"), ("step-00000002.pt", "last")):
        by_file = score(run / "checkpoints" / name, "--no-cache")
        assert by_file == score(run, "--checkpoint", option, "--no-cache")
    report = json.loads((run / "report.json").read_text())
    assert by_file == pytest.approx(reported(report["scores"]))


@pytest.mark.slow
def test_embeddings_are_kept_until_something_changes(
    run: Path, score: Score, encoded: list[str], write_shards: Callable[..., list[Path]]
) -> None:
    """Catches a cache of another checkpoint, field, side or preparation, and one that is stale or grows."""
    first = score(run, "--split", "validation")
    assert sorted(encoded) == ["image", "image", "text", "text"]
    encoded.clear()
    assert score(run, "--split", "validation") == first
    assert encoded == []
    others = score(run, "--split", "validation", "--checkpoint", "1")
    assert sorted(encoded) == ["image", "image", "text", "text"]
    assert others == score(run, "--split", "validation", "--checkpoint", "1", "--no-cache")
    kept = len(list((run / "embeddings").glob("*.safetensors")))
    encoded.clear()
    score(run, "--split", "validation", "--set", "augment.image.background=[0, 0, 0]")
    assert encoded == ["image", "image"]
    write_shards(run.parents[1] / "shards", 1, 6, prefix="validation", seed=7)
    encoded.clear()
    changed = score(run, "--split", "validation")
    assert len(encoded) == 4
    assert changed == score(run, "--split", "validation", "--no-cache")
    assert len(list((run / "embeddings").glob("*.safetensors"))) == kept, "what nobody will read again is removed"
    for path in (run / "embeddings").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:40])
    assert score(run, "--split", "validation") == changed, "a file that was cut off is made again"


@pytest.mark.parametrize("which", ["best", "last"])
def test_a_checkpoint_that_is_replaced_while_it_is_read(
    run: Path, tmp_path: Path, score: Score, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """A run that trains saves another between any two looks at its folder. Catches embeddings of one checkpoint that
    are kept under the other's name: wrong scores from then on."""
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "embeddings", ignore_errors=True)
    checkpoints = Checkpoints(copy, keep=1)
    first, second = checkpoints.read("1"), checkpoints.read("2")
    for name, value in second["objective"].items():  # far from the first
        if name.endswith("weight"):
            second["objective"][name] = torch.randn_like(value)
    checkpoints.path(2).unlink()
    checkpoints.save(1, first, best=True)

    def late(recipe: Recipe) -> Objective:
        checkpoints.save(2, second, best=True)
        return build_objective(recipe)

    with monkeypatch.context() as patch:
        patch.setattr("distill_core.commands.evaluate.build_objective", late)
        of_first = score(copy, "--checkpoint", which)
    assert checkpoints.steps() == [2]
    of_second = score(copy, "--checkpoint", which)
    assert of_second == score(copy, "--checkpoint", which, "--no-cache")
    assert of_first == score(run, "--checkpoint", "1", "--no-cache")
    assert of_first != of_second


def test_a_class_token_is_kept_apart_from_the_embedding(run: Path, score: Score, encoded: list[str]) -> None:
    """Catches a probe that is handed what another one asked for."""
    task = "{{name: knn, id: {0}, learn: null, folds: 2, label: __key__, features: {0}}}"
    tasks = ("--task", task.format("embedding"), "--task", task.format("class_token"))
    asked = (*tasks, "--set", "augment.image.size=24")
    score(run, *asked)
    assert encoded == ["image"] * 4, "two sides, two kinds of features"
    encoded.clear()
    score(run, *asked)
    assert encoded == []


@pytest.mark.slow
def test_pictures_and_kept_scores(run: Path, score: Score, tmp_path: Path) -> None:
    found = score(run, "--pictures", tmp_path / "seen")
    drawn = {path.name for path in (tmp_path / "seen").glob("*.png")}
    assert {"retrieval_similarity-student-data.png", "retrieval_similarity-teacher-data.png"} <= drawn
    assert sum(name.startswith("retrieval_image_to_text-student") for name in drawn) == 4
    for path in (tmp_path / "seen").glob("*.png"):
        assert Image.open(path).width >= 300
    kept = sorted((run / "evaluations").glob("00000002-test-*.json"))
    documents = [json.loads(path.read_text()) for path in kept]
    assert found in [reported(document["scores"]) for document in documents]
    before = len(kept)
    score(run)
    assert len(list((run / "evaluations").glob("00000002-test-*.json"))) == before, "the same question, one file"
    score(run, "--set", "augment.image.background=[9, 9, 9]")
    now = list((run / "evaluations").glob("00000002-test-*.json"))
    assert len(now) == before + 1, "another question"
    given = [json.loads(path.read_text())["overrides"] for path in now]
    assert given.count(["augment.image.background=[9, 9, 9]"]) == 1


@pytest.mark.slow
def test_tasks_on_a_folder_of_classes(
    run: Path, score: Score, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """kNN and the linear probe tell red from blue; a broken picture is named and costs nothing else."""
    base = run.parents[1]
    (base / "test" / "red" / "broken.png").write_bytes(b"no picture")
    source = f"{{name: class_folder, train: {base / 'train'}, test: {base / 'test'}}}"
    tasks = [f"{{name: {name}, source: {source}}}" for name in ("knn", "linear_probe", "zero_shot")]
    scores = score(run, *(part for task in tasks for part in ("--task", task)), "--pictures", tmp_path)
    assert scores["student/knn/top1"] == scores["student/linear_probe/top1"] == 100.0
    assert scores["student/knn/test/learned_from"] == 8
    assert "warning: evaluation set" not in capsys.readouterr().err
    again = f"{{name: knn, source: {{name: class_folder, train: {base / 'test'}, test: {base / 'test'}}}}}"
    main(["eval", str(run), "--task", again])
    seen = capsys.readouterr()
    assert seen.err.count("9 scored samples are in the split 'train' too") == 1, "once, of student and teacher"
    assert "knn: percent; 2 classes, chance top1 50\n" in seen.out
    assert "scoring knn (teacher, test)\n" in seen.err
    assert scores["student/zero_shot/test/classes"] == 2
    assert (tmp_path / "knn_confusion-teacher-test.png").is_file()
    newest = max((run / "evaluations").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    assert {one["key"] for one in json.loads(newest.read_text())["skipped"]} == {"red/broken.png"}
    (base / "test" / "red" / "broken.png").unlink()


def test_captions_are_items_by_themselves(run: Path, score: Score) -> None:
    """Three captions of each of four pictures: would catch captions that are joined into one text."""
    base = run.parents[1]
    rows = [f"test/{name}/{i}.png,{name} {i} {j}" for name in ("red", "blue") for i in range(2) for j in range(3)]
    (base / "pairs.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    scores = score(run, "--task", f"{{name: retrieval, source: {{name: table, test: {base / 'pairs.csv'}}}}}")
    assert scores["student/retrieval/pairs/candidates"] == 12
    assert 1 <= scores["student/retrieval/pairs/text_to_image/median_rank"] <= 4


@pytest.mark.slow
def test_a_finished_run_is_not_scored_again(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`distill resume`. Would catch one that is left without its evaluation, or without steps that were added."""
    copy = shutil.copytree(run, tmp_path / "run")
    before = (copy / "report.json").read_bytes()
    main(["resume", str(copy)])
    seen = capsys.readouterr()
    said = f"{copy}: finished at step 2; its scores: {copy}/report.json. Score it again with: distill eval {copy}\n"
    assert (seen.err, seen.out) == (said, "")
    assert (copy / "report.json").read_bytes() == before
    (copy / "report.json").unlink()
    main(["resume", str(copy)])
    assert json.loads((copy / "report.json").read_text())["scores"] == json.loads(before)["scores"]
    recipe = (copy / "recipe.yaml").read_text()
    # a pass is 6 samples, a step 4
    for steps, epochs, made in ((3, "null", 3), ("null", 3, 4), ("null", 4, 6)):
        length = f"steps: {steps}\n  epochs: {epochs}"
        (copy / "recipe.yaml").write_text(recipe.replace("steps: 2\n  epochs: null", length))
        main(["resume", str(copy)])
        assert json.loads((copy / "report.json").read_text())["steps"] == made
        capsys.readouterr()
        main(["resume", str(copy)])
        assert f"finished at step {made}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("RUN/checkpoints/step-7.pt",), "no checkpoint '7'; there are 1, 2"),
        (("elsewhere.pt",), "elsewhere.pt: a checkpoint is scored with its run's recipe"),
        (("RUN", "--checkpoint", "\u00b2"), "no checkpoint '\u00b2'; there are 1, 2"),
        (("RUN/checkpoints/step-1.pt", "--checkpoint", "2"), "is already a checkpoint"),
        (("RUN", "--pictures", "RUN/recipe.yaml"), "pictures cannot be written"),
        (
            ("RUN", "--task", "{name: knn, source: {name: urban1k, folder: x}}"),
            "'knn' learns from the split 'train': evaluate.tasks.0.source has no split 'train' (it has test)",
        ),
        (
            ("RUN", "--task", "knn", "--split", "train"),
            "--split: evaluate.split: 'knn' learns from the split 'train' that it would be scored on",
        ),
        (
            ("RUN", "--task", "{name: knn, learn: validation}", "--set", "evaluate.every=1"),
            "evaluate.validation: 'knn' learns from the split 'validation' that it would be scored on",
        ),
        (
            ("RUN", "--task", "{name: retrieval, source: {name: urban1k, folder: /none}}"),
            "/none: no such folder; expected image/NAME.jpg and caption/NAME.txt",
        ),
        (
            ("RUN", "--task", "{name: zero_shot, templates: opnai}"),
            "no templates named 'opnai', did you mean 'openai'?",
        ),
        (("RUN", "--task", "zero_shot"), "no sample has a field 'class'"),
    ],
)
def test_mistakes(run: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["eval", *(argument.replace("RUN", str(run)) for argument in arguments)])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_a_recipe_whose_data_cannot_be_learned_from(tiny_recipe: Path, registry: Registry) -> None:
    """Said before a run starts; with `learn: null` nothing is needed."""
    own = "source: {name: table, test: x.csv}"
    with pytest.raises(RecipeErrors, match=r"'linear_probe' learns from the split 'train': .*\(it has test\)"):
        load_recipe(tiny_recipe, registry=registry, overrides=[f"evaluate.tasks=[{{name: linear_probe, {own}}}]"])
    load_recipe(
        tiny_recipe, registry=registry, overrides=[f"evaluate.tasks=[{{name: linear_probe, learn: null, {own}}}]"]
    )
