"""Semantic segmentation, zero-shot or by a probe of patches: tasks, folders of pictures and masks, the layouts of
published sets, overlays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from distill_core import hookimpl

if TYPE_CHECKING:
    from distill_core import Component, ConformanceCase

distill_api = 2


@hookimpl
def distill_components() -> list[type[Component]]:
    """The tasks and their sources."""
    from distill_segment.folders import ImageMaskFolder, SegmentationSet
    from distill_segment.patch_probe import PatchProbe
    from distill_segment.task import Segmentation

    return [Segmentation, PatchProbe, ImageMaskFolder, SegmentationSet]


@hookimpl
def distill_conformance_cases() -> list[ConformanceCase]:
    """What `distill check-plugin` feeds them."""
    from distill_segment.cases import CASES

    return CASES


@hookimpl
def distill_commands() -> list[click.Command]:
    """`distill segment`."""
    from distill_segment.commands import segment

    return [segment]
