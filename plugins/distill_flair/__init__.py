"""FLAIR: fine-grained language-informed image representations (Xiao et al., arXiv 2412.03561, CVPR 2025)."""

from distill_core import hookimpl

distill_api = 1


@hookimpl
def distill_components() -> list[type]:
    """Sampled captions, text-conditioned pooling, and FLAIR's loss."""
    from distill_flair.captions import SampledCaptions
    from distill_flair.fusion import TextConditionedPool
    from distill_flair.loss import Flair

    return [SampledCaptions, TextConditionedPool, Flair]
