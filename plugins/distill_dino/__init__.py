"""DINO (arXiv 2104.14294) and iBOT (arXiv 2111.07832): self-distillation of one modality, by class and by patch."""

from distill_core import hookimpl

distill_api = 1


@hookimpl
def distill_components() -> list[type]:
    """The losses `dino`, `ibot` and `koleo`."""
    from distill_dino.koleo import KoLeo
    from distill_dino.losses import Dino, Ibot

    return [Dino, Ibot, KoLeo]
