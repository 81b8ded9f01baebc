"""TIPS: text-image pre-training with spatial awareness (arXiv 2410.16512, ICLR 2025)."""

from distill_core import hookimpl

distill_api = 1


@hookimpl
def distill_components() -> list[type]:
    """Two captions a sample, and the contrastive loss of two class tokens; `dino` and `ibot` make the rest."""
    from distill_tips.captions import TwoCaptions
    from distill_tips.losses import TwoTokenContrastive

    return [TwoCaptions, TwoTokenContrastive]
