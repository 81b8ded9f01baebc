"""What COSMOS is ablated with: other fusions, and other local views of captions."""

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """Fusions and text views that stand in for COSMOS's own."""
    from distill_cosmos_variants.fusion import GatedCrossAttention, Identity, MeanPooling
    from distill_cosmos_variants.q_former import QFormer
    from distill_cosmos_variants.text_views import MaskedText, SentenceCrop, WordDropout

    return [GatedCrossAttention, Identity, MeanPooling, QFormer, MaskedText, SentenceCrop, WordDropout]
