"""data2vec 2.0 of images (arXiv 2212.07525): views masked several times predict the mean of a teacher's layers."""

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """The masker `inverse_blocks`, and the loss `data2vec` with its decoder."""
    from distill_data2vec.loss import Data2Vec
    from distill_data2vec.masks import InverseBlocks

    return [InverseBlocks, Data2Vec]
