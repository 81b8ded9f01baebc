"""Recordings to log-mel spectrograms, as Whisper makes them (Radford et al. 2022, section 2.2), with SpecAugment."""

from __future__ import annotations

import io
import os
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from distill_core import (
    GLOBAL,
    AbsentModality,
    Augmentation,
    BadSample,
    ComponentConfig,
    Sample,
    View,
    require_extra,
)

Waveform = NDArray[np.float32]
Share = Annotated[float, Field(ge=0, lt=1)]
SUFFIXES = ("ogg", "wav", "flac", "opus", "mp3")
"""Of the members of a sample that are recordings, unless `fields` names them."""
FLOOR, RANGE = 1e-10, 8.0
"""Of powers, and of a recording's log10 powers below its loudest."""


class LogMelConfig(ComponentConfig):
    """Defaults are Whisper's frames and bands; its window is 30 seconds."""

    fields: tuple[str, ...] | None = None
    """Members of a sample that may hold a recording, as [en.ogg, fr.ogg]; null: all that end in ogg, wav, flac, opus or
    mp3. A view is of one of those that the sample has, drawn each time."""
    rate: Annotated[int, Field(ge=1000)] = 16_000
    """Samples a second that a recording is resampled to."""
    mels: Annotated[int, Field(gt=0)] = 80
    """Bands of the spectrogram, from 0 to rate / 2 on the mel scale."""
    window: Annotated[float, Field(gt=0)] = 0.025
    """Seconds that a frame sees."""
    hop: Annotated[float, Field(gt=0)] = 0.010
    """Seconds from frame to frame."""
    seconds: Annotated[float, Field(gt=0)] = 3.0
    """Of a view: a shorter recording is followed by silence, a longer one is cut, in training anywhere."""
    speed: Share = 0.0
    """In training, a recording is played faster or slower by up to this share (Ko et al. 2015)."""
    time_mask: Share = 0.0
    """In training, up to this share of the frames is blanked, in one piece (SpecAugment, Park et al. 2019)."""
    mel_mask: Share = 0.0
    """The same of the bands."""

    @model_validator(mode="after")
    def _fits(self) -> LogMelConfig:
        if self.hop > self.seconds or self.window > self.seconds:
            raise ValueError("window and hop are parts of seconds")
        if self.mels > 1 + round(self.window * self.rate) // 2:
            raise ValueError(f"{self.mels} mels are more than a window of {self.window} s tells apart")
        return self

    @property
    def frames(self) -> int:
        """Frames of a view."""
        return round(self.seconds / self.hop)


class LogMel(Augmentation):
    """One view: log10 of the powers of `mels` bands, [mels, frames], at most `RANGE` below the loudest, over 4."""

    name = "log_mel"
    Config = LogMelConfig
    examples = (
        {"seconds": 0.5, "mels": 16, "rate": 8000},
        {"seconds": 0.5, "mels": 16, "rate": 8000, "speed": 0.1, "time_mask": 0.2, "mel_mask": 0.2},
    )

    @classmethod
    def roles(cls, config: LogMelConfig) -> tuple[str, ...]:
        """One global view."""
        return (GLOBAL,)

    @classmethod
    def shapes(cls, config: LogMelConfig) -> tuple[tuple[int, ...], ...]:
        """[mels, frames]."""
        return ((config.mels, config.frames),)

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        """A recording, its speed, its part, and what is blanked are drawn."""
        config = self.config
        names = self._members(sample, None)
        if not names:
            raise AbsentModality(f"no recording (a member that ends in {', '.join(config.fields or SUFFIXES)})")
        name = names[int(rng.integers(len(names)))]
        heard = self._heard(sample[name], 1 + rng.uniform(-config.speed, config.speed))
        spare = len(heard) - self._length
        start = int(rng.integers(spare + 1)) if spare > 0 else 0
        picture = self._picture(heard[start : start + self._length])
        for axis, share in ((0, config.mel_mask), (1, config.time_mask)):
            width = int(rng.integers(1 + int(share * picture.shape[axis])))
            first = int(rng.integers(1 + picture.shape[axis] - width))
            picture.narrow(axis, first, width).fill_(0.0)
        return [View(picture)]

    def decode(self, sample: Sample, field: str | None = None) -> list[bytes]:
        """All recordings, encoded as they are; those of the member `field` alone."""
        names = self._members(sample, field)
        if not names:
            raise BadSample(f"no recording{f' {field!r}' if field else ''}")
        return [sample[name] for name in names]

    def eval_view(self, item: Any) -> View:
        """Of an encoded recording (bytes, or a path), or of samples [N] at `rate` as an array: its middle."""
        heard = np.asarray(item, np.float32) if isinstance(item, np.ndarray | torch.Tensor) else self._heard(item)
        if heard.ndim != 1:
            raise BadSample(f"an array of shape {heard.shape}; samples [N] of one channel are a recording")
        start = max(0, len(heard) - self._length) // 2
        return View(self._picture(heard[start : start + self._length]))

    def render(self, view: View) -> Any:
        """The spectrogram as a grey picture, high bands above."""
        from PIL import Image

        grey = ((view.data.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return Image.fromarray(grey.flip(0).numpy())

    @property
    def _length(self) -> int:
        config: LogMelConfig = self.config
        return round(config.seconds * config.rate)

    def _members(self, sample: Sample, field: str | None) -> list[str]:
        named = (field,) if field is not None else self.config.fields
        if named is None:
            named = tuple(sorted(name for name in sample if name.rpartition(".")[2] in SUFFIXES))
        return [name for name in named if name in sample]

    def _heard(self, recording: Any, speed: float = 1.0) -> Waveform:
        """Samples [N] of one channel at `rate`. Raises `BadSample` for what holds no sound."""
        soundfile, soxr = require_extra("soundfile", "speech"), require_extra("soxr", "speech")
        try:
            file = os.fspath(recording) if isinstance(recording, str | Path) else io.BytesIO(recording)
            heard, rate = soundfile.read(file, dtype="float32", always_2d=True)
        except (OSError, TypeError, ValueError, soundfile.SoundFileError) as error:
            raise BadSample(f"the recording cannot be decoded: {error}") from error
        if not len(heard) or not np.isfinite(heard).all():
            raise BadSample("the recording holds no sound" if not len(heard) else "the recording is not finite")
        resampled: Waveform = soxr.resample(heard.mean(1), rate * speed, self.config.rate)
        return resampled

    def _picture(self, heard: Waveform) -> torch.Tensor:
        """[mels, frames]."""
        config = self.config
        padded = np.zeros(self._length, np.float32)
        padded[: len(heard)] = heard
        size, hop = round(config.window * config.rate), round(config.hop * config.rate)
        spectrum = torch.stft(
            torch.from_numpy(padded), size, hop, window=torch.hann_window(size), center=True, return_complex=True
        )
        power = spectrum[:, : config.frames].abs() ** 2  # [size // 2 + 1, frames]
        log = (mel_filters(config.mels, size, config.rate) @ power).clamp(min=FLOOR).log10()
        return (torch.maximum(log, log.max() - RANGE) + RANGE / 2) / (RANGE / 2)


@lru_cache
def mel_filters(mels: int, size: int, rate: int) -> torch.Tensor:
    """[mels, size // 2 + 1]: triangles that rise and fall between neighbouring points of an even division of the mel
    scale, 2595 log10(1 + f / 700) (O'Shaughnessy 1987), each of area 1 (Slaney's norm)."""
    top = 2595 * np.log10(1 + rate / 2 / 700)
    points = 700 * (10 ** (np.linspace(0, top, mels + 2) / 2595) - 1)  # Hz
    frequencies = np.linspace(0, rate / 2, size // 2 + 1)
    low, middle, high = (points[i : i + mels, None] for i in range(3))
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    triangles = np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)
    return torch.from_numpy(triangles.astype(np.float32))
