"""DreamLIP: language-image pre-training with long captions (arXiv 2403.17007, ECCV 2024)."""

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """Sub-captions, the loss over all of them, and the loss of each with the patches that it is about."""
    from distill_dreamlip.losses import MultiPositive, SubcaptionGrouping
    from distill_dreamlip.views import SubCaptions

    return [SubCaptions, MultiPositive, SubcaptionGrouping]
