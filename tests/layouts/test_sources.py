"""What each source makes of what is on disk, and what it says of what is not as it should be."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grey_pictures import TEXT, grey, only, picture, source

from distill_core.data.shard import Unusable
from distill_core.errors import DataError
from distill_core.evaluate.cache import fingerprint
from distill_core.evaluate.sets import EvaluationSet
from distill_layouts.arrow import ParquetTable
from distill_layouts.class_folder import ClassFolder
from distill_layouts.folder import Folder
from distill_layouts.table import Table
from distill_layouts.tables import CsvTable
from distill_vl.caption import WholeCaption


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_rows_of_one_picture_are_a_sample(tmp_path: Path, suffix: str) -> None:
    """Wherever they stand; quotes, commas and line breaks are the format's. The captions are items in evaluation, and
    sentences in training."""
    rows = [("p/a.png", 'he said "no", and\nleft'), ("p/b.png", "b"), ("p/a.png", "a again. Twice")]
    for i, name in enumerate(("a", "b")):
        picture(tmp_path / "pictures" / "p" / f"{name}.png", 100 * i)
    path = tmp_path / f"list.{suffix}"
    with path.open("w", newline="") as file:
        if suffix == "jsonl":
            lines = [{"path": "p/a.png", "title": [rows[0][1], rows[2][1]]}, {"path": "p/b.png", "title": "b"}]
            file.write("\n".join(json.dumps(line) for line in lines))
        else:
            file.write("\ufeff")
            writer = csv.writer(file, delimiter="\t" if suffix == "tsv" else ",")
            writer.writerows([("path", "title"), *rows])
    options = {"test": str(path), "images": str(tmp_path / "pictures"), "image": "path", "caption": "title"}
    made = source(Table, **options)
    assert made.splits(made.config) == ("test",)
    name, samples = only(made.samples("test"))
    assert name == "list"
    assert [sample["__key__"] for sample in samples] == ["p/a.png", "p/b.png"]
    assert [TEXT.decode(sample) for sample in samples] == [['he said "no", and\nleft', "a again. Twice"], ["b"]]
    assert TEXT.pool(samples[0]) == ['he said "no", and', "left", "a again", "Twice"]
    assert [grey(sample) for sample in samples] == [0, 100]
    with pytest.raises(DataError, match=rf"list.{suffix}:1: no column 'caption' \(there are: path, title\)"):
        source(Table, **options | {"caption": "caption"}).samples("test")


def test_a_table_is_read_through_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its index is mapped from the cache as long as the file is the same. Would catch a start that takes minutes each
    time, an index in the memory of every worker, and one of an older table."""
    picture(tmp_path / "a.png")
    path = tmp_path / "t.csv"
    path.write_text("image,caption\n" + "".join(f"a.png,{i}\n" for i in range(50)))
    scans = []
    locate = CsvTable.locate

    def counted(self: CsvTable) -> Any:
        scans.append(self.path)
        return locate(self)

    monkeypatch.setattr(CsvTable, "locate", counted)
    options = {"train": str(path), "key": "caption"}
    for _ in range(2):
        (shards,) = source(Table, **options).sets("train").values()
        table = pickle.loads(pickle.dumps(shards))[0].table
        assert (len(table), len(scans)) == (50, 1)
        assert isinstance(table.index().base, np.memmap)
    (index,) = cache.glob("tables/*.npy")
    index.write_bytes(index.read_bytes()[:100])
    (shards,) = source(Table, **options).sets("train").values()
    assert (sum(map(len, shards)), len(scans)) == (50, 2), "one that is cut off is made again"
    path.write_text("image,caption\na.png,other\n")
    (shards,) = source(Table, **options).sets("train").values()
    assert [sample["__key__"] for shard in shards for sample in shard] == ["other"]


def test_columns_and_fields(tmp_path: Path) -> None:
    """Several columns of captions, a key, and further fields; each by its name in the json."""
    picture(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "short": "s", "long": ["one. two", ""], "id": 7, "label": "cat"},
        {"image": "a.png", "short": None, "long": "l", "id": 8, "label": float("nan")},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"caption": ["short", "long"], "key": "id", "fields": {"class": "label"}}
    _, samples = only(source(Table, train=str(tmp_path / "t.jsonl"), **options).samples("train"))
    assert [sample["__key__"] for sample in samples] == ["7", "8"]
    about = json.loads(samples[0]["json"])
    assert about == {"class": "cat", "short": ["s"], "long": ["one. two"], "references": ["s", "one. two"]}
    assert EvaluationSet("t", samples).labels("class") == {0: "cat"}
    chosen = WholeCaption(WholeCaption.Config(fields=("long",)))
    assert chosen.pool(samples[0]) == ["one", "two"]


def test_classes_of_hugging_face_have_their_names(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    info = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}}}
    table = pyarrow.table({"image": [picture(tmp_path / "a.png").read_bytes()] * 2, "label": [1, 0]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    with pyarrow.OSFile(str(tmp_path / "t.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    made = source(Table, test=str(tmp_path / "t.arrow"), caption=None, fields={"class": "label"})
    assert EvaluationSet("t", only(made.samples("test"))[1]).labels("class") == {0: "dog", 1: "cat"}


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    """The library's own file, with its `Image` and `ClassLabel`; of a `DatasetDict` the split of the name."""
    datasets = pytest.importorskip("datasets")
    paths = [str(picture(tmp_path / f"{i}.png", 50 * i)) for i in range(3)]
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = {"image": paths, "text": ["x", "y", "z"], "label": [0, 1, 0]}
    table = datasets.Dataset.from_dict(rows, features=features).select([2, 0, 1])
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "saved"))
    options = {"caption": "text", "fields": {"class": "label"}}
    made = source(Table, train=str(tmp_path / "saved"), test=str(tmp_path / "saved"), **options)
    _, samples = only(made.samples("train"))
    assert [TEXT.decode(sample) for sample in samples] == [["z"], ["x"], ["y"]]
    assert [grey(sample) for sample in samples] == [100, 0, 50]
    assert set(EvaluationSet("t", samples).labels("class").values()) == {"a", "b"}
    assert len(only(made.samples("test"))[1]) == 1
    with pytest.raises(DataError, match=r"has the splits train, test; name one's folder, as .*saved/train"):
        source(Table, validation=str(tmp_path / "saved"), **options).sets("validation")


def test_parquet_s_copies_keep_to_their_room(tmp_path: Path, cache: Path) -> None:
    """Only the columns that are read are copied, a row group at a time; the oldest copies make room."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = {"image": [bytes([i]) * 10_000 for i in range(40)], "caption": ["c"] * 40, "huge": ["h" * 10**5] * 40}
    parquet.write_table(pyarrow.table(rows), tmp_path / "t.parquet", row_group_size=10)
    ((shard,),) = source(Table, train=str(tmp_path / "t.parquet")).sets("train").values()
    assert len(shard) == 40
    shard.table.room = 250e3 / 1e9
    assert [shard[i]["jpg"][0] for i in range(40)] == list(range(40))
    sizes = [path.stat().st_size for path in cache.glob("tables/*.arrow")]
    assert 1 <= len(sizes) <= 2
    assert max(sizes) < 120_000
    assert shard[0]["jpg"][0] == 0, "one that has gone is made again"


def test_a_folder(tmp_path: Path) -> None:
    """Nested; dots in names; fields by suffix; hidden files and others are no samples; what belongs to none is bad."""
    for name in ("a.jpg", "b/a.v2.PNG", "b/c/d.webp", ".hidden/e.jpg", "._a.jpg"):
        picture(tmp_path / "d" / name)
    (tmp_path / "d" / "a.txt").write_text("an a. Yes")
    (tmp_path / "d" / "b" / "a.v2.json").write_text('{"caption": "a b"}')
    (tmp_path / "d" / "alone.txt").write_text("nobody")
    (tmp_path / "d" / "list.csv").write_text("")
    (tmp_path / "d" / "round").symlink_to(tmp_path / "d")
    _, samples = only(source(Folder, train=str(tmp_path / "d")).samples("train"))
    assert [sample["__key__"] for sample in samples] == ["a", "alone", "b/a.v2", "b/c/d"]
    assert [set(sample) - {"__key__", "__url__"} for sample in samples] == [
        {"jpg", "txt"}, set(), {"png", "json"}, {"webp"},
    ]  # fmt: skip
    assert isinstance(samples[1], Unusable)
    assert samples[1].reason == "only txt of this name are in ."
    assert TEXT.decode(samples[0]) == ["an a. Yes"]
    assert TEXT.decode(samples[2]) == ["a b"]


def test_two_pictures_of_one_name(tmp_path: Path, cache: Path) -> None:
    """Would catch one of them that is lost without a word; and a listing that another user of the cache cannot read."""
    for name in ("a.jpg", "a.jpeg", "b.jpg", "b.png"):
        picture(tmp_path / name)
    _, samples = only(source(Folder, train=str(tmp_path)).samples("train"))
    assert [set(sample) & {"jpg", "png"} for sample in samples] == [set(), {"jpg", "png"}]
    assert isinstance(samples[0], Unusable)
    assert samples[0].reason == "its field is that of several files: a.jpeg, a.jpg"
    assert [path.stat().st_mode & 0o777 for path in cache.rglob("*.*")] == [0o644] * 2


def test_other_modalities_in_folders(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"w")
    (tmp_path / "a.txt").write_text("a sound")
    _, (sample,) = only(source(Folder, train=str(tmp_path), suffixes=[".wav"]).samples("train"))
    assert dict(sample) | {"__url__": ""} == {"__key__": "a", "__url__": "", "wav": b"w", "txt": b"a sound"}


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    """Would catch a key that cannot be hashed or printed."""
    with open(bytes(tmp_path) + b"/\xff.jpg", "wb") as file:
        file.write(picture(tmp_path / "other.jpg").read_bytes())
    _, samples = only(source(Folder, train=str(tmp_path)).samples("train"))
    assert [sample["__key__"] for sample in samples] == ["other", "\\xff"]
    assert grey(samples[1]) == 9
    for sample in samples:
        f"{sample['__key__']} {sample['__url__']}".encode()


NAMES = {
    "mapping.txt": "n02 tench, Tinca tinca\nn01\tgold fish\n",
    "order.txt": "gold fish\ntench, Tinca tinca\n",
    "names.json": json.dumps({"n01": "gold fish", "n02": "tench, Tinca tinca"}),
}


def test_class_folder(tmp_path: Path) -> None:
    """Pictures at any depth; names from each form of file, or the folders' own."""
    for i, name in enumerate(("n01/a.png", "n01/deep/er/b.jpeg", "n02/c.webp")):
        picture(tmp_path / "val" / name, i)
    (tmp_path / "val" / "n01" / "notes.txt").write_text("no picture")
    for file, text in NAMES.items():
        (tmp_path / file).write_text(text)
        made = source(ClassFolder, test=str(tmp_path / "val"), names=str(tmp_path / file))
        name, samples = only(made.samples("test"))
        assert name == "val"
        classes = EvaluationSet("v", samples).labels("class")
        assert classes == {0: "gold fish", 1: "gold fish", 2: "tench, Tinca tinca"}, file
        assert TEXT.decode(samples[0], "class") == ["gold fish"]
    bare = source(ClassFolder, train=str(tmp_path / "val"), test=str(tmp_path / "val"))
    assert bare.splits(bare.config) == ("train", "test")
    assert set(EvaluationSet("v", only(bare.samples("train"))[1]).labels("class").values()) == {"n01", "n02"}
    (tmp_path / "short.txt").write_text("n01 x\n")
    with pytest.raises(DataError, match="names 1 of 2 classes not, as n02"):
        source(ClassFolder, test=str(tmp_path / "val"), names=str(tmp_path / "short.txt")).samples("test")


def test_a_file_that_changes_changes_the_fingerprint(tmp_path: Path) -> None:
    """Would catch embeddings of another picture, or of another caption, that are taken from the cache."""
    path = picture(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("image,caption\na.png,one\n")

    def now() -> str:
        (samples,) = source(Table, test=str(tmp_path / "t.csv")).samples("test").values()
        return fingerprint(samples)

    first = now()
    assert first == now()
    path.write_bytes(b"no picture")
    second = now()
    (tmp_path / "t.csv").write_text("image,caption\na.png,another\n")
    assert len({first, second, now()}) == 3


@pytest.mark.parametrize(
    ("cls", "options", "said"),
    [
        (Table, {"test": "HERE/pairs.xlsx"}, r"not a table: expected \.csv"),
        (Table, {"test": "HERE/none.csv"}, r"none.csv: cannot be read \(No such file or directory\)"),
        (Table, {"test": "HERE/none-*.csv"}, r"none-\*.csv: no file matches"),
        (Table, {"test": "HERE"}, r"is a folder; name the files in it, as HERE/\*\.parquet"),
        (Table, {"test": "HERE/pairs.csv"}, r"lacks the files, as HERE/x\.jpg"),
        (Table, {"test": "HERE/pairs.csv", "images": "HERE/none"}, "HERE/none: no such folder; expected the files of"),
        (Table, {"test": "HERE/pairs.csv", "image": "caption", "caption": "image"}, "lacks the files, as HERE/xxx"),
        (Table, {"test": "HERE/pairs.csv", "key": "id", "caption": "text"}, r"no column 'text', 'id' \(there are: im"),
        (Table, {"test": "HERE/root.csv"}, r"as /etc/hostname \('/etc/hostname' is not a path inside HERE; paths sta"),
        (Table, {"test": "HERE/empty.csv"}, r"empty.csv:1: no column .*\(there are: none\)"),
        (Table, {"test": "HERE/head.csv"}, "head.csv: holds no sample"),
        (Table, {"test": "HERE/mute.csv"}, r"mute.csv: no caption in the first 1 samples \(column caption\); name its"),
        (
            Table,
            {"test": "HERE/open.csv"},
            "open.csv:3: not readable: .*; is there a quotation mark that is never clos",
        ),
        (Table, {"test": "HERE/bad.jsonl"}, r"bad.jsonl:1: no column 'image', 'caption' \(there are: none\)"),
        (Table, {"test": "HERE/bad.parquet"}, "bad.parquet: not a readable parquet file"),
        (Table, {"test": "HERE/bad.arrow"}, "bad.arrow: not a readable Arrow file"),
        (Folder, {"test": "HERE/none"}, r"none: no such folder; expected files \.jpg"),
        (Folder, {"test": "HERE/nothing"}, "nothing: holds no sample"),
        (ClassFolder, {"test": "HERE/none"}, "none: no such folder; expected a folder for each class"),
        (ClassFolder, {"test": "HERE/nothing"}, "nothing: holds no folder; expected a folder for each class"),
    ],
)
def test_what_is_wrong_is_one_clear_error(tmp_path: Path, cls: Any, options: dict[str, str], said: str) -> None:
    if "bad." in options["test"]:
        pytest.importorskip("pyarrow")
    picture(tmp_path / "is.png")
    (tmp_path / "nothing").mkdir()
    for name, text in {
        "pairs.csv": f"image,caption\nx.jpg,{'x' * 300}\n",
        "root.csv": "image,caption\n/etc/hostname,x\n../x.jpg,x\n",
        "empty.csv": "",
        "head.csv": "image,caption\n",
        "mute.csv": "image,caption\nis.png,\n",
        "open.csv": 'image,caption\nis.png,x\nis.png,"' + "y\n" * 10**5,
        "bad.jsonl": "{\n",
        "bad.parquet": "PAR1 or not",
        "bad.arrow": "no arrow",
    }.items():
        (tmp_path / name).write_text(text)
    if "open.csv" in options["test"]:
        old = csv.field_size_limit(10**5)
    here = {name: value.replace("HERE", str(tmp_path)) for name, value in options.items()}
    try:
        with pytest.raises(DataError, match=said.replace("HERE", str(tmp_path))) as error:
            source(cls, **here).samples("test")
    finally:
        if "open.csv" in options["test"]:
            csv.field_size_limit(old)
    assert "\n" not in str(error.value)


def test_rows_of_parquet_are_mapped_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a copy that is opened for each row, and a row group that is copied in whole: batches of few rows."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"image": [f"{i}.png" for i in range(2500)], "caption": [f"caption {i}" for i in range(2500)]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    table = ParquetTable(tmp_path / "t.parquet", "image", ("image", "caption"))
    opened: list[Any] = []
    original = pyarrow.ipc.open_file
    monkeypatch.setattr(pyarrow.ipc, "open_file", lambda file: opened.append(original(file)) or opened[-1])
    for number in (2499, 0, 1000, 999, 1001):
        ((line, row),) = table[number]
        assert (line, row) == (number + 1, {"image": f"{number}.png", "caption": f"caption {number}"})
    (reader,) = opened
    assert max(reader.get_batch(i).num_rows for i in range(reader.num_record_batches)) <= 1000
