"""Views made again to be looked at, sheets of them, and what a retrieval shows of itself."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tars import write_tar
from torch.nn.functional import normalize

from distill_core.batch import View
from distill_core.contracts.media import Distribution, Picture
from distill_core.data.lengths import measure
from distill_core.data.loader import Loader
from distill_core.data.shard import PATIENCE, Shards
from distill_core.data.tar_shards import TarShard
from distill_core.evaluate.sets import EvaluationSet
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_core.run.environment import environment, git_state
from distill_core.run.showcase import Showcase, sheet, words
from distill_tasks.retrieval import Retrieval, RetrievalConfig
from distill_vl.tokenizer import ClipTokenizer


@pytest.mark.slow
def test_a_showcase_shows_what_training_saw(tiny_recipe: Path, registry: Registry) -> None:
    """Against the batches of the loader: would catch views of another seed, epoch or sample."""
    recipe = load_recipe(tiny_recipe, registry=registry)
    shards = [TarShard(path) for path in sorted((tiny_recipe.parent / "shards").glob("train-*.tar"))]
    made = Showcase(recipe, shards, 3).media(epoch=0)
    assert [picture.context["sample"] for picture in made] == ["train-0-0", "train-1-0", "train-2-0"]
    seen: dict[str, list[torch.Tensor]] = {}
    batches = iter(Loader(recipe, shards, measure(shards, PATIENCE)))
    for _ in range(3):  # one epoch: 12 samples in batches of 4
        batch = next(batches)
        for i, key in enumerate(batch.keys):
            seen[key] = [ids for group in batch.views["text"].groups for ids in group.x[:, i]]
    for picture in made:
        texts = [line.split(": ", 1)[1] for line in picture.caption.splitlines()[1:]]
        assert len(texts) == 3
        for text, ids in zip(texts, seen[picture.context["sample"]], strict=True):
            whole = ClipTokenizer()([text])[0]  # the batch is cut to its longest text
            assert torch.equal(whole[: len(ids)], ids)
            assert not whole[len(ids) :].any()
    assert [p.caption for p in Showcase(recipe, shards, 3).media(1)] != [p.caption for p in made]


def test_a_showcase_passes_over_bad_samples(
    tiny_recipe: Path, registry: Registry, write_shards: Callable[..., list[Path]]
) -> None:
    bad = {(0, 0): {"png": b"no", "txt": b"a"}, (0, 1): {"txt": b"a"}}
    shards = write_shards(tiny_recipe.parent / "bad", 1, 4, replace=bad)
    made = Showcase(load_recipe(tiny_recipe, registry=registry), [TarShard(path) for path in shards], 8).media(0)
    assert [picture.context["sample"] for picture in made] == ["train-0-2", "train-0-3"]


def test_show_gives_back_the_picture(registry: Registry) -> None:
    """Would catch a view shown in normalised colours. A round trip through float32 is exact for bytes."""
    cls = registry.get("augmentation", "multi_crop").cls
    augmentation: Any = cls(cls.Config(size=24))  # type: ignore[call-arg]
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(augmentation.render(augmentation.eval_view(pixels))), pixels)
    text: Any = registry.get("augmentation", "text_crop").cls
    assert text(text.Config()).render(View("a red bird")) == "a red bird"
    assert text(text.Config()).render(View(torch.zeros(3))) is None


def test_a_sheet() -> None:
    """Would catch pictures that lie upon one another or outside, lose their relative sizes, and texts not drawn."""
    red, blue = Image.new("RGB", (48, 48), "red"), Image.new("RGB", (24, 24), "blue")
    page = np.asarray(sheet([("large", [red] * 9), ("small", [blue] * 2), ("words", ["a long text " * 30])]))
    assert page.shape[1] == 640
    count = {name: int((page == colour).all(-1).sum()) for name, colour in (("r", (255, 0, 0)), ("b", (0, 0, 255)))}
    assert count == {"r": 9 * 96 * 96, "b": 2 * 48 * 48}
    below = page[np.flatnonzero((page == (0, 0, 255)).all(-1).any(1)).max() + 1 :]
    ink = np.flatnonzero((below < 128).all(-1).any(1))
    assert len(ink) > 20, "several lines of text"
    wide = np.asarray(sheet([("one", [Image.new("RGB", (512, 256), "red")])]))
    assert int((wide == (255, 0, 0)).all(-1).sum()) == 96 * 48
    assert words("k", {"a": [red], "b": ["x", "y"]}) == "k\nb: x\nb: y"


class Given:
    """A modality whose items are vectors, named in the sample's json, and shown as words."""

    def __init__(self, name: str) -> None:
        self.name = name

    def decode(self, sample: Any, field: str | None = None) -> list[Any]:
        return json.loads(sample["json"])[self.name]

    def eval_view(self, item: Any) -> View:
        return View(item)

    def render(self, view: View) -> str:
        return f"{self.name} {view.data}"


class Look:
    """A model that encodes a vector as itself."""

    modalities = ("a", "b")
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.augment = {name: Given(name) for name in self.modalities}

    def encode(self, modality: str, items: Any, *, features: str = "embedding") -> torch.Tensor:
        return normalize(torch.tensor(list(items), dtype=torch.float32), dim=-1)


def test_what_a_retrieval_shows(tmp_path: Path) -> None:
    """By hand: two samples, the second with two items on the b side; `+` marks the query's own."""
    samples = [({"a": [[1, 0]], "b": [[1, 0]]}, "k0"), ({"a": [[0, 1]], "b": [[3, 4], [0, 1]]}, "k1")]
    shard = write_tar(tmp_path / "s.tar", [(key, {"json": json.dumps(content).encode()}) for content, key in samples])
    here, model = EvaluationSet("here", Shards([TarShard(shard)])), Look()
    task = Retrieval(RetrievalConfig())
    made = list(task.media(model, [here], 2))  # type: ignore[arg-type]
    values = {item.context["pairs"]: sorted(item.values.tolist()) for item in made if isinstance(item, Distribution)}
    assert values == {"positive": pytest.approx([0.8, 1, 1]), "negative": pytest.approx([0, 0, 0.6])}
    pictures = [item for item in made if isinstance(item, Picture)]
    assert [(p.name, p.context["sample"]) for p in pictures] == [
        ("a_to_b", "k0"), ("a_to_b", "k1"), ("b_to_a", "k0"), ("b_to_a", "k1"),
    ]  # fmt: skip
    assert pictures[1].caption.splitlines() == [
        "k1",
        "a: a [0, 1]",
        "nearest b: 1.00 +, 0.80 +, 0.00: 1.00 +  b [0, 1]",
        "nearest b: 1.00 +, 0.80 +, 0.00: 0.80 +  b [3, 4]",
        "nearest b: 1.00 +, 0.80 +, 0.00: 0.00  b [1, 0]",
    ]


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a wrong commit, a change that is not noticed, and any variable of the environment in it."""
    monkeypatch.setenv("DISTILL_TEST_TOKEN", "s3cret-value")
    assert git_state(str(tmp_path)) is None
    commands = ["init -q", "config user.email a@b.c", "config user.name n"]
    (tmp_path / "f").write_text("1")
    for command in [*commands, "add f", "commit -q -m one"]:
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    head = (tmp_path / ".git" / (tmp_path / ".git" / "HEAD").read_text().split()[1]).read_text().strip()
    assert git_state(str(tmp_path)) == {"commit": head, "dirty": False}
    (tmp_path / "f").write_text("2")
    assert git_state(str(tmp_path)) == {"commit": head, "dirty": True}
    facts = environment(torch.device("cpu"), ["pluggy", "no-such-package"])
    assert "pluggy" in facts["versions"]
    assert "no-such-package" not in facts["versions"]
    assert "s3cret-value" not in json.dumps(facts)
