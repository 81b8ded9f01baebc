"""What `distill check-plugin` feeds the augmentation."""

from __future__ import annotations

import json

import numpy as np

from distill_core import ConformanceCase, Sample
from distill_tips.captions import WEB, TwoCaptions, TwoCaptionsConfig
from distill_vl.caption_readers import DreamLip, Txt
from distill_vl.cases import sentences


def captions(config: TwoCaptionsConfig, rng: np.random.Generator) -> Sample:
    """Both captions, in the layout of the options; DreamLIP's for `auto`."""
    reader = config.layout.cls
    fields = config.fields or getattr(reader, "fields", ()) or DreamLip.fields
    words = sentences(rng)
    document = {**dict.fromkeys(fields, words), config.web or WEB[0]: "birds of the sea"}
    sample = {"json": json.dumps(document).encode()}
    return {**sample, "txt": ". ".join(words).encode()} if reader is Txt else sample


CASES = [ConformanceCase(TwoCaptions, sample=captions)]
