"""SigLIP: sigmoid loss for language-image pre-training (arXiv 2303.15343, ICCV 2023)."""

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """The loss; its views are any."""
    from distill_siglip.loss import SigLip

    return [SigLip]
