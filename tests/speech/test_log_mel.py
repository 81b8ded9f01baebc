"""Recordings to spectrograms: what is heard where, what is drawn, what is refused."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from distill_authoring.conformance import assert_conforms
from distill_core.errors import AbsentModality, BadSample
from distill_speech.log_mel import LogMel, mel_filters
from distill_speech.tower import SpeechTransformer


def tone(hertz: float, seconds: float = 1.0, rate: int = 22_050, form: str = "WAV") -> bytes:
    """A sine, as two equal channels."""
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    file = io.BytesIO()
    soundfile.write(file, np.stack([wave, wave], 1), rate, format=form)
    return file.getvalue()


def log_mel(**options: Any) -> LogMel:
    return LogMel(LogMel.Config(**({"seconds": 1.0, "mels": 40, "rate": 8000} | options)))


def mel(hertz: float) -> float:
    return 2595 * float(np.log10(1 + hertz / 700))


@pytest.mark.slow
@pytest.mark.parametrize("component", [LogMel, SpeechTransformer])
def test_conforms(component: type) -> None:
    assert_conforms(component)


@pytest.mark.parametrize("form", ["WAV", "OGG", "FLAC"])
@pytest.mark.parametrize("hertz", [300.0, 1000.0, 2900.0])
def test_a_tone_is_loudest_in_its_band(hertz: float, form: str) -> None:
    """By the mel scale written out here. Catches bands out of order, a wrong rate after resampling (a tone that moves),
    and a spectrogram on its side."""
    picture = log_mel().eval_view(tone(hertz, form=form)).data
    assert picture.shape == (40, 100)
    loudest = picture[:, 10:90].mean(1).argmax().item()
    centres = np.arange(1, 41) * mel(4000) / 41
    assert abs(loudest - int(np.abs(centres - mel(hertz)).argmin())) <= 1
    assert picture.max() <= picture.min() + 8 / 4 + 1e-5, "at most 8 decades of power below the loudest, over 4"


def test_bands_by_an_independent_transcription() -> None:
    """Triangles between neighbouring points, each of area 1: by integration in steps of a tenth of a bin."""
    filters = mel_filters(12, 400, 8000)
    points = [700 * (10 ** (i * mel(4000) / 13 / 2595) - 1) for i in range(14)]
    for band in range(12):
        low, middle, high = points[band : band + 3]
        for k in range(0, 201, 7):
            f = k * 4000 / 200
            height = 2 / (high - low)
            rising = (f - low) / (middle - low) if low < f <= middle else 0.0
            falling = (high - f) / (high - middle) if middle < f < high else 0.0
            assert filters[band, k].item() == pytest.approx(height * (rising + falling), abs=1e-6)


def test_evaluation_hears_the_middle_and_silence_after_a_short_one() -> None:
    low, high = tone(400, 1.0), tone(2000, 1.0)
    waves = [soundfile.read(io.BytesIO(x))[0] for x in (low, high, low)]
    file = io.BytesIO()
    soundfile.write(file, np.concatenate(waves), 22_050, format="WAV")
    middle = log_mel().eval_view(file.getvalue()).data
    torch.testing.assert_close(middle[:, 10:90], log_mel().eval_view(high).data[:, 10:90], atol=0.2, rtol=0)
    short = log_mel().eval_view(tone(400, 0.5)).data
    assert short[:, 60:].max() < short[:, 10:40].max() - 1.5, "silence is the floor"
    array = np.zeros(8000, np.float32)
    assert log_mel().eval_view(array).data.shape == (40, 100)


def test_training_draws_the_recording_its_part_and_what_is_blanked() -> None:
    """Catches a recording that is never drawn, a part that is always the same, and masks in the wrong direction."""
    sample = {"fr.ogg": tone(400, 2.0), "wav": tone(2000, 2.0), "txt": b"no sound"}
    rng = np.random.default_rng(0)
    peaks = {log_mel().train_views(sample, rng)[0].data.mean(1).argmax().item() for _ in range(12)}
    assert len({peak > 20 for peak in peaks}) == 2
    masked = log_mel(time_mask=0.5).train_views(sample, np.random.default_rng(3))[0].data
    blank = (masked == 0).all(0)
    assert 0 < blank.sum() <= 50
    assert (blank.int().diff().abs().sum() <= 2).item(), "in one piece"
    banded = log_mel(mel_mask=0.5).train_views(sample, np.random.default_rng(3))[0].data
    assert 0 < (banded == 0).all(1).sum() <= 20
    noise = np.random.default_rng(1).standard_normal(3 * 22_050) / 9
    file = io.BytesIO()
    soundfile.write(file, noise, 22_050, format="WAV")
    parts = [log_mel().train_views({"wav": file.getvalue()}, np.random.default_rng(i))[0].data for i in range(2)]
    assert (parts[0] - parts[1]).abs().max() > 0.1


def test_what_is_no_recording() -> None:
    """A sample without one lacks the modality; one that is broken is a bad sample, and so is no sound at all."""
    with pytest.raises(AbsentModality):
        log_mel().train_views({"txt": b"x"}, np.random.default_rng(0))
    with pytest.raises(AbsentModality):
        log_mel(fields=("fr.ogg",)).train_views({"es.ogg": tone(400)}, np.random.default_rng(0))
    for broken in (b"", b"OggS but no more", tone(400, 0.0)):
        with pytest.raises(BadSample):
            log_mel().train_views({"wav": broken}, np.random.default_rng(0))
    with pytest.raises(BadSample):
        log_mel().eval_view(np.zeros((2, 8000), np.float32))
    assert log_mel().decode({"b.ogg": b"2", "a.ogg": b"1"}) == [b"1", b"2"]
    assert log_mel().decode({"b.ogg": b"2", "a.ogg": b"1"}, "b.ogg") == [b"2"]
