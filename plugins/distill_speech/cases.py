"""What `distill check-plugin` feeds the augmentation and the tower."""

from __future__ import annotations

import io

import numpy as np
import torch

from distill_core import GLOBAL, ConformanceCase, Sample, View, require_extra
from distill_speech.log_mel import LogMel, LogMelConfig
from distill_speech.tower import SpeechTransformer, SpeechTransformerConfig


def recording(config: LogMelConfig, rng: np.random.Generator) -> Sample:
    """A wav of noise, longer than a view."""
    file = io.BytesIO()
    noise = rng.standard_normal(round(1.5 * config.seconds * 11_025)).clip(-4, 4) / 5
    require_extra("soundfile", "speech").write(file, noise, 11_025, format="WAV")
    return {(config.fields or ("wav",))[0]: file.getvalue()}


def spectrograms(config: SpeechTransformerConfig, rng: np.random.Generator) -> list[View]:
    """Two of noise."""
    shape = (config.mels, config.frames)
    return [View(torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)), GLOBAL) for _ in range(2)]


CASES = [ConformanceCase(LogMel, sample=recording), ConformanceCase(SpeechTransformer, views=spectrograms)]
