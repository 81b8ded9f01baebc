"""Optimisers beside AdamW, from timm: Lion and Muon."""

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """The optimizers `lion` and `muon`."""
    from distill_optimizers.components import Lion, Muon

    return [Lion, Muon]
