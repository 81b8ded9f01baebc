"""Pictures of plain colours, and a model that sees nothing else."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from score_values import values
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize

from distill_core.batch import Sample, View
from distill_core.evaluate.sets import EvaluationSet
from distill_segment.task import Segmentation, SegmentationConfig
from distill_vl.example import Whole
from distill_vl.pictures import PictureConfig

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class SeesColours:
    """Patches of 4 px: a patch's embedding is its mean colour, a word's the colour it names (grey for any other)."""

    modalities = ("image", "text")
    batch_size = 3
    device = torch.device("cpu")

    def __init__(self, size: int = 8) -> None:
        self.augment = {"image": Whole(PictureConfig(size=size, mean=(0, 0, 0), std=(1, 1, 1)))}

    def encode(self, modality: str, items: Iterable[str], *, features: str = "embedding") -> Tensor:
        assert modality == "text"
        found = [next((COLOURS[w] for w in text.split() if w in COLOURS), (100, 100, 100)) for text in items]
        return normalize(torch.tensor(found, dtype=torch.float32), dim=-1)

    def dense(self, modality: str, views: Sequence[View], *, attention: str = "plain") -> Tensor:
        x = torch.stack([view.data for view in views])
        return normalize(avg_pool2d(x, 4).permute(0, 2, 3, 1), dim=-1)


def png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, "PNG")
    return file.getvalue()


def painted(names: Sequence[Sequence[str]], patch: int) -> bytes:
    """A picture of squares of colours."""
    rows = np.array([[COLOURS[name] for name in row] for row in names], np.uint8)
    return png(rows.repeat(patch, 0).repeat(patch, 1))


def sample(picture: bytes, mask: Any, classes: str = "red\ngreen\nblue\n", key: str = "one") -> Sample:
    return {
        "__key__": key, "__url__": "here", "png": picture, "mask.png": png(mask), "classes.txt": classes.encode(),
    }  # fmt: skip


def run(task: dict[str, Any], with_model: Any, *samples: Any) -> dict[str, float]:
    """`SET/NAME` -> value."""
    config = SegmentationConfig.model_validate_json(json.dumps(task))
    return values(Segmentation(config).run(with_model, [EvaluationSet("set", list(samples))]))
