"""FLAVA: a foundational language and vision alignment model (Singh et al., arXiv 2112.04482, CVPR 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_core import hookimpl

if TYPE_CHECKING:
    from distill_core import ConformanceCase

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """Views to be masked, the multimodal encoder, and four losses; the contrastive one is CLIP's."""
    from distill_flava.fusion import MultimodalEncoder
    from distill_flava.losses import ImageTextMatching, MaskedImage, MaskedLanguage, MaskedMultimodal
    from distill_flava.views import FlavaImage, FlavaText

    return [
        FlavaImage, FlavaText, MultimodalEncoder,
        MaskedLanguage, MaskedImage, MaskedMultimodal, ImageTextMatching,
    ]  # fmt: skip


@hookimpl
def distill_conformance_cases() -> list[ConformanceCase]:
    """What `distill check-plugin` feeds them."""
    from distill_flava.cases import CASES

    return CASES
