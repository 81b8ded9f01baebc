"""What `distill check-plugin` feeds the augmentation."""

from __future__ import annotations

import json

import numpy as np

from distill_core import ConformanceCase, Sample
from distill_tips.captions import WEB, TwoCaptions, TwoCaptionsConfig
from distill_vl.captions import LAYOUTS
from distill_vl.cases import sentences


def captions(config: TwoCaptionsConfig, rng: np.random.Generator) -> Sample:
    """Both captions, in the layout of the options; DreamLIP's for `auto`."""
    fields = config.fields or LAYOUTS.get(config.layout, LAYOUTS["dreamlip"])
    words = sentences(rng)
    document = {**dict.fromkeys(fields, words), config.web or WEB[0]: "birds of the sea"}
    sample = {"json": json.dumps(document).encode()}
    return {**sample, "txt": ". ".join(words).encode()} if config.layout == "txt" else sample


CASES = [ConformanceCase(TwoCaptions, sample=captions)]
