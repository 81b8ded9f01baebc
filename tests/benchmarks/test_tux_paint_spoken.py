"""Stamps with sentences and recordings, in files that the test writes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill_benchmarks.tux_paint import PHOTOGRAPHS
from distill_benchmarks.tux_paint_spoken import SpokenTuxPaint, split_of
from distill_core.errors import DataError

THINGS = [f"things/{word}_{n}" for word in "abcdefghijkl" for n in (1, 2)]


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    base = tmp_path / "tux" / "usr/share/tuxpaint/stamps"
    photograph = next(line for line in PHOTOGRAPHS.read_text().splitlines() if line and not line.startswith("#"))
    for i, name in enumerate([*THINGS, photograph]):
        path = base / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 4), dtype=np.uint8)).save(file, "PNG")
        path.write_bytes(file.getvalue())
        path.with_suffix(".txt").write_text(f"Thing {i}.\nfr.utf8=Chose {i}.\nca@valencia.utf8=Cosa {i}.\n")
        for language in ("fr", "ca@valencia"):
            (path.parent / f"{path.stem}_desc_{language}.ogg").write_bytes(f"{language} {i}".encode())
        (path.parent / f"{path.stem}.ogg").write_bytes(b"a noise that describes nothing")
    (base / "things" / "a_1_desc.ogg").write_bytes(b"english")
    (base / "things" / "b_1_mirror.png").write_bytes((base / "things" / "b_1.png").read_bytes())
    return tmp_path / "tux"


def source(folder: Path, **options: object) -> SpokenTuxPaint:
    return SpokenTuxPaint(SpokenTuxPaint.Config.model_validate_json(json.dumps({"folder": str(folder), **options})))


def test_splits_are_of_concepts_and_photographs_are_never_trained_on(stamps: Path) -> None:
    """Catches a concept on two sides, a stamp that is lost or comes twice, and a photograph in training."""
    made = source(stamps)
    splits = {name: made.samples(name) for name in ("train", "validation", "test")}
    assert [list(sets) for sets in splits.values()][:2] == [["drawings"], ["drawings"]]
    assert set(splits["test"]) == {"drawings", "photographs"}
    keys = {name: [s["__key__"] for s in sets["drawings"]] for name, sets in splits.items()}
    assert sorted(key for own in keys.values() for key in own) == sorted(
        f"things/{word}_{n}" for word in "abcdefghijkl" for n in (1, 2)
    )
    for name, own in keys.items():
        assert all(split_of(key) == name for key in own)
        assert {key.replace("_1", "_2").replace("_2_2", "_2") for key in own} <= set(own)
    assert len(list(splits["test"]["photographs"])) == 1


def test_a_sample_has_what_is_said_of_it(stamps: Path) -> None:
    """Catches a recording of another stamp or language, and a noise that is taken for a description."""
    samples = {
        s["__key__"]: s
        for sets in map(source(stamps).samples, ("train", "validation", "test"))
        for s in sets["drawings"]
    }
    sample = samples["things/a_1"]
    assert {name for name in sample if name.endswith("ogg")} == {"fr.ogg", "ca@valencia.ogg", "en.ogg"}
    assert (sample["fr.ogg"], sample["en.ogg"], sample["txt"]) == (b"fr 0", b"english", b"Thing 0.")
    about = json.loads(sample["json"])
    assert about["references"] == ["Thing 0."]
    assert about["sentences"] == {"en": "Thing 0.", "fr": "Chose 0.", "ca@valencia": "Cosa 0."}
    some = list(source(stamps, languages=["fr"]).samples("train")["drawings"])
    assert {name for s in some for name in s if name.endswith("ogg")} == {"fr.ogg"}


def test_an_empty_folder_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="apt-get download tuxpaint-stamps-default"):
        source(tmp_path).samples("train")
    with pytest.raises(DataError, match="no such folder"):
        source(tmp_path / "none").samples("train")
