"""SLIP: self-supervision meets language-image pre-training (arXiv 2112.12750, ECCV 2022)."""

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """Views for CLIP and SimCLR, and SimCLR's loss; CLIP's loss is its own plugin's."""
    from distill_slip.simclr import SimClr
    from distill_slip.views import SlipViews

    return [SlipViews, SimClr]
