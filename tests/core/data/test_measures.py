"""What a run says of its data when it starts: measured in the workers, of the samples that train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

import pytest

from distill_core.data import batches
from distill_core.data.lengths import measure
from distill_core.data.loader import Loader
from distill_core.data.shard import PATIENCE
from distill_core.data.tar_shards import TarShard
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_core.run.folder import RunFolder
from distill_core.train import Trainer

Said = Callable[..., str]


@pytest.fixture
def said(tiny_recipe: Path, registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Said:
    """What a run of the tiny recipe with these overrides prints."""

    def run(*overrides: str) -> str:
        recipe = load_recipe(tiny_recipe, registry=registry, overrides=["evaluate=null", *overrides])
        Trainer(recipe, RunFolder.create(tmp_path / "runs", recipe)).run()
        return " ".join(capsys.readouterr().err.split())

    return run


def one_caption(write_shards: Callable[..., list[Path]], folder: Path, text: str) -> None:
    """The tiny recipe's shards, every caption the same."""
    pictures = write_shards(folder.parent / "other", 1, 1)
    import tarfile

    with tarfile.open(pictures[0]) as tar:
        member = tar.extractfile("train-0-0.png")
        assert member is not None
        picture = member.read()
    fields: Mapping[str, bytes] = {"png": picture, "txt": text.encode()}
    write_shards(folder, 3, 4, replace={(i, j): fields for i in range(3) for j in range(4)})


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_says_how_many_captions_and_sentences(said: Said, workers: int) -> None:
    """Catches a line that is not printed, is printed each step, or counts the same samples twice."""
    lines = said(f"data.workers={workers}", "train.steps=3")
    assert lines.count("data: text: 1.0 captions a sample, 3.0 sentences a caption (of 12 samples)") == 1
    assert "much the same" not in lines
    assert "data: image" not in lines


@pytest.mark.parametrize(
    ("augment", "warned"),
    [
        ("text_crop", True),
        ("sentence_crop", True),
        ("sampled_captions", True),
        ("sub_captions", True),
        ("caption", False),
    ],
)
def test_captions_of_one_sentence_are_warned_of(
    said: Said, write_shards: Callable[..., list[Path]], tmp_path: Path, augment: str, warned: bool
) -> None:
    """All text views of COSMOS were alike, without a word."""
    one_caption(write_shards, tmp_path / "shards", "a photo of a red boat")
    only = ["loss=[{name: contrastive}]", "fusion=null", "teacher=null", "train.steps=1"]
    lines = said(*only, f"augment.text={{name: {augment}}}")
    assert "data: text: 1.0 captions a sample, 1.0 sentences a caption (of 4 samples)" in lines
    warning = f"warning: augment.text: {augment} cuts its texts out of a sample's sentences, and there are 1.0 a sample"
    assert (warning in lines) == warned


@pytest.mark.parametrize("text", ["a red boat\nby the sea", "\u4e00\u53ea\u732b\u3002\u5b83\u5750\u7740\u3002"])
def test_lines_and_chinese_sentences_are_counted(
    said: Said, write_shards: Callable[..., list[Path]], tmp_path: Path, text: str
) -> None:
    one_caption(write_shards, tmp_path / "shards", text)
    lines = said("train.steps=1")
    assert "2.0 sentences a caption" in lines
    assert "much the same" not in lines


def test_a_worker_measures_its_first_samples_alone(
    tiny_recipe: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches captions that are read twice through the whole run."""
    monkeypatch.setattr(batches, "MEASURED", 6)
    shards = [TarShard(path) for path in sorted((tiny_recipe.parent / "shards").glob("train-*.tar"))]
    loader = Loader(load_recipe(tiny_recipe, registry=registry), shards, measure(shards, PATIENCE))
    came = list(islice(loader, 4))
    assert [len(batch.measures) for batch in came] == [4, 2, 0, 0]
    assert came[0].measures[0] == {"text": {"captions": 1, "sentences": 3}}
    assert [len(batch.to("cpu").measures) for batch in came] == [4, 2, 0, 0]
