"""Tux Paint's stamps on a small folder laid out as the package's: classes, captions, masks, what is left out."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill_benchmarks.tux_paint import PHOTOGRAPHS, TuxPaint
from distill_core.errors import BadSample, DataError
from distill_core.evaluate.cache import fingerprint
from distill_core.evaluate.sets import EvaluationSet
from distill_vl.caption import WholeCaption
from distill_vl.random_crop import RandomCrop

TEXT, IMAGE = WholeCaption(WholeCaption.Config()), RandomCrop(RandomCrop.Config())
ALPHA = np.array([[0, 127, 128], [255, 1, 200]], np.uint8)
STAMPS = {
    "animals/birds/crow": "A crow.",
    "animals/birds/owl": "An owl.",
    "animals/birds/cartoon/chick": "A Bird.",
    "animals/birds/cartoon/duck": "a bird.",  # but for a capital letter, the chick's
    "animals/mammals/bears/bear": "A bear.",
    "animals/mammals/bears/toys/teddy": "A teddy bear.",
    "animals/mammals/fox": "A fox.",
    "household/arttools/pen": "A crow.",  # comes after the crow
}


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    """The unpacked package's folder of stamps."""
    base = tmp_path / "usr/share/tuxpaint/stamps"
    for name, caption in STAMPS.items():
        path = base / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((2, 3, 4), 40, np.uint8)
        pixels[..., 3] = ALPHA
        Image.fromarray(pixels).save(path)
        path.with_suffix(".txt").write_text(f"{caption}\nde.utf8=Ein Bild.\n")
    return base


def made(folder: Path, **options: Any) -> Any:
    config = TuxPaint.Config.model_validate_json(json.dumps({"folder": str(folder), "minimum": 1} | options))
    return TuxPaint(config).samples("test")["tux_paint"]


def keys(samples: Any) -> list[str]:
    return [sample["__key__"].rpartition("/")[2] for sample in samples]


def mask_of(sample: Any) -> list[list[int]]:
    found: list[list[int]] = np.asarray(Image.open(io.BytesIO(sample["mask.png"]))).tolist()
    return found


def test_classes_are_the_folders_in_words(tmp_path: Path, stamps: Path) -> None:
    """`cartoon` and `toys` are no classes; run-together names are written apart; the unpacked package will do."""
    every = made(tmp_path, distinct=False)
    expected = ["birds"] * 4 + ["mammals"] + ["bears"] * 2 + ["art tools"]
    assert list(EvaluationSet("t", every).labels("class").values()) == expected
    assert keys(every) == keys(made(stamps, distinct=False))
    assert TEXT.decode(list(every)[2], "folder") == ["animals/birds/cartoon"]
    assert set(keys(made(stamps, distinct=False, minimum=2))) == {"crow", "owl", "chick", "duck", "bear", "teddy"}
    assert set(keys(made(stamps, distinct=False, minimum=3))) == {"crow", "owl", "chick", "duck"}
    assert TuxPaint(TuxPaint.Config(folder=str(stamps))).samples("train") == {}


def test_named_classes_hold_all_below_them(stamps: Path) -> None:
    """The deepest named folder counts; `minimum` is not asked of them; what lies elsewhere is left out."""
    found = made(stamps, minimum=10, classes=["animals", "animals/mammals/bears"])
    labels = dict(zip(keys(found), EvaluationSet("t", found).labels("class").values(), strict=True))
    assert labels == dict.fromkeys(["crow", "owl", "chick", "fox"], "animals") | dict.fromkeys(
        ["bear", "teddy"], "bears"
    )
    assert next(iter(found))["classes.txt"] == b"background\nanimals\nbears"


def test_captions(stamps: Path) -> None:
    """The first line; of equal ones the first stamp. One that is missing, not UTF-8 or a translation is none."""
    found = made(stamps)
    assert [TEXT.decode(sample)[0] for sample in found] == [
        "A crow.", "An owl.", "A Bird.", "A fox.", "A bear.", "A teddy bear.",
    ]  # fmt: skip
    (stamps / "animals/birds/crow.txt").unlink()
    (stamps / "animals/birds/owl.txt").write_bytes(b"\xff\n")
    (stamps / "animals/mammals/fox.txt").write_text("de.utf8=Ein Fuchs.\n")
    data = EvaluationSet("t", made(stamps))
    model: Any = type("Model", (), {"device": torch.device("cpu"), "augment": {"text": TEXT, "image": IMAGE}})()
    assert [text for _, text in data.items(model, "text")] == ["A Bird.", "A bear.", "A teddy bear.", "A crow."]
    assert {key for key, _ in data.skipped} == {"animals/birds/crow", "animals/birds/owl", "animals/mammals/fox"}
    assert len(list(data.items(model, "image"))) == 7, "stamps without a caption are not taken for equal ones"


def test_a_stamp_is_not_dropped_for_one_that_is_left_out_itself(stamps: Path) -> None:
    """The pen says what the crow says, which is in a class too small; with both taken, the crow is the first."""
    for i in range(4):
        name = stamps / f"household/arttools/brush-{i}"
        name.with_suffix(".png").write_bytes((stamps / "household/arttools/pen.png").read_bytes())
        name.with_suffix(".txt").write_text(f"Brush {i}.\n")
    assert keys(made(stamps, minimum=5)) == [*(f"brush-{i}" for i in range(4)), "pen"]
    assert "pen" not in keys(made(stamps, minimum=1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_masks_are_of_the_class_and_the_picture_s_size(stamps: Path, mode: str) -> None:
    """Above one half of alpha the class's number, whatever form the alpha has; without any, everywhere."""
    path = stamps / "animals/mammals/fox.png"
    grey = np.full((2, 3), 40, np.uint8)
    if mode == "P":  # a palette whose first colour is transparent
        picture = Image.fromarray((ALPHA > 127).astype(np.uint8), "P")
        picture.putpalette([0, 0, 0, 40, 40, 40])
        picture.save(path, transparency=0)
    elif mode == "RGB":
        Image.fromarray(grey).convert("RGB").save(path)
    else:
        merged = [grey] * (len(mode) - 1) + [ALPHA]
        Image.merge(mode, [Image.fromarray(band) for band in merged]).save(path)
    fox = next(sample for sample in made(stamps) if sample["__key__"] == "animals/mammals/fox")
    assert fox["classes.txt"] == b"background\nbears\nbirds\nmammals"
    assert mask_of(fox) == ([[3, 3, 3]] * 2 if mode == "RGB" else [[0, 0, 3], [3, 0, 3]])
    (seen,) = IMAGE.decode(fox)
    assert seen.size == (3, 2)
    assert seen.getpixel((0, 0)) == ((40, 40, 40) if mode == "RGB" else (255, 255, 255)), "behind it lies `background`"
    assert seen.getpixel((0, 1)) == (40, 40, 40)


def test_pictures_are_read_when_they_are_asked_for(stamps: Path) -> None:
    """A broken one costs its own picture and mask; one that changes changes the fingerprint, as options the place."""
    samples = made(stamps)
    before = fingerprint(samples)
    (stamps / "animals/birds/crow.png").write_bytes(b"no picture")
    assert fingerprint(samples) != before
    assert samples.place != made(stamps, minimum=2).place
    assert TEXT.decode(next(iter(samples))) == ["A crow."]
    assert set(next(iter(samples))) == {"__key__", "__url__", "png", "json", "mask.png", "classes.txt"}
    with pytest.raises(BadSample, match="not a readable picture"):
        IMAGE.decode(next(iter(samples)))
    with pytest.raises(BadSample, match="not a readable picture"):
        next(iter(samples))["mask.png"]


def test_stamps_of_turned_things_are_left_out(stamps: Path) -> None:
    """NAME_mirror.png stands for NAME.png; where there is no NAME.png it is a name as any other."""
    for name in ("fox_mirror", "fox_flip", "fox_mirror_flip", "rear_mirror"):
        (stamps / f"animals/mammals/{name}.png").write_bytes((stamps / "animals/mammals/fox.png").read_bytes())
    assert [key for key in keys(made(stamps)) if "fox" in key or "mirror" in key] == ["fox", "rear_mirror"]


def test_photographs_are_those_of_the_list(stamps: Path) -> None:
    """The crow, the owl and the bear are photographs of the package; the fox is one, too, but in another folder."""
    assert keys(made(stamps, photographs=True)) == ["crow", "owl", "bear"]
    assert keys(made(stamps, photographs=False, distinct=False)) == ["chick", "duck", "fox", "teddy", "pen"]
    listed = [line for line in PHOTOGRAPHS.read_text().splitlines() if not line.startswith("#")]
    assert listed == sorted(set(listed))
    assert not [name for name in listed if "cartoon" in name or "alphabets" in name]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"folder": "HERE/none"}, "HERE/none: no such folder; expected .*apt-get download tuxpaint-stamps-default"),
        ({"folder": "HERE/empty"}, "HERE/empty: holds no stamp; expected the stamps in folders by kind"),
        ({"classes": ["animals/bird"]}, "classes: no stamp below 'animals/bird'; name folders, as animals/birds"),
        ({"minimum": 50}, "the options leave none of its stamps; the largest class has 4 of minimum: 50"),
        ({"classes": ["household"], "photographs": True}, "the options leave none of its stamps; expected"),
    ],
)
def test_what_is_wrong_is_one_clear_error(tmp_path: Path, stamps: Path, options: dict[str, Any], said: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/loose.png").write_bytes((stamps / "animals/mammals/fox.png").read_bytes())
    folder = Path(str(options.pop("folder", stamps)).replace("HERE", str(tmp_path)))
    with pytest.raises(DataError, match=said.replace("HERE", str(tmp_path))) as error:
        made(folder, **options)
    assert "\n" not in str(error.value)
