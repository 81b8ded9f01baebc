"""What the conformance checks cannot make themselves: inputs that a component's author gives for them.

No other part of a run reads them, so they are no members of the interfaces; a plugin gives them by the hook
`distill_conformance_cases`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from distill_core.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from distill_core.batch import Sample, View
    from distill_core.contracts.component import Component
    from distill_core.interfaces import Augmentation, FusionHead, Head
    from distill_core.model import Model
    from distill_core.plan import Plan


@dataclass(frozen=True, slots=True)
class ConformanceCase:
    """Inputs for the checks of a component and of its subclasses: functions, each of the component's options."""

    component: type[Component]
    sample: Callable[[Any, np.random.Generator], Sample] | None = None
    """Of every augmentation, joint ones too, and of a teacher that reads samples: (config, rng) -> a raw sample drawn
    from `rng`, bytes by field."""
    parts: Callable[[Any], Mapping[str, Augmentation]] | None = None
    """Of every joint augmentation: (config) -> the modalities' own augmentations."""
    views: Callable[[Any, np.random.Generator], list[View]] | None = None
    """Of every backbone: (config, rng) -> one sample's views drawn from `rng`, as an augmentation hands them over.
    Roles and shapes are the same for every sample; a local view beside global ones checks more."""
    targets: Callable[[Any, str, Tensor], Tensor] | None = None
    """Of a loss that reads `Group.targets`: (config, modality, token mask [V, B, L]) -> targets [V, B, L, ...]."""
    extra: Callable[[Any, str, str, tuple[int, int]], Tensor] | None = None
    """Of a loss that reads extras of views: (config, modality, name, (V, B)) -> [V, B, ...]; else a number each."""
    field: Callable[[Any, str, int], Tensor] | None = None
    """Of a loss that reads fields of samples: (config, name, B) -> [B, ...]; else a number each."""
    fusion: Callable[[Any, Plan], FusionHead] | None = None
    """Of a loss that works with one fusion alone: (config, plan) -> that fusion."""
    heads: Callable[[Any], Mapping[str, tuple[type[Head], Any]]] | None = None
    """Of a loss that calls heads: (config) -> by name, a head's class and its options."""
    scorable: Callable[[Any], tuple[Model, Sequence[Sample]]] | None = None
    """Of a task that cannot score the checks' own samples, which have a number alone: (config) -> a small model, and
    samples that it can be scored on."""
    checks: Sequence[Callable[[ConformanceCase, Any, np.random.Generator], None]] | None = None
    """Of an interface that a plugin defines, what components of its kind are checked for: (case, config, rng), once for
    each example's options; `case.component` is the component's class, beside what the nearest cases give. A check's
    docstring says what it requires; it raises AssertionError with what to fix."""


class ConformanceCases:
    """The cases of all plugins."""

    def __init__(self, cases: Iterable[ConformanceCase]) -> None:
        """Raises `UserError` for two of one component."""
        self._by_component: dict[type[Component], ConformanceCase] = {}
        for case in cases:
            if case.component in self._by_component:
                name = f"{case.component.__module__}.{case.component.__qualname__}"
                raise UserError(f"hook distill_conformance_cases: two cases of {name}; give one")
            self._by_component[case.component] = case

    def of(self, component: type[Component]) -> ConformanceCase:
        """A component's own case; what that lacks is its nearest base's."""
        own = [self._by_component[base] for base in component.__mro__ if base in self._by_component]
        names = [field.name for field in fields(ConformanceCase)][1:]
        inputs = {name: next((x for case in own if (x := getattr(case, name)) is not None), None) for name in names}
        return ConformanceCase(component, **inputs)
