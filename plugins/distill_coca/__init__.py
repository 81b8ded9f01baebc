"""CoCa: contrastive captioners are image-text foundation models (arXiv 2205.01917, TMLR 2022)."""

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """The multimodal decoder; the contrastive loss is CLIP's, captioning loss and unimodal layers are shared."""
    from distill_coca.decoder import CocaDecoder

    return [CocaDecoder]
