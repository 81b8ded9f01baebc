"""Pictures that are known by their grey, and what a source makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distill_vl.caption import WholeCaption
from distill_vl.random_crop import RandomCrop

TEXT, IMAGE = WholeCaption(WholeCaption.Config()), RandomCrop(RandomCrop.Config())


def picture(path: Path, grey: int = 9) -> Path:
    """A grey picture, by which it is known again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), grey, np.uint8)).save(path)
    return path


def grey(sample: Any) -> int:
    return int(np.asarray(IMAGE.decode(sample)[0])[0, 0, 0])


def source(cls: Any, **options: Any) -> Any:
    return cls(cls.Config.model_validate_json(json.dumps(options)))


def only(sets: Mapping[str, Any]) -> tuple[str, list[Any]]:
    ((name, samples),) = sets.items()
    return name, list(samples)
