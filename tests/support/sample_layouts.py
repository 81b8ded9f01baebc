"""The same samples in every layout that can be trained on."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@dataclass(frozen=True)
class Example:
    """A picture's bytes and its caption: a text, several, or what should have been one."""

    name: str
    picture: bytes
    caption: Any


Source = dict[str, Any]
"""A source's options for training, and under `text` those of the caption augmentation."""


def examples(count: int, seed: int = 0) -> list[Example]:
    """Pictures of noise, each with a caption of three sentences."""
    rng = np.random.default_rng(seed)
    return [Example(f"s{i:03d}", png(rng), f"A thing {i}. It is here {i}. It stays {i}.") for i in range(count)]


def png(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def as_bytes(caption: Any) -> bytes:
    return caption if isinstance(caption, bytes) else str(caption).encode()


def pictures(folder: Path, samples: Sequence[Example]) -> None:
    """In folders of three, as a tree."""
    for i, sample in enumerate(samples):
        path = folder / path_of(i, sample)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.picture)


def path_of(i: int, sample: Example) -> str:
    return f"p{i // 3}/{sample.name}.png"


def json_line(row: dict[str, Any], caption: Any) -> bytes:
    """With the caption as it is, where it is bytes."""
    if isinstance(caption, bytes):
        return json.dumps(row | {"caption": "@"}).encode().replace(b'"@"', caption)
    return json.dumps(row | {"caption": caption}).encode()


def folder_txt(base: Path, samples: Sequence[Example]) -> Source:
    pictures(base / "data", samples)
    for i, sample in enumerate(samples):
        (base / "data" / path_of(i, sample)).with_suffix(".txt").write_bytes(as_bytes(sample.caption))
    return {"name": "folder", "train": str(base / "data")}


def folder_json(base: Path, samples: Sequence[Example]) -> Source:
    pictures(base / "data", samples)
    for i, sample in enumerate(samples):
        (base / "data" / path_of(i, sample)).with_suffix(".json").write_bytes(json_line({}, sample.caption))
    return {"name": "folder", "train": str(base / "data")}


def delimited(suffix: str) -> Callable[[Path, Sequence[Example]], Source]:
    def write(base: Path, samples: Sequence[Example]) -> Source:
        pictures(base / "pictures", samples)
        path = base / f"table.{suffix}"
        with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file, delimiter="\t" if suffix == "tsv" else ",")
            writer.writerow(["file", "title", "id"])
            for i, sample in enumerate(samples):
                text = as_bytes(sample.caption).decode("utf-8", "surrogateescape")
                writer.writerow([path_of(i, sample), text, i])
        return {
            "name": "table", "train": str(path), "images": str(base / "pictures"), "image": "file", "caption": "title",
        }  # fmt: skip

    return write


def json_lines(base: Path, samples: Sequence[Example]) -> Source:
    pictures(base, samples)
    lines = [json_line({"image": path_of(i, sample)}, sample.caption) for i, sample in enumerate(samples)]
    (base / "table.jsonl").write_bytes(b"\n".join(lines))
    return {"name": "table", "train": str(base / "table.jsonl")}


def _arrow_table(samples: Sequence[Example], *, embedded: bool) -> Any:
    pyarrow = pytest.importorskip("pyarrow")
    captions = [None if isinstance(s.caption, float) else s.caption for s in samples]
    kind = pyarrow.list_(pyarrow.string()) if any(isinstance(c, list) for c in captions) else pyarrow.string()
    captions = [[c] if kind != pyarrow.string() and isinstance(c, str) else c for c in captions]
    images = (
        [{"bytes": sample.picture, "path": None} for sample in samples]
        if embedded
        else [path_of(i, sample) for i, sample in enumerate(samples)]
    )
    return pyarrow.table({"image": images, "caption": pyarrow.array(captions, kind), "unread": [0.5] * len(samples)})


def parquet(base: Path, samples: Sequence[Example]) -> Source:
    table = _arrow_table(samples, embedded=False)
    import pyarrow.parquet

    pictures(base, samples)
    pyarrow.parquet.write_table(table, base / "table.parquet", row_group_size=4)
    return {"name": "table", "train": str(base / "table.parquet")}


def parquet_bytes(base: Path, samples: Sequence[Example]) -> Source:
    """Two files, as data sets on the Hub."""
    table = _arrow_table(samples, embedded=True)
    import pyarrow.parquet

    half = len(samples) // 2
    for number, part in enumerate((table.slice(0, half), table.slice(half))):
        pyarrow.parquet.write_table(part, base / f"train-0000{number}-of-00002.parquet", row_group_size=5)
    return {"name": "table", "train": str(base / "train-*.parquet")}


def saved_to_disk(base: Path, samples: Sequence[Example]) -> Source:
    """As `datasets.DatasetDict.save_to_disk` writes it: Arrow's stream format, a folder a split."""
    table = _arrow_table(samples, embedded=True)
    import pyarrow

    folder = base / "saved" / "train"
    folder.mkdir(parents=True)
    (base / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    name = "data-00000-of-00001.arrow"
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}], "_split": "train"}))
    with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return {"name": "table", "train": str(base / "saved")}


def tar(field: str, document: Callable[[Example], bytes]) -> Callable[[Path, Sequence[Example]], Source]:
    def write(base: Path, samples: Sequence[Example]) -> Source:
        for number in range(2):
            with tarfile.open(base / f"0000{number}.tar", "w") as file:
                for sample in samples[number::2]:
                    for name, data in (("jpg", sample.picture), (field, document(sample))):
                        entry = tarfile.TarInfo(f"{sample.name}.{name}")
                        entry.size = len(data)
                        file.addfile(entry, io.BytesIO(data))
        return {"name": "webdataset", "urls": str(base / "{00000..00001}.tar")}

    return write


def dreamlip(sample: Example) -> bytes:
    long = json_line({"raw_caption": f"raw {sample.name}"}, sample.caption)
    return long.replace(b'"caption"', b'"longSV_captions"')


CAPTIONED: dict[str, Callable[[Path, Sequence[Example]], Source]] = {
    "folder_txt": folder_txt,
    "folder_json": folder_json,
    "csv": delimited("csv"),
    "tsv": delimited("tsv"),
    "jsonl": json_lines,
    "parquet": parquet,
    "parquet_bytes": parquet_bytes,
    "saved_to_disk": saved_to_disk,
    "img2dataset_txt": tar("txt", lambda sample: as_bytes(sample.caption)),
    "img2dataset_json": tar("json", lambda sample: json_line({"key": sample.name, "url": "u"}, sample.caption)),
    "dreamlip": tar("json", dreamlip),
    "pixelprose": tar("json", lambda sample: json_line({"original_caption": "an original"}, sample.caption)),
}


def class_folder(base: Path, samples: Sequence[Example]) -> Source:
    pictures(base / "classes", samples)
    return {"name": "class_folder", "train": str(base / "classes")}
