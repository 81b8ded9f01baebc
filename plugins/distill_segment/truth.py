"""What a scored sample says: its set's classes, and the class of each of its pixels."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from distill_core import BadSample, DataError, EvaluationSet, Sample
from distill_segment.classes import IGNORE, Classes, parse_classes, read_classes, read_mask


def classes_of(samples: EvaluationSet, file: str | None) -> Classes:
    """Those of the file; of None, those that come with the set's samples. Raises `DataError`."""
    if file is not None:
        return parse_classes(read_classes(file).decode(), file)
    first = next(iter(samples), {})
    if (classes := _classes_in(first, f"evaluation set {samples.name!r}")) is not None:
        return classes
    raise DataError(
        f"evaluation set {samples.name!r}: no sample, or none with `classes.txt`; give the task `classes: FILE`"
    )


def truth_of(sample: Sample, picture: Image.Image, classes: Classes, file: str | None) -> Tensor:
    """Class numbers [H, W]. Raises `BadSample`, or `DataError` where the `classes` (of the `file`, or where that is
    None of the set's first sample) are not the mask's."""
    if file is None and _classes_in(sample, str(sample["__url__"])) not in (None, classes):
        raise DataError(
            f"{sample['__url__']}: classes.txt of {sample['__key__']!r} is not that of the set's first sample; a "
            "set has one list of classes. Split it, or give the task `classes: FILE`."
        )
    if "mask.png" not in sample:
        raise BadSample("no mask: no field mask.png")
    mask = torch.from_numpy(read_mask(bytes(sample["mask.png"])))
    if mask.shape != (picture.height, picture.width):
        sizes = f"{mask.shape[1]} x {mask.shape[0]}, the picture {picture.width} x {picture.height}"
        raise BadSample(f"the mask is {sizes} pixels")
    largest = int(mask[mask != IGNORE].max()) if (mask != IGNORE).any() else 0
    if largest >= len(classes):
        raise DataError(
            f"{sample['__url__']}: the mask of {sample['__key__']!r} has class {largest}; there are {len(classes)} "
            "classes. Check the file of classes, `ignore` and `reduce_zero_label`."
        )
    return mask


def _classes_in(sample: Sample, where: str) -> list[tuple[str, ...]] | None:
    """Those that come with a sample, if any do. Raises `DataError`."""
    if "classes.txt" not in sample:
        return None
    text = bytes(sample["classes.txt"]).decode("utf-8", "replace")
    return parse_classes(text, f"{where}: classes.txt of {sample['__key__']!r}")
