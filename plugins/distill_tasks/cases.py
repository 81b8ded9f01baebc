"""What `distill check-plugin` feeds `captioning`: numbers, and their names letter by letter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from distill_core import (
    GLOBAL,
    Augmentation,
    Backbone,
    BackboneSpec,
    Collator,
    ComponentConfig,
    ConformanceCase,
    Decoder,
    Encoded,
    Group,
    ModalityPlan,
    Model,
    Plan,
    Sample,
    View,
    Views,
    Vocabulary,
)
from distill_tasks.captioning import Captioning, CaptioningConfig

NAMES = ("zero", "one", "two", "three", "four", "five")
START, END, LONGEST = 27, 28, 8
WIDTH = 16


class Field(Augmentation):
    """A field of the sample as it is, a text."""

    field = "number"

    @classmethod
    def roles(cls, config: Any) -> tuple[str, ...]:
        return (GLOBAL,)

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        return [self.eval_view(self.decode(sample)[0])]

    def decode(self, sample: Sample, field: str | None = None) -> list[Any]:
        """One text."""
        return [sample[field or self.field].decode()]

    def eval_view(self, item: Any) -> View:
        """The text."""
        return View(item)


class Name(Field):
    """The number's name."""

    field = "name"


class Letters(Backbone):
    """Ids of letters, start and end, and a token for each."""

    name = "letters"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(END + 1, WIDTH)

    @classmethod
    def spec(cls, config: Any) -> BackboneSpec:
        vocabulary = Vocabulary(END + 1, start=START, end=END, padding=0, longest=LONGEST)
        return BackboneSpec(WIDTH, WIDTH, vocabulary=vocabulary, causal=True)

    @classmethod
    def collator(cls, config: Any) -> Collator:
        return collate

    def encode(self, x: Tensor, *, tokens: bool, token_mask: Tensor | None) -> Encoded:
        embedded = self.embedding(x)
        return Encoded(embedded.mean(1), embedded if tokens else None)

    def detokenize(self, ids: Tensor) -> list[str]:
        """Texts, a space for what is no letter."""
        rows = [row[1 : row.index(END)] if END in row else row[1:] for row in ids.tolist()]
        return ["".join(chr(96 + i) if 0 < i < START else " " for i in row) for row in rows]


def collate(samples: list[list[View]], seeds: Sequence[int] = ()) -> Views:
    """Ids [1, B, LONGEST] of one view: digits are letters, too."""
    ids = torch.full((1, len(samples), LONGEST), END)
    for row, (view,) in zip(ids[0], samples, strict=True):
        letters = [ord(c) - 96 if c.isalpha() else int(c) + 1 for c in view.data[: LONGEST - 2]]
        row[: len(letters) + 1] = torch.tensor([START, *letters])
    return Views([Group(ids)])


class Spell(Decoder):
    """A linear map of the number's tokens, and of the letter before."""

    name = "spell"

    def __init__(self, config: Any, plan: Plan) -> None:
        super().__init__(config, plan)
        self.size = END + 1
        self.number, self.letter = nn.Linear(WIDTH, self.size), nn.Linear(self.size, self.size)

    @classmethod
    def writes(cls, config: Any) -> str:
        return "name"

    @classmethod
    def reads(cls, config: Any) -> tuple[str, ...]:
        return ("number",)

    def forward(self, encoded: Mapping[str, Encoded], ids: Tensor, rows: Tensor | None = None) -> Tensor:
        """As `Decoder.forward`."""
        tokens = encoded["number"].tokens
        assert tokens is not None
        logits: Tensor = self.number(tokens).mean(1, keepdim=True) + self.letter(one_hot(ids, self.size).float())
        return logits if rows is None else logits.flatten(0, 1)[rows]


def scorable(config: CaptioningConfig) -> tuple[Model, list[Sample]]:
    """A model that has learned nothing, and six numbers."""
    options = ComponentConfig()
    plan = Plan({name: ModalityPlan((GLOBAL,), Letters.spec(options)) for name in ("number", "name")})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        towers = {"number": Letters(options), "name": Letters(options)}
        heads = {"decoder": Spell(options, plan)}
    augment: dict[str, Augmentation] = {"number": Field(options), "name": Name(options)}
    model = Model(towers, augment, dict.fromkeys(towers, collate), batch_size=4, heads=heads)
    samples: list[Sample] = [
        {"__key__": f"n{i}", "__url__": "-", "number": str(i).encode(), "name": name.encode()}
        for i, name in enumerate(NAMES)
    ]
    return model, samples


CASES = [ConformanceCase(Captioning, scorable=scorable)]
