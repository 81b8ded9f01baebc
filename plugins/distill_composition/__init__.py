"""Composition: whether a model tells a picture's caption from one that puts the same things together differently."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_core import hookimpl

if TYPE_CHECKING:
    from distill_core import Component, ConformanceCase

distill_api = 2


@hookimpl
def distill_components() -> list[type[Component]]:
    """The task, and the layouts of published sets."""
    from distill_composition.layouts import MmvpVlm, SugarCrepe, SvoProbes, Winoground
    from distill_composition.task import Composition

    return [Composition, SugarCrepe, Winoground, SvoProbes, MmvpVlm]


@hookimpl
def distill_conformance_cases() -> list[ConformanceCase]:
    """What `distill check-plugin` feeds them."""
    from distill_composition.cases import CASES

    return CASES
