"""What `distill check-plugin` feeds the task: pairs of images of noise, and of captions."""

from __future__ import annotations

import io
import json

import numpy as np
from PIL import Image

from distill_composition.task import Composition, CompositionConfig
from distill_core import ConformanceCase, Model, Sample
from distill_vl.example import model


def samples(count: int, seed: int = 0) -> list[Sample]:
    """Two pictures and two captions a sample."""
    rng = np.random.default_rng(seed)
    result: list[Sample] = []
    for i in range(count):
        fields = {}
        for name in ("image_0", "image_1"):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "PNG")
            fields[name] = file.getvalue()
        captions = {"caption_0": f"box {i} left of disc", "caption_1": f"disc left of box {i}"}
        result.append({"__key__": f"noise-{i}", "__url__": "noise", "json": json.dumps(captions).encode(), **fields})
    return result


def scorable(config: CompositionConfig) -> tuple[Model, list[Sample]]:
    """A small ViT and text tower, and four pairs."""
    return model(), samples(4)


CASES = [ConformanceCase(Composition, scorable=scorable)]
