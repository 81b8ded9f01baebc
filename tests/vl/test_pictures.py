"""Reading pictures: bit depths, formats, orientation."""

import io
import struct
import subprocess
import sys
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distill_core.errors import BadSample
from distill_vl.example import Whole
from distill_vl.pictures import PictureConfig

RAMP = np.linspace(0, 65535, 24 * 32).reshape(24, 32).round().astype(np.uint16)


def opened(item: Any, **options: Any) -> np.ndarray:
    picture = Whole(PictureConfig(size=16, **options)).open(item)
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("form", ["png", "tiff", None])
def test_sixteen_bits_are_scaled_to_eight(form: str | None) -> None:
    """Pillow clips them: a picture of 16 bits was white but for its blackest pixels."""
    picture = Image.fromarray(RAMP)
    item: Any = RAMP if form is None else encoded(picture, form)
    grey = opened(item, formats=("png", "tiff"))
    assert (grey == grey[:, :, :1]).all()
    assert np.abs(grey[:, :, 0] - RAMP / 257).max() <= 0.5
    assert (grey.min(), grey.max()) == (0, 255)


def test_a_transparent_value_of_sixteen_bits_is_the_background() -> None:
    values = np.where(np.arange(6) % 2 == 0, 160, 40_000)[None].astype(np.uint16)
    png = encoded(Image.fromarray(values), "png", transparency=160)
    row = opened(png, background=(9, 8, 7))[0]
    assert row[::2].tolist() == [[9, 8, 7]] * 3
    assert row[1::2].tolist() == [[round(40_000 / 257)] * 3] * 3


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_thirty_two_bits_are_refused(kind: Any) -> None:
    with pytest.raises(BadSample, match="32 bits a pixel"):
        opened(encoded(Image.fromarray(RAMP.astype(kind)), "tiff"), formats=("tiff",))


@pytest.mark.parametrize("form", ["eps", "tiff", "ppm", "jpeg2000"])
def test_formats_that_the_recipe_does_not_name_are_not_decoded(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An EPS in a field `jpg` would start Ghostscript, if it is installed."""
    from PIL import EpsImagePlugin

    def started(*args: Any, **options: Any) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    data = encoded(Image.new("RGB", (20, 20), "red"), form)
    with pytest.raises(BadSample, match=r"none of the formats jpeg, png, webp, gif, bmp \(option `formats`\)"):
        Whole(PictureConfig()).decode({"__key__": "k", "jpg": data})
    if form != "eps":
        assert np.abs(opened(data, formats=(form,)) - [255, 0, 0]).max() <= 3


def test_eps_cannot_be_named() -> None:
    with pytest.raises(ValueError, match="eps"):
        PictureConfig.model_validate({"formats": ["eps"]})


@pytest.mark.parametrize("form", ["jpeg", "png", "webp", "gif", "bmp"])
def test_the_formats_of_the_web_are_read_in_any_field(form: str) -> None:
    data = encoded(Image.new("RGB", (20, 20), "red"), form)
    assert np.abs(opened(data) - [255, 0, 0]).max() <= 3


def test_exif_orientation_is_an_option() -> None:
    """6: the camera was turned by a quarter, so the picture must be turned clockwise."""
    stored = Image.fromarray(np.repeat(np.arange(0, 240, 10, dtype=np.uint8)[:, None, None], 12, 1).repeat(3, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(stored, "png", exif=exif)
    assert np.array_equal(opened(data), np.asarray(stored))
    assert np.array_equal(opened(data, exif_orientation=True), np.rot90(np.asarray(stored), -1))
    assert np.array_equal(opened(encoded(stored, "png"), exif_orientation=True), np.asarray(stored))


@pytest.mark.parametrize("form", ["avif", "jpeg", "png", "webp", "gif", "bmp"])
def test_damaged_bytes_are_a_bad_sample(form: str) -> None:
    """Any byte may be wrong: an AVIF raises RuntimeError then. Catches a picture whose bytes end the run."""
    ramp = Image.fromarray(np.arange(24 * 32 * 3, dtype=np.uint8).reshape(24, 32, 3))
    whole = encoded(ramp, form)
    for case in range(120):
        rng = np.random.default_rng(case)
        changed = bytearray(whole)
        changed[rng.integers(min(len(whole), 400))] ^= 1 << int(rng.integers(8))
        with suppress(BadSample):
            assert opened(bytes(changed), formats=(form,)).shape[2] == 3


@pytest.mark.parametrize(
    "error", [RuntimeError("x"), NotImplementedError("x"), struct.error("x"), IndexError("x"), MemoryError()]
)
def test_whatever_a_decoder_raises_is_a_bad_sample(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Third-party decoders of Pillow promise no errors of a certain kind."""
    from PIL import PngImagePlugin

    def load(picture: Image.Image) -> None:
        raise error

    data = encoded(Image.new("RGB", (20, 20)), "png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(BadSample, match=f"not a readable picture: {str(error) or 'MemoryError'}"):
        opened(data)


def test_nothing_is_imported_when_a_picture_is_opened() -> None:
    """In a new process, as a loader's worker is forked from. Would catch an import in a worker, which waits for ever if
    another thread of the process was importing the same module when the worker was forked."""
    lines = (
        "import io, sys; from PIL import Image; from distill_vl.example import Whole; "
        "from distill_vl.pictures import PictureConfig; augmentation = Whole(PictureConfig(size=16)); "
        "before = {m for m in sys.modules if m.startswith('PIL')}; file = io.BytesIO(); "
        "Image.new('RGB', (4, 4)).save(file, 'WEBP'); augmentation.open(file.getvalue()); "
        "print(sorted({m for m in sys.modules if m.startswith('PIL')} - before))"
    )
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "[]"
