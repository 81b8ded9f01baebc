"""I-JEPA (arXiv 2301.08243): from a context of patches, the teacher's patches in blocks of the image are predicted."""

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """The masker `multi_block`, and the loss `ijepa` with its predictor."""
    from distill_ijepa.loss import IJepa
    from distill_ijepa.masks import MultiBlock

    return [MultiBlock, IJepa]
