"""The framework's own components, registered as anybody's are."""

from distill_core import hookimpl

distill_api = 1


@hookimpl
def distill_components() -> list[type]:
    """Optimiser, schedules, data source, evaluations, starting weights."""
    from distill_core.data.webdataset_source import WebDatasetSource
    from distill_core.evaluate.probes import Knn, LinearProbe
    from distill_core.evaluate.retrieval import Retrieval
    from distill_core.evaluate.zero_shot import ZeroShot
    from distill_core.init import Weights
    from distill_core.optimizers import AdamW, Constant, WarmupCosine

    return [AdamW, WarmupCosine, Constant, WebDatasetSource, Retrieval, ZeroShot, Knn, LinearProbe, Weights]
