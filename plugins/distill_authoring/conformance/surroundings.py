"""The other parts that a check needs: two modalities of hashed items, a model, an objective, a shard."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill_authoring.conformance.inputs import DIM, WIDTH, modality
from distill_core import (
    GLOBAL,
    AbsentModality,
    Augmentation,
    Backbone,
    BackboneSpec,
    Collator,
    ComponentConfig,
    Encoded,
    Group,
    Loss,
    LossConfig,
    Model,
    Objective,
    Outputs,
    Plan,
    Sample,
    TowerInput,
    View,
    Views,
    stable_hash,
)

NAMES = ("first", "second")


class Items(Augmentation):
    """Any item -> a vector that its hash decides. A sample's item is its number; another field is one of two words."""

    name = "items"

    @classmethod
    def roles(cls, config: ComponentConfig) -> tuple[str, ...]:
        return (GLOBAL,)

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        return [self.eval_view(self.decode(sample)[0])]

    def decode(self, sample: Sample, field: str | None = None) -> list[Any]:
        """The sample's number, or a word in place of another `field`."""
        if "number" not in sample:
            raise AbsentModality("no number")
        return [sample["number"].decode() if field is None else f"word {int(sample['number']) % 2}"]

    def eval_view(self, item: Any) -> View:
        """A vector [W] that is a hash of the item."""
        return View(torch.from_numpy(np.random.default_rng(stable_hash(item)).standard_normal(WIDTH, dtype=np.float32)))


class Linear(Backbone):
    """A backbone of one linear map, whose input is its only token."""

    name = "linear"

    def __init__(self, config: ComponentConfig) -> None:
        super().__init__(config)
        self.map = nn.Linear(WIDTH, DIM)

    @classmethod
    def spec(cls, config: ComponentConfig) -> BackboneSpec:
        """W and D of the checks."""
        return BackboneSpec(WIDTH, DIM, layers=1)

    @classmethod
    def collator(cls, config: ComponentConfig) -> Collator:
        """`stack`, which returns one group [1, B, W]."""
        return stack

    def encode(self, x: Tensor, *, tokens: bool, token_mask: Tensor | None) -> Encoded:
        """x [N, W]; one token each."""
        return Encoded(self.map(x), x[:, None] if tokens else None, class_tokens=x[:, None])

    def encode_together(self, inputs: Sequence[TowerInput]) -> list[Encoded]:
        """The token is its one layer's, too."""
        return [
            replace(one, layers=dict.fromkeys(x.layers, x.x[:, None]))
            for x, one in zip(inputs, super().encode_together(inputs), strict=True)
        ]

    def class_attention(self, x: Tensor) -> Tensor:
        """All of it on the one token."""
        return x.new_ones(len(x), 1, 1)


def stack(samples: list[list[View]], seeds: Sequence[int] = ()) -> Views:
    """One group of one view."""
    return Views([Group(torch.stack([views[0].data for views in samples])[None])])


class Sum(Loss):
    """A term that reads both embeddings."""

    name = "sum"

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The sum of both embeddings, as a term."""
        return {"sum": torch.stack([outputs.student[name].embedding.sum() for name in NAMES]).sum()}, {}


def plan() -> Plan:
    """Two modalities of one view, of towers of one layer."""
    one = modality((GLOBAL,))
    return Plan({name: replace(one, spec=replace(one.spec, layers=1)) for name in NAMES})


def backbones() -> dict[str, Backbone]:
    """A `Linear` for each modality, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {name: Linear(ComponentConfig()) for name in NAMES}


def model() -> Model:
    """A model that encodes items of both."""
    return Model(backbones(), dict.fromkeys(NAMES, Items(ComponentConfig())), dict.fromkeys(NAMES, stack), batch_size=4)


def objective() -> Objective:
    """Both backbones, no teacher, no fusion, one loss."""
    return Objective(backbones(), plan(), loss={"sum": Sum(LossConfig(), plan())})


def shard(folder: Path, samples: int) -> str:
    """A tar shard of numbered samples."""
    path = folder / f"{samples}.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(samples):
            entry = tarfile.TarInfo(f"sample-{i}.number")
            data = str(i).encode()
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return str(path)
