"""An inspection's report at the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from distill_core import counted


def print_report(report: Mapping[str, Any]) -> None:
    """What it holds, then a table of what cannot be used."""
    console = Console(highlight=False, markup=False)
    for line in lines(report, console.width):
        console.print(line, soft_wrap=True)
    console.print()
    for shard, reason in report["lost_shards"].items():
        console.print(f"not a sample of this shard can be read: {reason or shard}", soft_wrap=True)
    repeated = report["repeated_keys"]
    if repeated["keys"]:
        example = repeated["examples"][0]
        console.print(
            f"{counted(repeated['keys'], 'key')} of several samples each ({repeated['samples']} in all), as "
            f"{example['key']!r} of {example['shard']}: such samples get the same draws",
            soft_wrap=True,
        )
    for name, count in report["absent"].items():
        console.print(f"{counted(count, 'sample')} without {name}, as data.optional allows", soft_wrap=True)
    if not report["bad"]:
        console.print("every sample that was looked at can be used")
        return
    share = 100 * report["bad"] / report["looked_at"]
    console.print(f"{counted(report['bad'], 'sample')} ({share:.2g} %) cannot be used; --json names each:")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("samples", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    table.add_column("the first", overflow="fold")
    for row in report["bad_by_reason"]:
        why = f"{row['modality']}: {row['reason']}" if row["modality"] else row["reason"]
        table.add_row(f"{row['samples']}", why, f"{row['first']['key']} of {row['first']['shard']}")
    console.print(table)


def lines(report: Mapping[str, Any], width: int) -> Iterator[str]:
    """The report as text of at most `width` columns, without the bad samples' table."""
    partly = "" if report["looked_at"] == report["samples"] else f", of which {report['looked_at']} were looked at"
    yield f"{report['source']}: {report['samples']} samples in {counted(report['shards'], 'shard')}{partly}"
    if len(report["sets"]) > 1:
        yield "sets: " + ", ".join(f"{name} {count}" for name, count in report["sets"].items())
    yield "fields: " + ", ".join(f"{name} {count}" for name, count in report["fields"].items())
    for name, sizes in report["pictures"].items():
        width_of, height_of = sizes["width"], sizes["height"]
        yield ""
        if width_of["min"] == width_of["max"] and height_of["min"] == height_of["max"]:
            yield f"{name}: all {width_of['max']:.0f} x {height_of['max']:.0f} pixels"
        else:
            yield (
                f"{name}: {width_of['min']:.0f} to {width_of['max']:.0f} pixels wide, {height_of['min']:.0f} to "
                f"{height_of['max']:.0f} high, median {width_of['median']:.0f} x {height_of['median']:.0f}"
            )
        yield from _bars("shorter side", sizes["shorter side"], width)
    for name, texts in report["texts"].items():
        for what in ("words", "tokens"):
            yield ""
            yield f"{name}: {_in_short(texts[what])} {what} a text"
            yield from _bars(what, texts[what], width)
    for name, measures in report["measures"].items():
        for what, spread in measures.items():
            if what == "sentences" and "sentences a caption" in measures and measures["captions"]["max"] == 1:
                continue  # it would say the same
            yield ""
            words = what if "histogram" in spread else f"{what} a sample"
            yield f"{name}: {_in_short(spread)} {words.replace('captions', 'caption') if spread['max'] == 1 else words}"
            yield from _bars(what, spread, width)


def _in_short(spread: Mapping[str, float]) -> str:
    if spread["min"] == spread["max"]:
        return f"{spread['min']:g}"
    return f"{spread['min']:g} to {spread['max']:g} (mean {spread['mean']:.1f})"


def _bars(what: str, spread: Mapping[str, Any], width: int) -> Iterator[str]:
    bins = spread.get("histogram", [])
    if len(bins) < 2:
        return
    labels = [_label(one["from"], one["to"]) for one in bins]
    longest, most = max(map(len, labels)), max(one["count"] for one in bins)
    room = max(8, min(60, width - longest - len(str(most)) - 6))
    for label, one in zip(labels, bins, strict=True):
        eighths = round(8 * room * one["count"] / most)
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        yield f"  {label:>{longest}}  {bar or ('▏' if one['count'] else '')} {one['count']}"


def _label(low: int | None, high: int | None) -> str:
    if low is None:
        return f"under {high}"
    if high is None:
        return f"{low} and more"
    return f"{low}" if high - low == 1 else f"{low} - {high - 1}"
