"""Layouts of benchmarks on disk: small ones are written, read, scored; and wrong ones are told apart."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grey_pictures import IMAGE, TEXT, grey, only, picture, source
from PIL import Image
from tars import write_tar

from distill_benchmarks.captioned import Dci, Karpathy, Urban1k
from distill_benchmarks.clip_benchmark import ClipBenchmark
from distill_core.data.shard import Patience
from distill_core.errors import BadSample, DataError
from distill_core.evaluate.cache import fingerprint
from distill_core.evaluate.sets import EvaluationSet


def test_karpathy(tmp_path: Path) -> None:
    """COCO's layout and Flickr's (no `filepath`); `val` is validation, `restval` trains; five captions at most."""
    rows = [
        ("val2014", "a.jpg", "test", ["one", "two", "three", "four", "five", "six"]),
        ("train2014", "b.jpg", "restval", ["b"]),
        ("val2014", "c.jpg", "val", ["c", "c again"]),
        ("val2014", "d.jpg", "test", ["d"]),
    ]
    for i, (folder, file, _, _) in enumerate(rows[:-1]):
        picture(tmp_path / "coco" / folder / file, 10 * i)
    images = [
        {"filepath": folder, "filename": file, "split": split, "sentences": [{"raw": text} for text in texts]}
        for folder, file, split, texts in rows
    ]
    file = tmp_path / "dataset_coco.json"
    file.write_text(json.dumps({"dataset": "coco", "images": images}))
    made = source(Karpathy, annotations=str(file), images=str(tmp_path / "coco"))
    name, found = only(made.samples("test"))
    assert name == "coco"
    assert [sample["__key__"] for sample in found] == ["a.jpg", "d.jpg"]
    assert TEXT.decode(found[0]) == ["one", "two", "three", "four", "five"]
    with pytest.raises(BadSample, match="No such file"):
        IMAGE.decode(found[1])
    assert (
        len(TEXT.decode(only(source(Karpathy, **made.config.model_dump() | {"captions": None}).samples("test"))[1][0]))
        == 6
    )
    assert grey(only(made.samples("train"))[1][0]) in (9, 10, 11)
    assert TEXT.decode(only(made.samples("validation"))[1][0]) == ["c", "c again"]
    assert made.samples("other") == {}
    for row in images:
        del row["filepath"]
    file.write_text(json.dumps({"images": images}))
    flat = source(Karpathy, annotations=str(file), images=str(tmp_path / "coco" / "val2014"))
    assert only(flat.samples("test"))[0] == "dataset_coco"


def test_a_sample_s_picture_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    """Captions of a set whose pictures are all broken can be read; a picture that changes changes the fingerprint."""
    paths = [tmp_path / "image" / f"{i}.jpg" for i in (1, 2, 10)]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no picture")
        text = tmp_path / "caption" / f"{path.stem}.txt"
        text.parent.mkdir(exist_ok=True)
        text.write_text(f"\na long caption of {path.stem}. It goes on.\nnot this\n")
    samples = source(Urban1k, folder=str(tmp_path)).samples("test")["urban1k"]
    assert [TEXT.decode(sample) for sample in samples] == [[f"a long caption of {i}. It goes on."] for i in (1, 2, 10)]
    with pytest.raises(BadSample, match="not a readable picture"):
        IMAGE.decode(next(iter(samples)))
    before = fingerprint(samples)
    assert before == fingerprint(source(Urban1k, folder=str(tmp_path)).samples("test")["urban1k"])
    paths[1].write_bytes(b"still no picture")
    assert fingerprint(samples) != before


def test_urban1k_names_what_lacks_its_other_half(tmp_path: Path) -> None:
    """A picture without a caption, and a caption without a picture: both are counted with their key."""
    for name in ("1", "2"):
        picture(tmp_path / "image" / f"{name}.jpg", 5)
    (tmp_path / "caption").mkdir()
    for name in ("2", "3"):
        (tmp_path / "caption" / f"{name}.txt").write_text("words")
    found = EvaluationSet("u", source(Urban1k, folder=str(tmp_path)).samples("test")["urban1k"])
    model: Any = type("Model", (), {"device": torch.device("cpu"), "augment": {"text": TEXT, "image": IMAGE}})()
    assert [i for i, _ in found.items(model, "image")] == [0, 1]
    assert [i for i, _ in found.items(model, "text")] == [1, 2]
    assert sorted(found.skipped) == [("1", "text"), ("3", "image")]


def test_dci(tmp_path: Path) -> None:
    """The short caption and the long one as one text; everything is `test`, or the file's own splits."""
    for i in range(3):
        picture(tmp_path / "photos" / f"sa_{i}.jpg", 40 * i)
        about = {"image": f"sa_{i}.jpg", "short_caption": f"short {i}.", "extra_caption": f" long {i} " if i else ""}
        path = tmp_path / "annotations" / f"{i}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(about | {"mask_data": {}}))
    splits = {"train": ["0.json"], "valid": ["1.json"], "test": ["2.json"]}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    _, found = only(source(Dci, folder=str(tmp_path)).samples("test"))
    assert [TEXT.decode(sample) for sample in found] == [["short 0."], ["short 1.\nlong 1"], ["short 2.\nlong 2"]]
    assert [abs(grey(sample) - 40 * i) < 3 for i, sample in enumerate(found)] == [True] * 3
    before = fingerprint(made := source(Dci, folder=str(tmp_path)).samples("test")["dci"])
    picture(tmp_path / "photos" / "sa_1.jpg", 200)
    assert fingerprint(made) != before, "a photo that came later"
    (tmp_path / "photos" / "sa_1.jpg").unlink()
    own = source(Dci, folder=str(tmp_path), whole=False)
    assert own.splits(own.config) == ("train", "validation", "test")
    assert [sample["__key__"] for sample in only(own.samples("validation"))[1]] == ["1.json"]
    (tmp_path / "annotations" / "1.json").write_text("{}")
    with pytest.raises(BadSample, match="not an annotation of DCI"):
        TEXT.decode(found[1])


def tar(path: Path, samples: list[dict[str, bytes]]) -> None:
    write_tar(path, [(f"s{i:07d}", sample) for i, sample in enumerate(samples)])


def webp(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, "WEBP", lossless=True)
    return file.getvalue()


def test_clip_benchmark(tmp_path: Path) -> None:
    """Shards in the order of their numbers, as many as are counted; a class out of range is left out, and told."""
    samples = [{"webp": webp(i), "cls": str(i % 3).encode()} for i in range(4)]
    for i in range(4):
        tar(tmp_path / "test" / f"{i}.tar", samples[i : i + 1])
    (tmp_path / "test" / "nshards.txt").write_text("3\n")
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    made = source(ClipBenchmark, folder=str(tmp_path))
    name, found = only(made.samples("test"))
    assert name == tmp_path.name
    assert [grey(sample) for sample in found] == [0, 1, 2]
    data = EvaluationSet("c", made.samples("test")[name])
    assert data.labels("class") == {0: "cat", 1: "dog"}
    model: Any = type("Model", (), {"device": torch.device("cpu"), "augment": {"text": TEXT}})()
    assert dict(data.items(model, "text", "class")) == {0: "cat", 1: "dog"}
    assert list(data.skipped) == [("s0000000", "text")]
    assert made.sets("train") == {}
    (tmp_path / "classnames.txt").write_text("#\n\ndog\n")
    again = EvaluationSet("c", made.samples("test")[name])
    assert again.labels("class") == {0: "#", 2: "dog"}, "a name is its line, whatever it holds"
    before = fingerprint(made.samples("test")[name])
    (tmp_path / "classnames.txt").write_text("kitten\ndog\n")
    assert fingerprint(made.samples("test")[name]) != before


def test_clip_benchmark_trains(tmp_path: Path) -> None:
    """By number, in another process, with the same json as in order. Would catch shards whose labels stay numbers, and
    a damaged sample that gets a json and so looks good."""
    tar(tmp_path / "train" / "0.tar", [{"webp": webp(i), "cls": str(i % 2).encode()} for i in range(3)])
    tar(tmp_path / "test" / "0.tar", [{"webp": webp(5), "cls": b"0"}])
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    _, (shard,) = only(source(ClipBenchmark, folder=str(tmp_path)).sets("train"))
    copied = pickle.loads(pickle.dumps(shard))
    copied.prepare(Patience())
    assert [(grey(copied[i]), json.loads(copied[i]["json"])["class"]) for i in (1, 0)] == [(1, "dog"), (0, "cat")]
    assert [dict(sample) for sample in shard] == [dict(copied[i]) for i in range(3)]
    data = (tmp_path / "train" / "0.tar").read_bytes()
    (tmp_path / "train" / "0.tar").write_bytes(data[:4700])
    _, (cut,) = only(source(ClipBenchmark, folder=str(tmp_path)).sets("train"))
    with pytest.raises(BadSample, match=r"0\.tar: cannot be read"):
        cut[len(cut) - 1]["json"]


def test_numbers_that_are_no_plain_digits(tmp_path: Path) -> None:
    """`int` fails on what `str.isdigit` allows, and on too many digits."""
    tar(
        tmp_path / "test" / "0.tar",
        [{"webp": webp(i), "cls": text} for i, text in enumerate((b"1", "²".encode(), b"9" * 5000))],
    )
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    made = source(ClipBenchmark, folder=str(tmp_path))
    assert EvaluationSet("c", made.samples("test")[tmp_path.name]).labels("class") == {0: "dog"}
    (tmp_path / "test" / "nshards.txt").write_text("²")
    with pytest.raises(DataError, match="should hold the number of shards, not '²'"):
        made.samples("test")
    for name in ("²", "2"):
        picture(tmp_path / "image" / f"{name}.jpg", 5)
    (tmp_path / "caption").mkdir()
    _, found = only(source(Urban1k, folder=str(tmp_path)).samples("test"))
    assert [sample["__key__"] for sample in found] == ["²", "2"]


def test_clip_benchmark_retrieval(tmp_path: Path) -> None:
    tar(tmp_path / "test" / "0.tar", [{"jpg": webp(9), "txt": b"one\ntwo\n\nthree"}])
    (tmp_path / "dataset_type.txt").write_text("retrieval\n")
    made = source(ClipBenchmark, folder=str(tmp_path))
    _, (found,) = only(made.samples("test"))
    assert TEXT.decode(found) == ["one", "two", "three"]
    (tmp_path / "dataset_type.txt").write_text("multilabel\n")
    with pytest.raises(DataError, match="of type 'multilabel' nothing is known"):
        made.samples("test")


@pytest.mark.parametrize(
    ("cls", "options", "said"),
    [
        (Karpathy, {"annotations": "HERE/none.json", "images": "HERE"}, r"none.json: cannot be read .*expected \{"),
        (Karpathy, {"annotations": "HERE/list.json", "images": "HERE"}, "list.json: not in Karpathy's layout"),
        (Karpathy, {"annotations": "HERE/cut.json", "images": "HERE"}, "cut.json: not readable json"),
        (Karpathy, {"annotations": "HERE/one.json", "images": "HERE/no"}, "HERE/no: no such folder"),
        (Karpathy, {"annotations": "HERE/one.json", "images": "HERE"}, r"lacks the files, as HERE/val2014/x\.jpg"),
        (Urban1k, {"folder": "HERE/none"}, "none: no such folder; expected image/NAME.jpg and caption/NAME.txt"),
        (Urban1k, {"folder": "HERE"}, "HERE/image: no such folder"),
        (Dci, {"folder": "HERE"}, "splits.json: cannot be read"),
        (Karpathy, {"annotations": "HERE/nul.json", "images": "HERE"}, r"nul.json: not in .*x\\+x00.jpg.* inside HERE"),
        (Karpathy, {"annotations": "HERE/up.json", "images": "HERE"}, r"up.json: not in .*'\.\.' is not a path inside"),
        (Dci, {"folder": "HERE/dci"}, r"splits.json: .*'\.\./\.\./x.json' is not a path inside"),
        (ClipBenchmark, {"folder": "HERE/none"}, "none: no such folder; expected test/nshards.txt"),
    ],
)
def test_what_is_wrong_is_one_clear_error(tmp_path: Path, cls: Any, options: dict[str, str], said: str) -> None:
    row = {"filepath": "val2014", "filename": "x.jpg", "split": "test", "sentences": [{"raw": "x"}]}
    (tmp_path / "one.json").write_text(json.dumps({"images": [row]}))
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "cut.json").write_text('{"images": [')
    for name, change in (("nul", {"filename": "x\0.jpg"}), ("up", {"filepath": ".."})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"images": [row | change]}))
    for name in ("photos", "annotations"):
        (tmp_path / "dci" / name).mkdir(parents=True)
    (tmp_path / "dci" / "splits.json").write_text('{"test": ["../../x.json"]}')
    here = {name: value.replace("HERE", str(tmp_path)) for name, value in options.items()}
    with pytest.raises(DataError, match=said.replace("HERE", str(tmp_path))) as error:
        source(cls, **here).samples("test")
    assert "\n" not in str(error.value)
