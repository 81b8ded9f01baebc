"""LeJEPA (arXiv 2511.08544): views predict their mean, and embeddings are to be isotropic Gaussians; no teacher."""

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """The loss `lejepa`, of one modality or across several."""
    from distill_lejepa.loss import LeJepa

    return [LeJepa]
