"""The contracts around a method, a file each with what is built in. All are registered as anybody's are."""

from distill_core import hookimpl

distill_api = 1


@hookimpl
def distill_components() -> list[type]:
    """Optimiser, schedules, data sources, starting weights."""
    from distill_core.contracts.optimizer import AdamW
    from distill_core.contracts.schedule import Constant, Cosine, Ramp, Steps, WarmupCosine
    from distill_core.contracts.weights import StateDictLoader
    from distill_core.data.mixture_source import MixtureSource
    from distill_core.data.webdataset_source import WebDatasetSource

    return [
        AdamW, WarmupCosine, Constant, Ramp, Cosine, Steps, WebDatasetSource, MixtureSource, StateDictLoader,
    ]  # fmt: skip
