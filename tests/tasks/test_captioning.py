"""Captions that a model writes, scored as sacrebleu scores them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from score_values import values

from distill_core import EvaluationSet, Model, UserError
from distill_core.errors import RecipeErrors
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_tasks.captioning import Captioning, CaptioningConfig
from distill_tasks.cases import scorable

sacrebleu = pytest.importorskip("sacrebleu")


class Writes(Model):
    """Writes a fixed text about each number."""

    texts = ("a", "one red bird on a green boat", "two", "three old boats", "four", "five")

    def __init__(self) -> None:
        base, _ = scorable(CaptioningConfig())
        self.__dict__ |= base.__dict__

    def generate(self, modality: str, items: Iterable[Any], **options: Any) -> list[Any]:
        assert modality == "number"
        return [self.texts[int(item)] for item in items]


def test_scores_are_sacrebleus() -> None:
    """With one to three references. Would catch references of another item, and case that counts."""
    references = {
        1: ["One red bird on a blue boat", "a bird"],
        3: ["three old boats by the sea"],
        4: ["4", "four", "a four"],
    }
    fields = {i: "\n".join(texts) for i, texts in references.items()}
    samples = [
        {"__key__": f"n{i}", "__url__": "-", "number": str(i).encode(), "name": fields[i].encode()} for i in fields
    ]
    model = Writes()

    def lines(sample: Any, field: str | None = None) -> list[str]:
        return bytes(sample["name"]).decode().split("\n")

    model.augment["name"].decode = lines  # type: ignore[method-assign]
    found = values(Captioning(CaptioningConfig()).run(model, [EvaluationSet("numbers", samples)]))
    hypotheses = [model.texts[i] for i in fields]
    columns = [[*(texts[n] if n < len(texts) else None for texts in references.values())] for n in range(3)]
    lower = [[None if text is None else text.lower() for text in column] for column in columns]
    assert found["numbers/BLEU"] == pytest.approx(sacrebleu.corpus_bleu(hypotheses, lower).score)
    assert found["numbers/chrF"] == pytest.approx(sacrebleu.corpus_chrf(hypotheses, lower).score)
    assert found["BLEU"] == found["numbers/BLEU"] > 1
    assert found["numbers/words"] == pytest.approx((7 + 3 + 1) / 3)
    assert found["numbers/items"] == 3


def test_a_recipe_without_a_decoder_is_refused(registry: Registry) -> None:
    for options, line in (
        (["evaluate.tasks.1=captioning"], "'captioning' needs a decoder; the recipe has none among its `heads`"),
        (["evaluate.tasks.1={name: captioning, head: x}"], "'captioning' needs a head 'x'; this recipe has no `heads`"),
    ):
        with pytest.raises(RecipeErrors) as caught:
            load_recipe("clip_tiny", registry=registry, overrides=options)
        assert line in str(caught.value)


def test_a_model_without_its_decoder_is_one_line() -> None:
    model, samples = scorable(CaptioningConfig())
    model.heads.clear()
    with pytest.raises(UserError, match="the student has no decoder among its heads"):
        Captioning(CaptioningConfig()).run(model, [EvaluationSet("numbers", samples)])
