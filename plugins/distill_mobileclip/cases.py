"""What `distill check-plugin` feeds the reader of captions."""

from __future__ import annotations

import json

import numpy as np

from distill_core import ComponentConfig, ConformanceCase, Sample
from distill_mobileclip.captions import DataCompDr


def captions(config: ComponentConfig, rng: np.random.Generator) -> Sample:
    """A web's caption, and two synthetic ones."""
    synthetic = {"syn_text": ["A gull.", "A boat, and a gull."]}
    return {"txt": b"IMG_2041 harbour", "syn.json": json.dumps(synthetic).encode()}


CASES = [ConformanceCase(DataCompDr, sample=captions)]
