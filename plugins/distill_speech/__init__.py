"""Speech as a modality: log-mel spectrograms of recordings, and a small transformer over them."""

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """The augmentation and the tower."""
    from distill_speech.log_mel import LogMel
    from distill_speech.tower import SpeechTransformer

    return [LogMel, SpeechTransformer]


@hookimpl
def distill_conformance_cases() -> list[object]:
    """A recording of noise, and spectrograms of it."""
    from distill_speech.cases import CASES

    return list(CASES)
