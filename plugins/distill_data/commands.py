"""`distill data`. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import click

from distill_core.tools import completion

SPLIT = click.option("--split", default="train", show_default=True, help="Split, if SOURCE is a data source or recipe.")
SET = click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change the recipe, if it is one.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
JOBS = click.option("--jobs", type=click.IntRange(min=1), help="Threads; by default one for each core, at most 16.")


@click.group()
def data() -> None:
    """Look at data, pack it into shards, join something new to it, index it.

    SOURCE is shards (*.tar with wildcards or braces, URLs) or a folder of them, a folder of images with captions beside
    them, a table (.csv, .tsv, .jsonl, .parquet), a data source by its name or as in a recipe ('{name: ..., ...}'), or a
    recipe, whose data source is meant.
    """


@data.command("inspect")
@click.argument("source", shell_complete=completion.recipes)
@click.option("--samples", type=click.IntRange(min=1), help="Look at so many samples, evenly spread; by default all.")
@click.option("--sheet", metavar="FILE.png", help="Write a contact sheet: of a recipe, the views that training sees.")
@JOBS
@SPLIT
@SET
@JSON
def inspect_source(
    source: str,
    samples: int | None,
    sheet: str | None,
    jobs: int | None,
    split: str,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Say what SOURCE holds: samples, fields, sizes, lengths of texts, and what cannot be used, by reason.

    Pictures and texts are read as the augmentations of a recipe read them, if SOURCE is one. --json names every bad
    sample.
    """
    from distill_core import UserError
    from distill_core.tools import Registry
    from distill_data import contact_sheet
    from distill_data.inspection import inspect
    from distill_data.row import named
    from distill_data.table import print_report

    if sheet is not None and not sheet.endswith(".png"):
        raise UserError(f"--sheet {sheet}: a PNG is written: name it FILE.png")
    target = named(source, split, Registry.discover(), overrides)
    inspection, augment = inspect(target, samples, jobs or _cores())
    report = inspection.report(target.title)
    count = None
    if sheet is not None:
        count = contact_sheet.write(Path(sheet), inspection, augment, target.recipe)
    if as_json:
        click.echo(json.dumps(report))
        return
    print_report(report)
    if count is not None:
        click.echo(f"{sheet}: {'views' if target.recipe is not None else 'pictures and texts'} of {count} samples")


@data.command()
@click.argument("shards", nargs=-1, required=True)
@click.option("--cache", is_flag=True, help="Write no file beside the shards: indexes go to the cache alone.")
@JSON
def index(shards: tuple[str, ...], cache: bool, as_json: bool) -> None:
    """Index SHARDS and count their samples: a run that finds SHARD.index.npy beside a shard need not read it first.

    SHARDS are tar files (wildcards and braces), folders of them, or URLs, which are fetched once, and whose indexes go
    to the cache. Beside http(s) URLs an index is found, too: serve it with the shard.
    """
    from distill_data.indexing import print_table, run

    rows = run(shards, beside=not cache)
    print_table(rows, as_json)


@data.command()
@click.argument("source", shell_complete=completion.recipes)
@click.argument("out")
@click.option("--samples", type=click.IntRange(min=1), default=10_000, show_default=True, help="Most samples a shard.")
@click.option("--bytes", "size", help="A shard ends, too, where it reaches this size, as 500MB or 1GB.")
@click.option("--side", type=click.IntRange(min=1), help="Make pictures smaller: their shorter side, in pixels.")
@click.option(
    "--quality", type=click.IntRange(1, 100), default=90, show_default=True, help="Of smaller JPEG and WebP pictures."
)
@click.option(
    "--check/--no-check", "checked", default=True, help="Decode all: what cannot be is left out.  [default: check]"
)
@click.option("--prefix", help="Of the shards' names, if the source has no sets; by default the split.")
@JOBS
@SPLIT
@SET
@JSON
def pack(
    source: str,
    out: str,
    samples: int,
    size: str | None,
    side: int | None,
    quality: int,
    checked: bool,
    prefix: str | None,
    jobs: int | None,
    split: str,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write the samples of SOURCE as shards, with their indexes, into the folder OUT.

    If it is stopped, the same command continues. The shards are the same bytes whatever --jobs. OUT/pack.json names
    every sample that was left out, and why.
    """
    from distill_core.tools import Registry
    from distill_data.pack import pack as packed
    from distill_data.pack import parse_size
    from distill_data.row import named

    most_bytes = None if size is None else parse_size(size)
    target = named(source, split, Registry.discover(), overrides)
    with _resumable():
        report = packed(
            target,
            Path(out),
            prefix=prefix or split,
            samples=samples,
            most_bytes=most_bytes,
            side=side,
            quality=quality,
            checked=checked,
            jobs=jobs or _cores(),
        )
    _print_report(report, Path(out), "pack", as_json)


@data.command()
@click.argument("source", shell_complete=completion.recipes)
@click.argument("new")
@click.argument("out")
@click.option("--key", default="key", show_default=True, help="Column of a table with the samples' keys.")
@click.option("--columns", help="Columns to join, as caption,score; by default all others.")
@click.option("--txt", metavar="COLUMN", help="The column that becomes the samples' txt; others go into their json.")
@click.option("--keys", metavar="FILE", help="Keys of an array's rows, one a line; by default NEW.keys.txt.")
@click.option("--field", default="embedding", show_default=True, help="Name of an array of .npy in the samples.")
@click.option(
    "--several",
    type=click.Choice(["error", "first", "list"]),
    default="error",
    show_default=True,
    help="If a key has several rows: stop, take the first, or make lists.",
)
@click.option("--replace", is_flag=True, help="What the samples have of these names is replaced.")
@click.option("--drop", is_flag=True, help="Leave out samples to which nothing is joined.")
@JOBS
@SPLIT
@SET
@JSON
def join(
    source: str,
    new: str,
    out: str,
    key: str,
    columns: str | None,
    txt: str | None,
    keys: str | None,
    field: str,
    several: Literal["error", "first", "list"],
    replace: bool,
    drop: bool,
    jobs: int | None,
    split: str,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Add the rows of NEW to the samples of SOURCE by key, as new shards in the folder OUT, as many as there are.

    NEW is a table (.jsonl, .csv, .tsv, .parquet), whose columns go into each sample's json, or arrays (.npy,
    .safetensors, as `distill embed` writes), which become fields NAME.npy. If it is stopped, the same command
    continues. OUT/join.json counts the keys without a partner on both sides.
    """
    from distill_core.tools import Registry
    from distill_data.join import join as joined
    from distill_data.join import reader_of
    from distill_data.row import named

    chosen = None if columns is None else columns.split(",")
    reader = reader_of(Path(new), key, chosen, None if keys is None else Path(keys), field)
    target = named(source, split, Registry.discover(), overrides)
    with _resumable():
        report = joined(
            target,
            reader,
            Path(out),
            prefix=split,
            txt=txt,
            several=several,
            replace=replace,
            drop=drop,
            jobs=jobs or _cores(),
        )
    _print_report(report, Path(out), "join", as_json)


def _print_report(report: dict[str, Any], out: Path, verb: str, as_json: bool) -> None:
    from distill_data.pack import recipe_lines
    from distill_data.writing import summary

    if as_json:
        click.echo(json.dumps(report))
        return
    for line in summary(report, f": {out}"):
        click.echo(line)
    if joined := report.get("joined"):
        _print_counts(joined)
    if report["skipped"]:
        click.echo(f"each is named in {out / f'{verb}.json'}")
    for line in recipe_lines(report["urls"]):
        click.echo(line)


def _print_counts(joined: dict[str, Any]) -> None:
    for what, words in (
        ("samples_without_key", "keys of samples are not in it"),
        ("keys_without_sample", "of its keys are no sample's"),
        ("repeated_keys", "of its keys have several rows"),
    ):
        if joined[what]:
            click.echo(f"  {joined[what]} {words}, as {joined['examples'][what][0]!r}")


@contextmanager
def _resumable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        click.echo("stopped; the same command continues after the last whole shard", err=True)
        raise


def _cores() -> int:
    import os

    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
