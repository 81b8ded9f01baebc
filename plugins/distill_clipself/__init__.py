"""CLIPSelf (arXiv 2310.01403): a ViT's regions learn from its own class token of the regions' crops."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_core import hookimpl

if TYPE_CHECKING:
    from distill_core import ConformanceCase

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """The views `grid_regions`, the tower `dense_vit` and the loss `clipself`."""
    from distill_clipself.loss import ClipSelf
    from distill_clipself.tower import DenseVit
    from distill_clipself.views import GridRegions

    return [GridRegions, DenseVit, ClipSelf]


@hookimpl
def distill_conformance_cases() -> list[ConformanceCase]:
    """What `distill check-plugin` feeds them."""
    from distill_clipself.cases import CASES

    return CASES
