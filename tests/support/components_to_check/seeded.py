"""Bugs put into good components, one each, that `distill check-plugin` is measured by (conformance/test_seeded.py).

Those of `broken.py` are made for a check; these are made for a mistake that an author makes, whichever check sees it.
"""

from dataclasses import dataclass

SEEDED: list["Seeded"] = []


@dataclass(frozen=True)
class Seeded:
    """A component with a bug, and the class of bugs that it is of."""

    component: type
    bug: str
    held_back: bool
    """Written after the checks, by nobody who looked at them then."""


def seeded(bug: str, *, held_back: bool = False):
    def add(cls):
        cls.__doc__ = cls.__doc__ or "Seeded."
        SEEDED.append(Seeded(cls, bug, held_back))
        return cls

    return add
