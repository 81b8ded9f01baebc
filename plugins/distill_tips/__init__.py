"""TIPS: text-image pre-training with spatial awareness (arXiv 2410.16512), and TIPSv2 (arXiv 2604.12012)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_core import hookimpl

if TYPE_CHECKING:
    from distill_core import ConformanceCase

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """Two captions a sample, and the contrastive loss of two class tokens; `dino`, `ibot` and `ema` make the rest."""
    from distill_tips.captions import TwoCaptions
    from distill_tips.losses import TwoTokenContrastive

    return [TwoCaptions, TwoTokenContrastive]


@hookimpl
def distill_conformance_cases() -> list[ConformanceCase]:
    """What `distill check-plugin` feeds them."""
    from distill_tips.cases import CASES

    return CASES
