"""CLIP (Radford et al. 2021): one view of each modality and a contrastive loss."""

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """CLIP's loss."""
    from distill_clip.components import Clip

    return [Clip]
