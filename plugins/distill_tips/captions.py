"""Two texts a sample: what the web says of a picture, and what a model says that it shows (TIPS, section 3.1), in short
or at length (TIPSv2, section 3.5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import numpy as np
from pydantic import Field

from distill_core import GLOBAL, BadSample, ComponentConfig, Sample, View
from distill_vl.captions import CaptionAugmentation, CaptionConfig, join, lines

WEB = ("raw_caption", "original_caption")
"""The web's caption in the layouts that have one, DreamLIP's and PixelProse's."""


class SyntheticConfig(ComponentConfig):
    """What a synthetic caption is made of."""

    fields: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Fields among those that are read, or groups of them (`short`, `long`); null takes all but the web's."""
    sentences: Annotated[int, Field(gt=0)] | None = None
    """The most sentences, drawn at random and left in their order; null takes all."""


class TwoCaptionsConfig(CaptionConfig):
    """Which caption is the web's, and which of the others a step sees."""

    web: str | None = None
    """The json's field that holds the web's caption; null takes DreamLIP's `raw_caption` or PixelProse's
    `original_caption`. The synthetic caption is all others. A sample that lacks one of the two is bad, and skipped: a
    synthetic text in the web's place would teach its class token the other's task."""
    synthetic: Annotated[tuple[SyntheticConfig, ...], Field(min_length=1)] = (SyntheticConfig(),)
    """The synthetic caption, or several of different detail, as [{fields: [short]}, {fields: [long]}]: at each step one
    of them, each as likely as the others (TIPSv2's multi-granularity captions). A sample that lacks one is bad, too."""


class TwoCaptions(CaptionAugmentation):
    """The web's caption, whole, then the synthetic one."""

    name = "two_captions"
    Config = TwoCaptionsConfig
    examples = ({}, {"synthetic": ({"fields": ("shortIB_captions",), "sentences": 1}, {"fields": ("long",)})})

    @classmethod
    def roles(cls, config: TwoCaptionsConfig) -> tuple[str, ...]:
        return (GLOBAL, GLOBAL)

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        """The web's caption, then the synthetic one."""
        every = self.captions(sample)
        web = self.web(sample)
        own = (self.config.web,) if self.config.web is not None else WEB
        captions = {field: caption for field, caption in every.items() if field not in own}
        # a data set may have the web's caption among the sentences as well, as the emoji's name is
        rest = {field: parts for field, texts in captions.items() if (parts := [text for text in texts if text != web])}
        drawn = {field: rest[field] for field in self.texts(sample, rng) if field in rest} or rest
        choices = [self._of(made, drawn) or self._of(made, rest) for made in self.config.synthetic]
        for made, texts in zip(self.config.synthetic, choices, strict=True):
            if not texts:
                where = f" in the fields {', '.join(made.fields)}" if made.fields else ""
                raise BadSample(f"no synthetic caption beside the web's{where}")
        index = int(rng.integers(len(choices)))
        texts = choices[index]
        chosen = sorted(int(i) for i in rng.permutation(len(texts))[: self.config.synthetic[index].sentences])
        return [View(web), View(join([texts[i] for i in chosen]))]

    def _of(self, made: SyntheticConfig, captions: Mapping[str, list[str]]) -> list[str]:
        """The sentences of a synthetic caption, in the reader's order; none where its fields are not there."""
        named = set(captions)
        if made.fields is not None:
            named = {field for name in made.fields for field in (name, *self.reader.groups.get(name, ()))}
        return [text for field, texts in captions.items() if field in named for text in texts]

    def web(self, sample: Sample) -> str:
        """The web's caption. Raises `BadSample` when there is none."""
        if self.config.web is not None:
            texts = self.decode(sample, self.config.web)
        else:
            by_field = self.texts(sample)
            texts = next((by_field[field] for field in WEB if field in by_field), [])
        if not texts:
            raise BadSample(
                f"no caption of the web: neither {' nor '.join(WEB)}; name the json's field that holds it by the "
                "option `web`"
            )
        return join([line for text in texts for line in lines(text)])
