"""`distill data inspect`: what is counted, what is named, and what the sheet shows."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reading import Write
from tars import write_tar

from distill_core import TarShard
from distill_core.cli import main


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")


def picture(width: int, height: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(file, kind)
    return file.getvalue()


def report(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    main(["data", "inspect", *arguments, "--json", "--jobs", "2"])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_sizes_and_lengths_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: would catch width and height that are exchanged, and words that are taken for tokens."""
    captions = [b"one", b"a red bird. it sings", b"two words. three words here. four"]
    sizes = [(40, 30), (100, 70), (31, 200)]
    pairs = enumerate(zip(sizes, captions, strict=True))
    samples = [(f"k{i}", {"jpg": picture(*size, "JPEG"), "txt": text}) for i, (size, text) in pairs]
    found = report(str(write_tar(tmp_path / "a.tar", samples)), capsys=capsys)
    assert (found["samples"], found["looked_at"], found["shards"], found["bad"]) == (3, 3, 1, 0)
    assert found["fields"] == {"jpg": 3, "txt": 3}
    sides = found["pictures"]["image"]
    assert (sides["width"]["min"], sides["width"]["median"], sides["width"]["max"]) == (31, 40, 100)
    assert (sides["height"]["min"], sides["height"]["max"]) == (30, 200)
    assert sides["shorter side"]["histogram"] == [
        {"from": None, "to": 32, "count": 2},
        {"from": 32, "to": 64, "count": 0},
        {"from": 64, "to": 96, "count": 1},
    ]
    words = found["texts"]["text"]["words"]
    assert (words["min"], words["median"], words["max"]) == (1, 5, 6)
    tokens = found["texts"]["text"]["tokens"]
    assert tokens["min"] == 3  # start, "one", end
    measures = found["measures"]["text"]
    assert measures["captions"]["max"] == 1
    assert [one["count"] for one in measures["sentences a caption"]["histogram"]] == [1, 1, 1]


def test_every_kind_of_bad_sample_is_named_with_its_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"jpg": picture(20, 20, "JPEG"), "txt": b"a bird"}
    bad: dict[str, tuple[Mapping[str, bytes], str]] = {
        "none": ({"txt": b"a bird"}, "no picture"),
        "broken": (good | {"jpg": b"broken"}, "not a readable picture"),
        "zero": (good | {"jpg": b""}, "not a readable picture"),
        "cut": (good | {"jpg": picture(200, 200, "JPEG")[:400]}, "not a readable picture"),
        "mute": ({"jpg": good["jpg"]}, "no caption"),
        "blank": (good | {"txt": b" \n"}, "no caption"),
        "latin": (good | {"txt": b"caf\xe9"}, "UTF-8"),
        "json": ({"jpg": good["jpg"], "json": b"{"}, "json"),
        "nan": ({"jpg": good["jpg"], "json": b'{"captions": [NaN]}'}, ""),
    }
    path = write_tar(
        tmp_path / "a.tar", [("g0", good), *((key, fields) for key, (fields, _) in bad.items()), ("g1", good)]
    )
    found = report(str(path), capsys=capsys)
    named = {one["key"]: one for one in found["bad_samples"]}
    assert set(named) == set(bad)
    assert found["bad"] == len(bad)
    for key, (_, reason) in bad.items():
        assert named[key]["shard"] == str(path)
        assert reason in named[key]["reason"]
    assert sum(one["samples"] for one in found["bad_by_reason"]) == len(found["bad_samples"])
    main(["data", "inspect", str(path)])
    printed = capsys.readouterr().out
    assert "9 samples (82 %) cannot be used" in printed
    assert max(map(len, printed.splitlines()[3:])) <= 100


def test_shards_that_are_damaged_or_no_tar(
    tmp_path: Path, write_shards: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_shards(tmp_path / "in", 3, 8)
    paths[0].write_bytes(b"no tar" * 300)
    os.truncate(paths[1], 15_000)
    found = report(str(tmp_path / "in"), capsys=capsys)
    assert list(found["lost_shards"]) == [str(paths[0])]
    (rest,) = found["bad_samples"]
    assert (rest["shard"], rest["key"]) == (str(paths[1]), "(rest of the shard)")
    assert found["samples"] == 8 + len(TarShard(paths[1]))


def test_a_modality_that_nothing_has_is_nobodys_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures without texts can be trained on; a broken one among them is bad all the same."""
    samples = [(f"k{i}", {"png": picture(8, 8)}) for i in range(5)] + [("broken", {"png": b"no"})]
    found = report(str(write_tar(tmp_path / "a.tar", samples)), "--sheet", str(tmp_path / "s.png"), capsys=capsys)
    assert (found["bad"], [one["key"] for one in found["bad_samples"]]) == (1, ["broken"])
    assert found["texts"] == {}
    assert (tmp_path / "s.png").is_file()


def test_what_a_recipe_allows_to_be_absent(
    tmp_path: Path, tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`data.optional`, as training reads it. Would catch a picture without a text among the bad samples, a text that
    cannot be read taken for none, and a sample without anything that is taken for good."""
    photo = picture(30, 30)
    samples = [
        ("both", {"png": photo, "txt": b"a boat"}),
        ("photo", {"png": photo}),
        ("words", {"txt": b"a tree"}),
        ("broken", {"png": b"no picture", "txt": b"a boat"}),
        ("none", {"cls": b"3"}),
    ]
    path = write_tar(tmp_path / "a.tar", samples)
    source = ["--set", f"data.source={{name: webdataset, urls: {path}}}", "--set", "evaluate=null"]
    strict = report(str(tiny_recipe), *source, capsys=capsys)
    assert (strict["bad"], strict["absent"]) == (4, {})
    some = report(str(tiny_recipe), *source, "--set", "data.optional=[text]", capsys=capsys)
    assert {bad["key"] for bad in some["bad_samples"]} == {"words", "broken", "none"}
    loose = [*source, "--set", "data.optional=[image, text]", "--set", "fusion=null", "--set", "teacher=null"]
    loose += ["--set", "loss=[{name: clip}]"]
    found = report(str(tiny_recipe), *loose, capsys=capsys)
    assert found["absent"] == {"text": 1, "image": 1}
    reasons = {bad["key"]: bad["reason"] for bad in found["bad_samples"]}
    assert reasons.keys() == {"broken", "none"}
    assert reasons["none"].startswith("it has no modality at all (image: ")
    sheet = tmp_path / "views.png"
    main(["data", "inspect", str(tiny_recipe), *loose, "--sheet", str(sheet)])
    said = capsys.readouterr().out
    assert "1 sample without text, as data.optional allows" in said
    assert f"{sheet}: views of 3 samples" in said


def test_keys_that_stand_twice_are_counted(
    tmp_path: Path, write_shards: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """In two shards, where no reader notices: their views would be drawn alike."""
    fields = {"png": picture(8, 8), "txt": b"a"}
    write_tar(tmp_path / "in" / "a.tar", [("x", fields), ("y", fields)])
    write_tar(tmp_path / "in" / "b.tar", [("z", fields), ("x", fields)])
    repeated = report(str(tmp_path / "in"), capsys=capsys)["repeated_keys"]
    assert (repeated["keys"], repeated["samples"]) == (1, 2)
    assert [one["key"] for one in repeated["examples"]] == ["x", "x"]


def test_a_part_is_spread_evenly(tmp_path: Path, write_shards: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch a look at the first samples alone."""
    write_shards(tmp_path / "in", 2, 10, replace={(1, 9): {"png": b"broken", "txt": b"a"}})
    found = report(str(tmp_path / "in"), "--samples", "5", capsys=capsys)
    assert (found["samples"], found["looked_at"]) == (20, 5)
    assert [one["key"] for one in found["bad_samples"]] == ["train-1-9"]


def test_a_recipe_shows_the_views_of_training(
    tmp_path: Path, tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two global and a local view of 16 and 8 pixels: would catch a sheet of the pictures as they are."""
    out = tmp_path / "sheet.png"
    main(["data", "inspect", str(tiny_recipe), "--sheet", str(out), "--set", "augment.image.local=2"])
    assert f"{out}: views of 12 samples" in capsys.readouterr().out
    with Image.open(out) as page:
        assert page.width == 2 * 640 + 3 * 16
        assert np.asarray(page.convert("RGB")).std() > 10


def test_the_sheet_shows_views_of_several_modalities_at_once(tmp_path: Path, tiny_recipe: Path) -> None:
    """The page of a recipe whose flips depend on the captions is another one. Would catch a sheet of the modalities'
    own draws."""
    pages = {}
    for words in ("[[no, such]]", "[[a, the]]"):
        out = tmp_path / "sheet.png"
        joint = f"augment.image+text={{name: caption_aware_flips, words: {words}}}"
        main(["data", "inspect", str(tiny_recipe), "--sheet", str(out), "--set", joint])
        with Image.open(out) as page:
            pages[words] = np.asarray(page.convert("RGB"))
    ours, own = pages["[[a, the]]"], pages["[[no, such]]"]
    assert ours.shape == own.shape
    assert not np.array_equal(ours, own)


def test_what_is_asked_wrongly(tmp_path: Path, tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, what in (
        ([str(tiny_recipe), "--sheet", "s.jpg"], "name it FILE.png"),
        ([str(tiny_recipe), "--split", "nope"], "has no split 'nope'"),
        (["emoji", "--set", "data.workers=0"], "give the options of a data source"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["data", "inspect", *arguments])
        assert end.value.code == 2
        assert what in capsys.readouterr().err
