"""Towers of timm and of Hugging Face transformers, frozen or tuned."""

from distill_core import hookimpl

distill_api = 1


@hookimpl
def distill_components() -> list[type]:
    """A picture tower, a text tower, and the picture tower's pretrained weights."""
    from distill_pretrained.hf_text import HfText
    from distill_pretrained.timm_tower import TimmTower
    from distill_pretrained.timm_weights import TimmWeights

    return [TimmTower, HfText, TimmWeights]
