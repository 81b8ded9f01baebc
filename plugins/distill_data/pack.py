"""`distill data pack`: any source's samples to tar shards and their indexes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from distill_core import BadSample, DataError, Patience, Sample, Skipped, progress_bar, stable_hash
from distill_data.fields import check, fields_of, smaller
from distill_data.row import Named, Row, in_order
from distill_data.writing import SETLESS, Folder, Packed, member_key
from distill_vl.pictures import PictureAugmentation
from distill_vl.random_crop import RandomCrop

A = TypeVar("A")


def pack(
    source: Named,
    out: Path,
    *,
    prefix: str,
    samples: int,
    most_bytes: int | None,
    side: int | None,
    quality: int,
    checked: bool,
    jobs: int,
) -> dict[str, Any]:
    """Write the shards, and return the report. Raises `UserError`."""
    row = Row(source.sets, Patience())
    made_from = {
        "verb": "pack",
        "source": identity(row),
        "prefix": prefix,
        "samples": samples,
        "bytes": most_bytes,
        "side": side,
        "quality": quality if side is not None else None,
        "check": checked,
        "pillow": _pillow() if side is not None else None,
    }
    folder = Folder(out, "pack", made_from)
    packer = Packer(row, side=side, quality=quality, checked=checked)

    def is_full(count: int, size: int, position: int) -> bool:
        return count >= samples or (most_bytes is not None and size >= most_bytes)

    with folder.open():
        if folder.complete is not None:
            return folder.complete
        write(folder, row, packer, jobs, prefix, is_full, "packing")
        return folder.finish({})


def write(
    folder: Folder,
    row: Row,
    make: Callable[[int], A],
    jobs: int,
    prefix: str,
    is_full: Callable[[int, int, int], bool],
    what: str,
    noted: Callable[[], None] = lambda: None,
    results_of: Callable[[Iterator[A]], Iterator[Packed | Skipped]] = iter,  # type: ignore[assignment]
) -> None:
    """The results of `make` from where the folder ends, with a progress bar; `results_of` takes them in order."""
    only = set(row.sets) == {SETLESS}

    def set_of(position: int) -> str:
        """ "" after the last."""
        if position == len(row):
            return ""
        return prefix if only else row.sets[row.shard(position)]

    start = folder.end
    with progress_bar(len(row), what, done=start) as advance:

        def shown(results: Iterator[A]) -> Iterator[A]:
            for result in results:
                yield result
                advance()

        folder.write(results_of(shown(in_order(make, range(start, len(row)), jobs))), set_of, is_full, noted)


class Packer:
    """Position -> the sample as it is written, or why it is not."""

    def __init__(self, row: Row, *, side: int | None, quality: int, checked: bool) -> None:
        self.row, self.side, self.quality, self.checked = row, side, quality, checked
        self.pictures: PictureAugmentation = RandomCrop(RandomCrop.Config())

    def __call__(self, position: int) -> Packed | Skipped:
        sample = self.row.read(position)
        try:
            return self.packed(sample)
        except BadSample as error:
            return Skipped(str(sample["__key__"]), str(sample["__url__"]), str(error))

    def packed(self, sample: Sample) -> Packed:
        """Raises `BadSample`."""
        key, notes = str(sample["__key__"]), []
        fields = fields_of(sample)
        if (written := member_key(key)) != key:
            notes.append("keys written with %2E, %2F or %5F in place of what cannot stand in a file's name")
        changed: set[str] = set()
        if self.side is not None:
            fields, changed = smaller(fields, self.side, self.quality)
        if changed:
            notes.append(f"pictures made smaller, to {self.side} pixels")
        if self.checked:  # what has been made smaller was decoded for it
            check({name: value for name, value in fields.items() if name not in changed}, self.pictures)
        return Packed(written, fields, tuple(notes))


def identity(row: Row) -> dict[str, Any]:
    """What tells a row from another: the fingerprint of each shard, or its name where it has none."""
    prints = []
    with progress_bar(len(row.shards), "looking for changes") as advance:
        for shard in row.shards:
            prints.append(shard.fingerprint() or shard.name)
            advance()
    return {"shards": len(prints), "samples": len(row), "digest": f"{stable_hash(*prints, *row.lengths, *row.sets):x}"}


def _pillow() -> str:
    import PIL

    return PIL.__version__


def parse_size(text: str) -> int:
    """`500MB`, `1.5GB` -> bytes. Raises `DataError`."""
    units = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
    number = text.strip().lower().rstrip("kmgb")
    unit = text.strip().lower()[len(number) :]
    try:
        size = float(number) * units[unit]
    except (ValueError, KeyError):
        raise DataError(f"--bytes {text}: write a size, as 500MB or 1.5GB") from None
    if size < 1:
        raise DataError(f"--bytes {text}: must be at least 1")
    return int(size)


def recipe_lines(urls: Any) -> Sequence[str]:
    """What a recipe says to train on them."""
    import json

    return [f"data.source: {{name: webdataset, urls: {json.dumps(urls)}}}"]
