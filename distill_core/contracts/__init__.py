"""The contracts around a method, a file each with what is built in. All are registered as anybody's are."""

from __future__ import annotations

from typing import Any

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_conformance_cases() -> list[Any]:
    """Samples with embeddings for the stored teacher, views without a tower."""
    from distill_core.contracts.cases import ConformanceCase
    from distill_core.contracts.raw import Raw, example_views
    from distill_core.teachers.stored import Stored, example_sample

    return [ConformanceCase(Stored, sample=example_sample), ConformanceCase(Raw, views=example_views)]


@hookimpl
def distill_components() -> list[type]:
    """Optimiser, schedules, data sources, starting weights, teachers."""
    from distill_core.contracts.optimizer import AdamW
    from distill_core.contracts.raw import Raw
    from distill_core.contracts.schedule import Constant, Cosine, Ramp, Steps, WarmupCosine
    from distill_core.contracts.weights import StateDictLoader
    from distill_core.data.mixture_source import MixtureSource
    from distill_core.data.webdataset_source import WebDatasetSource
    from distill_core.teachers.copies import Ema, Snapshot
    from distill_core.teachers.ensemble import Ensemble
    from distill_core.teachers.frozen import Frozen
    from distill_core.teachers.stored import Stored

    return [
        *(AdamW, WarmupCosine, Constant, Ramp, Cosine, Steps, WebDatasetSource, MixtureSource, StateDictLoader),
        *(Ema, Snapshot, Frozen, Stored, Ensemble, Raw),
    ]
