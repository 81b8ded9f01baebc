"""What `distill data` takes for SOURCE: whatever a user has, and shards come out of all of it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill_core import Sample, TarShard
from distill_core.cli import main


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five JPEGs in two folders, each with a caption beside it, the last one broken; and a table of them."""
    folder = tmp_path / "photos"
    with open(tmp_path / "table.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for i in range(5):
            path = folder / f"part{i // 3}" / f"no.{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            made = io.BytesIO()
            Image.fromarray(np.full((30 + i, 40, 3), i, np.uint8)).save(made, "JPEG")
            path.write_bytes(made.getvalue() if i < 4 else b"broken")
            path.with_suffix(".txt").write_text(f"picture {i}")
            writer.writerow([str(path.relative_to(tmp_path)), f"picture {i}"])
    return folder


def samples(out: Path) -> list[Sample]:
    return [sample for path in sorted(out.glob("*.tar")) for sample in TarShard(path)]


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_a_folder_of_images_with_captions(
    tmp_path: Path, photos: Path, jobs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files are fields of one sample each; a name with a dot is still one key."""
    main(["data", "pack", str(photos), str(tmp_path / "out"), "--jobs", jobs])
    made = samples(tmp_path / "out")
    assert [sample["__key__"] for sample in made] == ["part0/no%2E0", "part0/no%2E1", "part0/no%2E2", "part1/no%2E3"]
    assert [sample["txt"] for sample in made] == [b"picture %d" % i for i in range(4)]
    assert made[3]["jpg"] == (photos / "part1" / "no.3.jpg").read_bytes()
    (bad,) = json.loads((tmp_path / "out" / "pack.json").read_text())["skipped"].values()
    assert bad == 1
    assert "left out 1: field jpg: not a readable picture" in capsys.readouterr().out


def test_a_table(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its path; and what is packed of it takes new captions by the table's own keys."""
    table = str(tmp_path / "table.csv")
    main(["data", "inspect", table, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["samples"], report["bad"]) == (5, 1)
    main(["data", "pack", table, str(tmp_path / "out")])
    new = tmp_path / "new.jsonl"
    new.write_text(json.dumps({"image": "photos/part0/no.1.jpg", "score": 0.5}))
    main(["data", "join", str(tmp_path / "out"), str(new), str(tmp_path / "joined"), "--key", "image", "--drop"])
    (sample,) = samples(tmp_path / "joined")
    document = json.loads(sample["json"])
    assert (document["score"], document["references"]) == (0.5, ["picture 1"])


def test_a_table_whose_columns_are_named(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = f'{{name: table, train: "{tmp_path}/table.csv", caption: null}}'
    main(["data", "inspect", source, "--samples", "3", "--json"])
    assert json.loads(capsys.readouterr().out)["looked_at"] == 3


@pytest.mark.slow
def test_a_run_trains_on_what_was_packed(tmp_path: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line that the command prints is one that a recipe takes."""
    monkeypatch.chdir(tmp_path)
    main(["data", "pack", str(tiny_recipe), "packed", "--samples", "5", "--side", "18"])
    urls = json.loads((tmp_path / "packed" / "pack.json").read_text())["urls"]
    options = ["--set", f"data.source.urls={json.dumps(urls)}", "--set", "train.steps=2", "--set", "evaluate=null"]
    main(["run", str(tiny_recipe), *options, "--quiet"])
    assert any(Path("runs").glob("*/report.json"))
