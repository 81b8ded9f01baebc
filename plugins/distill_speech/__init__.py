"""Speech as a modality: log-mel spectrograms of recordings, and a small transformer over them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_core import hookimpl

if TYPE_CHECKING:
    from distill_core import ConformanceCase

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """The augmentation and the tower."""
    from distill_speech.log_mel import LogMel
    from distill_speech.tower import SpeechTransformer

    return [LogMel, SpeechTransformer]


@hookimpl
def distill_conformance_cases() -> list[ConformanceCase]:
    """A recording of noise, and spectrograms of it."""
    from distill_speech.cases import CASES

    return CASES
