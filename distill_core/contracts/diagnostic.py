"""A line of `distill doctor`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Diagnostic:
    """One line: `value` is what is there, `warning` what is not as it should be, and what to do.

    `broken` marks what keeps distill from running at all: `distill doctor` then ends with exit code 2.
    """

    section: str
    name: str
    value: str
    warning: str = ""
    broken: bool = False
