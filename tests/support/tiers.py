"""Cases of a parametrised test, of which only some run with the fast tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def cases_of(values: Iterable[Any], fast: Callable[[Any], bool]) -> list[Any]:
    """The values (tuples where a test takes several) as parameters; those that are not `fast` are marked slow."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=() if fast(value) else pytest.mark.slow)
        for value in values
    ]


def drawn_cases(count: int, fast: int) -> list[Any]:
    """The seeds of `count` drawn cases, the first `fast` of which are fast."""
    return cases_of(range(count), lambda seed: bool(seed < fast))
