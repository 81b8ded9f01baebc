"""Text views to set against COSMOS's sentence crops: hidden words, runs of sentences, word dropout, shuffled sentences.

Words are separated by white space, and include adjacent punctuation. All keep at least one word of a text.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from distill_core import GLOBAL, LOCAL, Sample, View
from distill_cosmos.text_crop import TextCrop, TextCropConfig
from distill_vl.captions import CaptionAugmentation, CaptionConfig, draw, join
from distill_vl.pictures import Probability


class MaskedTextConfig(TextCropConfig):
    """Global texts as `text_crop` makes them; local texts are these with words hidden."""

    local: Annotated[int, Field(ge=0)] = 6
    """Local texts: the global texts in turn, with words hidden."""
    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of a text's words that is hidden, to the nearest word; one word always stays."""
    masking: Literal["random", "block"] = "random"
    """Hide words anywhere, or one run of neighbouring words."""
    replace: str = ""
    """Replacement for a hidden word; "" leaves the word out, so that the text gets shorter."""


class MaskedText(TextCrop):
    """Local texts are global texts with words hidden: the masked-text views that COSMOS compares sentence crops with.

    Random and block masking as in CLIPA (arXiv 2305.07017, section 3), on words.
    """

    name = "masked_text"
    Config = MaskedTextConfig

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        """Global texts, then what masking leaves of them."""
        views = self.global_views(self.pool(sample, rng), rng)
        whole = [views[i % len(views)] for i in range(self.config.local)]
        return views + [View(self.mask(view.data, rng), LOCAL) for view in whole]

    def mask(self, text: str, rng: np.random.Generator) -> str:
        """The text with `ratio` of its words hidden."""
        words = text.split()
        count = min(round(self.config.ratio * len(words)), len(words) - 1)
        if self.config.masking == "random":
            hidden = {int(i) for i in rng.permutation(len(words))[:count]}
        else:
            start = int(rng.integers(len(words) - count + 1))
            hidden = set(range(start, start + count))
        masked = [self.config.replace if i in hidden else word for i, word in enumerate(words)]
        return " ".join(word for word in masked if word)


class WordDropoutConfig(TextCropConfig):
    """Texts as `text_crop` makes them, with words left out."""

    probability: Probability = 0.1
    """Each word is left out with this probability, by itself."""
    roles: tuple[Literal["global", "local"], ...] = ("global", "local")
    """Roles of the views that lose words."""


class WordDropout(TextCrop):
    """`text_crop`, each word left out with some probability (EDA's random deletion, arXiv 1901.11196, section 2)."""

    name = "word_dropout"
    Config = WordDropoutConfig

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        """As `text_crop`'s, with fewer words."""
        return [
            View(self.drop(view.data, rng), view.role) if view.role in self.config.roles else view
            for view in super().train_views(sample, rng)
        ]

    def drop(self, text: str, rng: np.random.Generator) -> str:
        """The words that stay; where all would go, one of them at random."""
        words = text.split()
        remaining = [
            word for word, u in zip(words, rng.random(len(words)), strict=True) if u >= self.config.probability
        ]
        return " ".join(remaining or [words[int(rng.integers(len(words)))]])


class SentenceCropConfig(CaptionConfig):
    """Runs of neighbouring sentences; the numbers of views and sentences are `text_crop`'s."""

    globals_: Annotated[int, Field(alias="global", gt=0)] = 2
    """Global texts: a run of 1 to `sentences` sentences each."""
    local: Annotated[int, Field(ge=0)] = 6
    """Local texts: a run of `local_sentences` sentences each, at different places as far as there are enough."""
    sentences: Annotated[int, Field(gt=0)] = 5
    """The most sentences of a global text; the number is uniform, and cut to what the sample has."""
    local_sentences: Annotated[int, Field(gt=0)] = 1
    """Sentences of a local text, cut to what the sample has."""
    shuffle: bool = False
    """Put the sentences of each text in a random order; their neighbourhood stays, their order goes."""


class SentenceCrop(CaptionAugmentation):
    """Contiguous sentences in their own order, as an image crop takes neighbouring pixels; `shuffle` undoes the order.

    Where `text_crop` draws sentences of all captions at random, a run keeps to what was written together (it may cross
    from one caption of the pool to the next).
    """

    name = "sentence_crop"
    Config = SentenceCropConfig
    wants_several = True

    @classmethod
    def roles(cls, config: SentenceCropConfig) -> tuple[str, ...]:
        return (GLOBAL,) * config.globals_ + (LOCAL,) * config.local

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        """Runs of sentences, globals first."""
        pool, config = self.pool(sample, rng), self.config
        views = []
        for _ in range(config.globals_):
            length = min(int(rng.integers(1, config.sentences + 1)), len(pool))
            views.append(self.run(pool, int(rng.integers(len(pool) - length + 1)), length, GLOBAL, rng))
        length = min(config.local_sentences, len(pool))
        starts = draw(len(pool) - length + 1, config.local, rng)
        return views + [self.run(pool, start, length, LOCAL, rng) for start in starts]

    def run(self, pool: list[str], start: int, length: int, role: str, rng: np.random.Generator) -> View:
        """The sentences start..start + length - 1 as one text."""
        order = rng.permutation(length) if self.config.shuffle else range(length)
        return View(join([pool[start + int(i)] for i in order]), role)
