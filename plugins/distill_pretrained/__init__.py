"""Towers of timm and of Hugging Face transformers, frozen or tuned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_core import hookimpl

if TYPE_CHECKING:
    from distill_core import ConformanceCase

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """A picture tower, a text tower, and the picture tower's pretrained weights."""
    from distill_pretrained.hf_text import HfText
    from distill_pretrained.timm_tower import TimmTower
    from distill_pretrained.timm_weights import TimmWeights

    return [TimmTower, HfText, TimmWeights]


@hookimpl
def distill_conformance_cases() -> list[ConformanceCase]:
    """What `distill check-plugin` feeds them."""
    from distill_pretrained.cases import CASES

    return CASES
