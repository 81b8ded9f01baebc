"""`distill data join`: samples as they are, and what a table or an array has for their keys."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distill_core import BadSample, Patience, Skipped, UserError
from distill_data.fields import fields_of
from distill_data.pack import identity, write
from distill_data.partners import ARRAYS, TABLES, Arrays, Partners, Reader, Table
from distill_data.row import Named, Row
from distill_data.writing import Folder, Packed, member_key

NOTHING = "nothing is to be joined to its key"


def reader_of(new: Path, key: str, columns: Sequence[str] | None, keys: Path | None, field: str) -> Reader:
    """What reads a file of rows. Raises `UserError` for one that is none."""
    try:
        open(new, "rb").close()
    except OSError as error:
        raise UserError(f"{new}: cannot be read: {error.strerror or error}") from error
    if new.suffix in TABLES:
        return Table(new, key, columns)
    if new.suffix in ARRAYS:
        return Arrays(new, keys or new.with_suffix(".keys.txt"), field)
    raise UserError(f"{new}: is none of {', '.join((*TABLES, *ARRAYS))}")


def join(
    source: Named,
    reader: Reader,
    out: Path,
    *,
    prefix: str,
    txt: str | None,
    several: Literal["error", "first", "list"],
    replace: bool,
    drop: bool,
    jobs: int,
) -> dict[str, Any]:
    """Write the shards, as many as the source has, and return the report. Raises `UserError`."""
    row = Row(source.sets, Patience())
    made_from = {
        "verb": "join",
        "source": identity(row),
        **reader.identity(),
        "prefix": prefix,
        "several": several,
        "txt": txt,
        "replace": replace,
        "drop": drop,
    }
    folder = Folder(out, "join", made_from)

    def is_full(count: int, size: int, position: int) -> bool:
        return row.shard(position) != row.shard(position - 1)

    with folder.open():
        if folder.complete is not None:
            return folder.complete
        partners = Partners(out / ".join.sqlite", reader, reader.identity() | {"several": several})
        finished = False
        try:
            if not partners.is_built():
                folder.restart()  # which keys have met a sample is known to the database alone
                partners.build(several)
            elif isinstance(reader, Table):
                reader.prepare()
            joiner = Joiner(row, partners, txt=txt, several=several == "list", replace=replace, drop=drop)
            write(folder, row, joiner, jobs, prefix, is_full, "joining", partners.commit, joiner.marked)
            report = folder.finish({"joined": partners.counts()})
            finished = True
            return report
        finally:
            partners.close(remove=finished)


class Joiner:
    """Position -> the sample with what its key has, or why it is not written."""

    def __init__(
        self, row: Row, partners: Partners, *, txt: str | None, several: bool, replace: bool, drop: bool
    ) -> None:
        self.row, self.partners = row, partners
        self.txt, self.several, self.replace, self.drop = txt, several, replace, drop

    def __call__(self, position: int) -> tuple[Packed | Skipped, str | None]:
        """And the key of the rows that it was joined with."""
        sample = self.row.read(position)
        key, url = str(sample["__key__"]), str(sample["__url__"])
        try:
            fields, written = fields_of(sample), member_key(key)
        except BadSample as error:
            return Skipped(key, url, str(error)), None
        partner = self.partners.of(key)
        if partner is None:
            if self.drop:
                return Skipped(key, url, NOTHING), None
            return Packed(written, fields, ("samples without anything new",)), None
        name, rows = partner
        try:
            self._add(fields, rows, f"{url}: sample {key!r}")
        except BadSample as error:
            return Skipped(key, url, str(error)), None
        return Packed(written, fields, ("samples joined",)), name

    def marked(self, results: Iterator[tuple[Packed | Skipped, str | None]]) -> Iterator[Packed | Skipped]:
        """The samples, each noted as with or without a partner as it goes by."""
        for result, name in results:
            if isinstance(result, Packed) or result.reason == NOTHING:
                self.partners.mark(name, result.key)
            yield result

    def _add(self, fields: dict[str, bytes], rows: list[dict[str, Any]], place: str) -> None:
        """Raises `UserError` for what stands there already, `BadSample` for a json that is no object."""
        document: dict[str, Any] = {}
        for column in rows[0]:
            values = [row[column] for row in rows]
            value = values if self.several else values[0]
            if isinstance(values[0], np.ndarray):
                file = io.BytesIO()
                np.save(file, np.stack(values) if self.several else values[0])
                self._set(fields, f"{column}.npy".lower(), file.getvalue(), place)
            elif column == self.txt:
                text = "\n".join(map(str, values)) if self.several else str(value)
                self._set(fields, "txt", text.encode(), place)
            else:
                document[column] = value
        if document:
            try:
                before = json.loads(fields.get("json", b"{}"))
            except ValueError as error:
                raise BadSample(f"field json: not json: {error}") from error
            if not isinstance(before, dict):
                raise BadSample("field json: no object, so that no column fits into it")
            for name, value in document.items():
                self._set(before, name, value, f"{place}: its json")
            fields["json"] = json.dumps(before, ensure_ascii=False).encode()

    def _set(self, into: dict[str, Any], name: str, value: Any, place: str) -> None:
        if name in into and not self.replace:
            raise UserError(f"{place}: has a {name!r} already: choose --replace, or other names")
        into[name] = value
