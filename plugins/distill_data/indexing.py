"""`distill data index`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from distill_core import (
    DataError,
    Patience,
    Shard,
    Shards,
    TarShard,
    UserError,
    counted,
    in_words,
    progress_bar,
    tar_shards,
)
from distill_core.tools import is_local, retry

THREADS = 8
"""Shards that are read at once: most of it is waiting."""


@dataclass(frozen=True)
class Indexed:
    """A shard's row of the table. `problem`: why nothing of it can be read; `damage`: or not all."""

    shard: str
    samples: int = 0
    repeated: int = 0
    bytes: int | None = None
    index: str | None = None
    damage: str | None = None
    problem: str | None = None


def run(names: Sequence[str], *, beside: bool) -> list[Indexed]:
    """Index the shards, and write each index beside its shard if it is a plain tar of this machine."""
    shards: list[Shard] = []
    for name in names:
        named = tar_shards(str(Path(name) / "*.tar") if Path(name).is_dir() else name)["data"]
        shards += Shards(named).shards  # raises where one is missing
    with progress_bar(len(shards), "indexing shards") as advance, ThreadPoolExecutor(THREADS) as threads:

        def one(shard: Shard) -> Indexed:
            assert isinstance(shard, TarShard)
            row = _indexed(shard, beside)
            advance()
            return row

        return list(threads.map(one, shards))


def _indexed(shard: TarShard, beside: bool) -> Indexed:
    patience = Patience()
    try:
        samples = retry(lambda: _length(shard, patience), shard, patience)
    except DataError as error:
        return Indexed(shard.name, problem=str(error).removeprefix(f"{shard.name}: "))
    local = is_local(shard.name)
    where = None
    if beside and local and not shard.is_copied:
        try:
            where = str(shard.write_index())
        except OSError as error:
            raise UserError(
                f"{shard.name}: no index can be written beside it ({error.strerror or error}); with --cache it goes to "
                "the cache"
            ) from error
    size = Path(shard.name).stat().st_size if local else None
    return Indexed(shard.name, samples, shard.repeated, size, where, shard.damage)


def _length(shard: TarShard, patience: Patience) -> int:
    shard.prepare(patience)
    return len(shard)


def print_table(rows: Sequence[Indexed], as_json: bool) -> None:
    """The rows and the sum. Raises `UserError` where a shard cannot be read."""
    samples = sum(row.samples for row in rows)
    unreadable = [row for row in rows if row.problem is not None]
    if as_json:
        click.echo(json.dumps({"samples": samples, "shards": [asdict(row) for row in rows]}))
    else:
        _print(rows, samples)
    if unreadable:
        raise UserError(
            f"{counted(len(unreadable), 'shard')} of {len(rows)} cannot be read, the first: {unreadable[0].shard}: "
            f"{unreadable[0].problem}"
        )


def _print(rows: Sequence[Indexed], samples: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("shard", overflow="fold")
    for name in ("samples", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        remarks = [row.problem or "", f"ends early: {row.damage}" if row.damage else ""]
        remarks += [f"{row.repeated} keys stand twice" if row.repeated else ""]
        size = "" if row.bytes is None else in_words(row.bytes)
        table.add_row(row.shard, f"{row.samples}", size, "; ".join(filter(None, remarks)))
    console = Console()
    console.print(table)
    beside = sum(row.index is not None for row in rows)
    console.print(
        f"{samples} samples in {counted(len(rows), 'shard')}; "
        + (f"{counted(beside, 'index', 'indexes')} written beside" if beside else "indexes are in the cache"),
        highlight=False,
    )
