"""Samples that are not as they should be, in every layout: skipped, counted with a reason, named; or read after all."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sample_layouts import CAPTIONED, Example, class_folder, examples

from distill_core.batch import WHOLE_SHARD, Skipped
from distill_core.data.batches import BatchReader, SampleViews
from distill_core.data.lengths import measure
from distill_core.data.order import ShuffledOrder
from distill_core.data.shard import Patience, Shard
from distill_core.registry import Registry
from distill_vl.caption import WholeCaption
from distill_vl.random_crop import RandomCrop

SECONDS = 400
"""For what takes one, on a machine that is not busy."""
COUNT = 7
BAD = 3
"""Which of them is not as it should be."""
TWICE_CAPTIONED = {"dreamlip", "pixelprose"}
"""Layouts whose samples have another caption beside that of the example."""


@pytest.fixture(autouse=True)
def within_seconds() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def shards_of(registry: Registry, options: dict[str, Any]) -> list[Shard]:
    source = registry.get("source", options["name"]).cls
    config = source.Config.model_validate_json(json.dumps({k: v for k, v in options.items() if k != "name"}))
    return [shard for shards in source(config).sets("train").values() for shard in shards]


def reader_of(shards: list[Shard], *, image: bool = True, text: bool = True) -> BatchReader:
    patience = Patience(retries=1)
    lengths = measure(shards, patience).samples
    order = ShuffledOrder(lengths, seed=0, streams=4, shuffle=3)
    augment: dict[str, Any] = {"image": RandomCrop(RandomCrop.Config(size=8))} if image else {}
    if text:
        augment["text"] = WholeCaption(WholeCaption.Config(take="one"))
    views = SampleViews(augment, 0)
    return BatchReader(shards, lengths, order, views, lambda items, fillers: items, patience=patience)  # type: ignore[arg-type, return-value]


def a_pass(shards: list[Shard], *, text: bool = True) -> tuple[list[str], list[Skipped]]:
    """The keys that come in their own place, and what was skipped."""
    reader = reader_of(shards, text=text)
    items: Any = reader.batch(range(reader.order.samples))
    assert isinstance(items, list), items
    return [item.key for item in items if not item.skipped], [skip for item in items for skip in item.skipped]


def reasons(skipped: list[Skipped]) -> dict[str, str]:
    """By key, of which each is there once."""
    assert len({skip.key for skip in skipped}) == len(skipped)
    return {skip.key: skip.reason for skip in skipped}


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def noise(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 black pixels, in a few kilobytes as far as it goes."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(10**6))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def turned() -> bytes:
    exif = Image.Exif()
    exif[274] = 6
    return encoded(noise(), "JPEG", exif=exif)


BAD_PICTURES: dict[str, Callable[[], bytes]] = {
    "zero bytes": lambda: b"",
    "no picture": lambda: b"<html>404</html>",
    "cut off": lambda: encoded(noise(), "PNG")[:900],
    "pixel bomb": bomb,
    "32 bits": lambda: encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"),
}
GOOD_PICTURES: dict[str, Callable[[], bytes]] = {
    "CMYK": lambda: encoded(noise("CMYK"), "JPEG"),
    "16 bits": lambda: encoded(Image.fromarray(np.full((20, 20), 40_000, np.uint16)), "PNG"),
    "palette": lambda: encoded(noise("P"), "PNG", transparency=0),
    "one bit": lambda: encoded(noise("1"), "PNG"),
    "animation": lambda: encoded(noise(), "GIF", save_all=True, append_images=[noise("L")] * 3),
    "EXIF rotation": turned,
}


def with_one(**changes: Any) -> list[Example]:
    samples = examples(COUNT)
    samples[BAD] = replace(samples[BAD], **changes)
    return samples


@pytest.mark.parametrize("layout", [*CAPTIONED, "class_folder"])
def test_bad_pictures(registry: Registry, tmp_path: Path, layout: str) -> None:
    """Would catch a pass that ends, one that loses more than these samples, and a loss that nobody can look up."""
    good = examples(6)
    bad = [Example(f"bad{i}", make(), "a caption") for i, make in enumerate(BAD_PICTURES.values())]
    shards = shards_of(registry, CAPTIONED.get(layout, class_folder)(tmp_path, good + bad))
    came, skipped = a_pass(shards, text=layout != "class_folder")
    assert len(set(came)) == len(good)
    assert len(reasons(skipped)) == len(bad)
    for skip in skipped:
        assert str(tmp_path) in skip.url
        assert "not a readable picture" in skip.reason or "no path and no bytes" in skip.reason
    if "bytes" not in layout and layout != "saved_to_disk":
        assert {skip.key.rpartition("/")[2].partition(".")[0] for skip in skipped} == {sample.name for sample in bad}


@pytest.mark.parametrize("layout", [*CAPTIONED, "class_folder"])
def test_pictures_of_other_kinds_are_read(registry: Registry, tmp_path: Path, layout: str) -> None:
    """CMYK, 16 bits, a palette, one bit, an animation, an EXIF rotation."""
    samples = [Example(f"s{i}", make(), f"a caption {i}") for i, make in enumerate(GOOD_PICTURES.values())]
    shards = shards_of(registry, CAPTIONED.get(layout, class_folder)(tmp_path, samples))
    came, skipped = a_pass(shards, text=layout != "class_folder")
    assert skipped == []
    assert len(set(came)) == len(samples)


MISSING, WRONG = "no caption", "other than text"
BAD_CAPTIONS: dict[str, tuple[Any, str, set[str]]] = {
    # caption, reason, layouts that can hold it
    "empty": ("", MISSING, set(CAPTIONED)),
    "white space": (" \n ", MISSING, set(CAPTIONED)),
    "null": (None, MISSING, {"folder_json", "jsonl", "parquet", "img2dataset_json", *TWICE_CAPTIONED}),
    "empty list": ([], MISSING, {"folder_json", "jsonl", "parquet", "saved_to_disk", "img2dataset_json"}),
    "list of empty": (["", " "], MISSING, {"folder_json", "jsonl", "parquet", "img2dataset_json"}),
    "NaN": (float("nan"), WRONG, {"folder_json", "img2dataset_json", *TWICE_CAPTIONED}),
    "NaN in a table": (float("nan"), MISSING, {"jsonl", "parquet", "saved_to_disk"}),
    "NaN in a list": (["a", float("nan")], WRONG, {"folder_json", "jsonl", "img2dataset_json", *TWICE_CAPTIONED}),
    "a number": (7, WRONG, {"folder_json", "jsonl", "img2dataset_json", *TWICE_CAPTIONED}),
    "an object": ({"a": 1}, WRONG, {"folder_json", "jsonl", "img2dataset_json", *TWICE_CAPTIONED}),
    "no UTF-8": (
        b'"\xff\xfe"',
        "UTF-8|utf-8",
        {"folder_txt", "folder_json", "csv", "tsv", "jsonl", "img2dataset_txt", "img2dataset_json", *TWICE_CAPTIONED},
    ),
    "no json": (b"{", "not readable json", {"folder_json", "jsonl", "img2dataset_json", *TWICE_CAPTIONED}),
    "deep json": (b"[" * 10**5, "not readable json", {"folder_json", "jsonl", "img2dataset_json", *TWICE_CAPTIONED}),
}


@pytest.mark.parametrize(
    ("fault", "layout"),
    [(fault, layout) for fault, (_, _, layouts) in BAD_CAPTIONS.items() for layout in CAPTIONED if layout in layouts],
)
def test_a_bad_caption(registry: Registry, tmp_path: Path, layout: str, fault: str) -> None:
    """A sample with another caption beside an empty one is used."""
    caption, reason, _ = BAD_CAPTIONS[fault]
    shards = shards_of(registry, CAPTIONED[layout](tmp_path, with_one(caption=caption)))
    came, skipped = a_pass(shards)
    if reason == MISSING and layout in TWICE_CAPTIONED:
        assert (len(set(came)), skipped) == (COUNT, [])
        return
    (skip,) = skipped
    assert len(set(came)) == COUNT - 1
    assert str(tmp_path) in skip.url
    assert any(words in skip.reason for words in reason.split("|")), skip.reason


@pytest.mark.parametrize("layout", CAPTIONED)
def test_a_caption_of_a_megabyte(registry: Registry, tmp_path: Path, layout: str) -> None:
    """Of 100,000 sentences. Would catch a limit of a field's size, and what takes time by its square."""
    text = "A word. " * 125_000
    came, skipped = a_pass(shards_of(registry, CAPTIONED[layout](tmp_path, with_one(caption=text))))
    assert (len(set(came)), skipped) == (COUNT, [])


TABLES = ("csv", "tsv", "jsonl", "parquet")


@pytest.mark.parametrize("layout", TABLES)
@pytest.mark.parametrize("path", ["../s003", "/etc/s003", "p1/../../s003", "x\0y"])
def test_a_path_that_leads_out(
    registry: Registry, tmp_path: Path, layout: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a row that reads what lies outside of the folder of images."""
    samples = examples(COUNT)
    options = CAPTIONED[layout](tmp_path, samples)
    monkeypatch.setattr("sample_layouts.pictures", lambda *arguments: None)
    monkeypatch.setattr(
        "sample_layouts.path_of", lambda i, sample: path if i == BAD else f"p{i // 3}/{sample.name}.png"
    )
    options = CAPTIONED[layout](tmp_path, samples)
    came, (skip,) = a_pass(shards_of(registry, options))
    assert len(set(came)) == COUNT - 1
    assert "is not a path inside" in skip.reason
    assert "table." in skip.url
    assert skip.url.endswith(f":{BAD + {'csv': 2, 'tsv': 2}.get(layout, 1)}")


@pytest.mark.parametrize("layout", ["img2dataset_txt", "dreamlip"])
@pytest.mark.parametrize("name", ["../s003", "/etc/s003"])
def test_keys_of_tars_are_names_alone(registry: Registry, tmp_path: Path, layout: str, name: str) -> None:
    samples = with_one(name=name)
    came, skipped = a_pass(shards_of(registry, CAPTIONED[layout](tmp_path, samples)))
    assert (set(came), skipped) == ({sample.name for sample in samples}, [])


@pytest.mark.parametrize("layout", TABLES)
def test_a_key_of_two_pictures(registry: Registry, tmp_path: Path, layout: str) -> None:
    """Rows of one key are one sample: with two pictures it is a bad one, which is named with both lines."""
    samples = examples(COUNT)
    options = CAPTIONED[layout](tmp_path, samples)
    column = options.get("caption", "caption")
    samples[5] = replace(samples[5], caption=samples[BAD].caption)
    options = CAPTIONED[layout](tmp_path, samples) | {"key": column}
    came, (skip,) = a_pass(shards_of(registry, options))
    first = {"csv": 2, "tsv": 2}.get(layout, 1)
    assert len(set(came)) == COUNT - 2
    assert f"its key is also that of line {first + 5}, which has another" in skip.reason
    assert skip.key == samples[BAD].caption


@pytest.mark.parametrize("layout", ["csv", "tsv"])
def test_a_row_with_columns_too_many(registry: Registry, tmp_path: Path, layout: str) -> None:
    options = CAPTIONED[layout](tmp_path, examples(COUNT))
    path = Path(options["train"])
    lines = path.read_text().splitlines()
    lines[1 + BAD] += ("," if layout == "csv" else "\t") + "more"
    path.write_text("\n".join(lines))
    came, (skip,) = a_pass(shards_of(registry, options))
    assert len(set(came)) == COUNT - 1
    assert (skip.key, skip.url) == (f"row {2 + BAD}", f"{path}:{2 + BAD}")
    assert skip.reason == "has 4 columns, and the first line names 3"


@pytest.mark.parametrize("layout", ["folder_txt", "folder_json", *TABLES, "class_folder"])
def test_a_picture_that_goes(registry: Registry, tmp_path: Path, layout: str) -> None:
    """After the run began; it is missed in each pass, and is used again where it is there again."""
    write = CAPTIONED.get(layout, class_folder)
    shards = shards_of(registry, write(tmp_path, examples(COUNT)))
    (path,) = tmp_path.rglob("s003.png")
    content = path.read_bytes()
    path.unlink()
    came, (skip,) = a_pass(shards, text=layout != "class_folder")
    assert len(set(came)) == COUNT - 1
    assert "s003.png: cannot be read: No such file" in skip.reason
    assert skip.url == str(path)
    path.write_bytes(content)
    came, skipped = a_pass(shards, text=layout != "class_folder")
    assert (len(set(came)), skipped) == (COUNT, [])


@pytest.mark.parametrize("layout", ["csv", "jsonl", "parquet_bytes", "saved_to_disk"])
@pytest.mark.parametrize("how", ["goes", "changes"])
def test_a_table_that_goes_or_changes(
    registry: Registry, tmp_path: Path, layout: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the run began: tried again, then a shard that is skipped for the pass. Catches rows of another table."""
    monkeypatch.setattr("distill_core.data.shard.wait_before_retry", lambda failures: None)
    options = CAPTIONED[layout](tmp_path, examples(COUNT))
    (tmp_path / "other").mkdir()
    shards = shards_of(registry, options) + shards_of(registry, CAPTIONED["csv"](tmp_path / "other", examples(3)))
    reader = reader_of(shards, image=False)
    (path, *_) = [*sorted(tmp_path.glob("t*.*")), *tmp_path.rglob("*.arrow")]
    aside = path.rename(tmp_path / "aside")
    if how == "changes":
        path.write_bytes(aside.read_bytes() + b"\n")
    items: Any = reader.batch(range(reader.order.samples))
    skipped = [skip for item in items for skip in item.skipped]
    assert {skip.key for skip in skipped} == {WHOLE_SHARD}
    assert {skip.url for skip in skipped} == {f"{path}[0:{len(shards[0])}]"}
    assert len(skipped) == len(shards[0])
    assert (": cannot be read: No such file" if how == "goes" else "has changed since the run began") in str(skipped[0])
    aside.rename(path)
    again: Any = reader.batch(range(reader.order.samples, 2 * reader.order.samples))
    assert [skip for item in again for skip in item.skipped] == []
