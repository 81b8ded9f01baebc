"""What a stranger's loss may read beside features: extras of views, and fields of samples (`data.fields`)."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from distill_authoring.conformance import assert_conforms
from distill_core import ConformanceCase, Loss, LossConfig, Needs, Outputs, Plan, Sample, View
from distill_core.contracts.cases import ConformanceCases
from distill_core.data.fields import FieldConfig
from distill_core.errors import AbsentModality, BadSample, RecipeErrors
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Entry, Registry
from distill_core.run.folder import RunFolder
from distill_core.train import Trainer
from distill_vl.caption import WholeCaption

SEEN: list[dict[str, Any]] = []


class CountedCaption(WholeCaption):
    """The caption, and how many words it has."""

    name = "counted_caption"

    @classmethod
    def extras(cls, config: Any) -> tuple[str, ...]:
        return ("words",)

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        return [
            View(view.data, view.role, extra={"words": len(view.data.split())})
            for view in super().train_views(sample, rng)
        ]


class ByWords(Loss):
    """Longer captions weigh more; pictures' crops are read, too."""

    name = "by_words"
    partial = True

    @classmethod
    def needs(cls, config: LossConfig, plan: Plan) -> Needs:
        return Needs(student=("text",), extra={"text": ("words",), "image": ("box",)}, embeddings=("text",))

    def units(self) -> Sequence[torch.nn.Module]:
        return ()  # it reads values on the host

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        words = outputs.views["text"].groups[0].extra["words"][0].float()  # [B]
        box = outputs.views["image"].groups[0].extra["box"].float()
        text = outputs.student["text"].pooled[0].float()
        SEEN.append({"words": words.tolist(), "box": tuple(box.shape)})
        return {"by_words": (words * text.square().mean(-1)).mean() + 0 * box.sum()}, {}


class Labelled(Loss):
    """A head's cross-entropy against the samples' labels."""

    name = "labelled"
    partial = True

    def __init__(self, config: LossConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.head = torch.nn.Linear(plan.modalities["image"].spec.dim, 10)

    @classmethod
    def needs(cls, config: LossConfig, plan: Plan) -> Needs:
        return Needs(student=("image",), fields=("label", "stored"))

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        labels, stored = outputs.fields["label"], outputs.fields["stored"]
        SEEN.append({"labels": list(zip(outputs.keys, labels.tolist(), strict=True)), "stored": stored.clone()})
        logits = self.head(outputs.student["image"].embedding[0])
        return {"labelled": torch.nn.functional.cross_entropy(logits, labels)}, {}


def some_extra(config: Any, modality: str, name: str, size: tuple[int, int]) -> Tensor:
    return torch.ones(*size, 4) if name == "box" else 1.0 + torch.arange(size[0] * size[1]).view(size)


CASES = ConformanceCases(
    [
        ConformanceCase(ByWords, extra=some_extra),
        ConformanceCase(Labelled, field=lambda config, name, count: torch.arange(count) % 10),
    ]
)


@pytest.fixture(scope="module")
def strangers(registry: Registry) -> Registry:
    mine = (CountedCaption, ByWords, Labelled)
    return Registry([*registry.entries.values(), *(Entry(cls, "mine", "mine") for cls in mine)])


def fields_of(number: int, **others: bytes) -> dict[str, bytes]:
    """A sample's members: a picture, a caption, a label, and a vector of its own."""
    file, array = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.full((20, 20, 3), 10 * number, np.uint8)).save(file, "PNG")
    np.save(array, np.array([[number, 0.5]]))
    text = " ".join(["boat"] * (number + 1))
    return {
        "png": file.getvalue(),
        "txt": text.encode(),
        "cls": str(number).encode(),
        "npy": array.getvalue(),
        **others,
    }


@pytest.fixture
def trainer(
    tiny_recipe: Path, strangers: Registry, tmp_path: Path, write_shards: Callable[..., list[Path]]
) -> Callable[..., Trainer]:
    """A run on 8 samples: 0 to 6, of which the last has no label, and one whose label is none."""
    samples: dict[tuple[int, int], dict[str, bytes]] = {(0, i): fields_of(i) for i in range(7)}
    del samples[0, 6]["cls"]
    samples[0, 7] = fields_of(7, cls=b"seven")
    (shard,) = write_shards(tmp_path / "own", 1, 8, prefix="own", replace=samples)

    def make(*overrides: str, workers: int = 0) -> Trainer:
        recipe = load_recipe(
            tiny_recipe, registry=strangers,
            overrides=[
                f"data.source={{name: webdataset, urls: {shard}}}", "fusion=null", "teacher=null", "evaluate=null",
                "data.max_bad_fraction=1", f"data.workers={workers}", "train.steps=6", *overrides,
            ],
        )  # fmt: skip
        SEEN.clear()
        return Trainer(recipe, RunFolder.create(tmp_path / "runs", recipe), quiet=True)

    return make


LABELS = ("loss=[{name: labelled}]",
          "data.fields={label: {member: cls, dtype: int64}, stored: {member: npy, shape: [2]}}")  # fmt: skip


def test_a_loss_reads_extras_that_the_collator_knows_nothing_of(trainer: Callable[..., Trainer]) -> None:
    """Would catch extras that a text tower's collator drops, and those of other samples."""
    made = trainer("augment.text={name: counted_caption}", "loss=[{name: by_words}, {name: clip}]")
    made.run()
    assert {words for seen in SEEN for words in seen["words"]} <= set(map(float, range(1, 9)))
    assert len({words for seen in SEEN for words in seen["words"]}) > 4
    assert {seen["box"] for seen in SEEN} == {(2, 4, 4)}


def test_a_recipe_in_which_nobody_makes_them_is_refused(trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(RecipeErrors, match=r"'by_words' needs the extra 'words' of views of 'text'.*: box, flip"):
        trainer("loss=[{name: by_words}]")


def test_the_checks_know_extras() -> None:
    assert_conforms(CountedCaption)
    assert_conforms(ByWords, cases=CASES)
    assert_conforms(Labelled, cases=CASES)


def test_a_loss_reads_fields_by_sample(trainer: Callable[..., Trainer]) -> None:
    """Would catch a label beside another's sample. What lacks a field, or has another thing there, is skipped."""
    made = trainer(*LABELS)
    made.run()
    for seen in SEEN:
        for (key, label), stored in zip(seen["labels"], seen["stored"], strict=True):
            assert key == f"own-0-{label}"
            assert stored.tolist() == [label, 0.5]
    skipped = (made.folder.path / "skipped.jsonl").read_text()
    assert "data.fields.label: no cls" in skipped
    assert "data.fields.label: cls is no int64 of shape []" in skipped


def test_a_field_may_be_absent(trainer: Callable[..., Trainer]) -> None:
    """Would catch a sample without a label that is taken for one of class 0."""
    made = trainer(*LABELS, "loss=[{name: labelled}, {name: clip}]", "data.optional=[label]")
    made.run()
    keys = {key for seen in SEEN for key, _ in seen["labels"]}
    assert keys == {f"own-0-{i}" for i in range(6)}
    report = json.loads((made.folder.path / "report.json").read_text())
    assert report["absences"]["label"] > 0
    assert "no cls" not in (made.folder.path / "skipped.jsonl").read_text()


def test_recipes_whose_fields_do_not_fit_are_refused(trainer: Callable[..., Trainer]) -> None:
    """One line each, before any data is read."""
    for overrides, message in (
        (["loss=[{name: labelled}]"], r"'labelled' needs the field 'label' of each sample; say where it stands"),
        ([*LABELS, "data.fields.text={member: npy}"], r"'text' is a modality: give the field a name of its own"),
        ([*LABELS, "data.optional=[lable]"], r"no modality or field 'lable', did you mean 'label'\?"),
        ([*LABELS, "data.fields.label={member: json}"], r"`key` goes with a json member"),
    ):
        with pytest.raises(RecipeErrors, match=message):
            trainer(*overrides)


def test_what_a_field_may_be() -> None:
    """Texts of numbers, arrays without pickles, keys of a json; other things are named."""
    sample = {"json": json.dumps({"scores": {"clip": [1, 2]}, "text": "a"}).encode(), "txt": b"1 2 3", "x.npy": b""}
    assert FieldConfig(member="json", key="scores.clip", shape=(2,)).read(sample).tolist() == [1, 2]
    assert FieldConfig(member="txt", shape=(3,), dtype="int64").read(sample).dtype == np.int64
    with pytest.raises(AbsentModality, match=r"no 'scores\.none' in json"):
        FieldConfig(member="json", key="scores.none").read(sample)
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}], dtype=object), allow_pickle=True)
    for config, data in (
        (FieldConfig(member="json", key="text"), sample["json"]),
        (FieldConfig(member="json", key="scores.clip"), sample["json"]),
        (FieldConfig(member="json", key="a"), b"[NaN"),
        (FieldConfig(member="npy"), pickled.getvalue()),
        (FieldConfig(member="npy"), b""),
        (FieldConfig(member="cls"), b"nan"),
        (FieldConfig(member="cls"), b"\xff"),
    ):
        with pytest.raises(BadSample):
            config.read({config.member: data})
