"""Images of noise, on which `distill check-plugin` runs the task."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from distill_core import ConformanceCase, Model, Sample, TaskConfig
from distill_segment.classes import write_mask
from distill_segment.patch_probe import PatchProbe
from distill_segment.task import Segmentation
from distill_vl.example import model

CLASSES = b"background\nsquare, box\ndisc\n"


def samples(count: int, seed: int = 0) -> list[Sample]:
    """Pictures of noise, 24 x 32 px, with masks of three classes and a strip that is not scored."""
    rng = np.random.default_rng(seed)
    result: list[Sample] = []
    for i in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(file, "PNG")
        mask = rng.integers(0, 3, (24, 32))
        mask[:2] = 255
        fields = {"png": file.getvalue(), "mask.png": write_mask(mask), "classes.txt": CLASSES}
        result.append({"__key__": f"noise-{i}", "__url__": "noise", **fields})
    return result


def scorable(config: TaskConfig) -> tuple[Model, list[Sample]]:
    """A small ViT and text tower, and a few images."""
    return model(), samples(4)


CASES = [ConformanceCase(task, scorable=scorable) for task in (Segmentation, PatchProbe)]
