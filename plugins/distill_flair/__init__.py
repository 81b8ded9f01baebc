"""FLAIR: fine-grained language-informed image representations (Xiao et al., arXiv 2412.03561, CVPR 2025)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_core import hookimpl

if TYPE_CHECKING:
    from distill_core import ConformanceCase

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """Sampled captions, text-conditioned pooling, and FLAIR's loss."""
    from distill_flair.captions import SampledCaptions
    from distill_flair.fusion import TextConditionedPool
    from distill_flair.loss import Flair

    return [SampledCaptions, TextConditionedPool, Flair]


@hookimpl
def distill_conformance_cases() -> list[ConformanceCase]:
    """A model whose fusion pools, for the task that needs one."""
    from distill_flair.cases import CASES

    return CASES
