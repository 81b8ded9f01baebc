"""MobileCLIP (Vasu et al. 2024): affinities of an ensemble of teachers, which are stored, beside CLIP's loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_core import hookimpl

if TYPE_CHECKING:
    from distill_core import ConformanceCase

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """The loss `reinforced`, and the captions of DataCompDR."""
    from distill_mobileclip.captions import DataCompDr
    from distill_mobileclip.losses import Reinforced

    return [Reinforced, DataCompDr]


@hookimpl
def distill_conformance_cases() -> list[ConformanceCase]:
    """A sample with a web's caption and synthetic ones."""
    from distill_mobileclip.cases import CASES

    return CASES
