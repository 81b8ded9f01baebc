"""Which of the emoji data's packages are here."""

from __future__ import annotations

from importlib import metadata

from distill_emoji import render, source


def missing() -> list[str]:
    """The packages of the extra [emoji] that are not installed."""
    names = [*source.WORDS, *(package for package, _ in render.ART.values()), "resvg-py"]
    return [name for name in names if not any(metadata.distributions(name=name))]
