"""DINO (arXiv 2104.14294), iBOT (arXiv 2111.07832) and DINOv3's Gram anchoring (arXiv 2508.10104): self-distillation of
one modality, by class and by patch."""

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """The losses `dino`, `ibot`, `koleo` and `gram`."""
    from distill_dino.gram import Gram
    from distill_dino.koleo import KoLeo
    from distill_dino.losses import Dino, Ibot

    return [Dino, Ibot, KoLeo, Gram]
