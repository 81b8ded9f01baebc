"""kernels/bench/results.csv: one schema for all ops, and defaults that follow from it."""

from __future__ import annotations

import csv
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill_kernels.dispatch import OPS, load_op

BENCH = Path(__file__).resolve().parents[2] / "kernels" / "bench"


def rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="") as file:
        yield from csv.DictReader(file)


def test_every_row_is_a_ratio_of_an_op() -> None:
    """Every op but none without a measurement; a ratio is the baseline's time over ours, and its row is there, once."""
    seen = set()
    for row in rows(BENCH / "results.csv"):
        assert row["op"] in OPS
        ours, baseline, ratio = (float(row[name]) for name in ("ours_ms", "baseline_ms", "ratio"))
        assert ratio > 0
        # Times are rounded to .1 ms in the oldest rows.
        low, high = ((baseline + s * 0.06) / max(ours - s * 0.06, 1e-3) for s in (-1, 1))
        assert low - 0.006 <= ratio <= high + 0.006, row
        assert row["device"]
        assert row["torch"]
        case = tuple(row[name] for name in ("op", "backend", "baseline", "shape", "dtype", "training", "device"))
        assert case not in seen
        seen.add(case)
    assert {case[0] for case in seen} == set(OPS)
    backends = {name: {b.name for b in load_op(name).backends} for name in OPS}
    measured = {name: {case[1] for case in seen if case[0] == name} for name in OPS}
    for name in OPS:
        assert len(backends[name] & measured[name]) >= 2, name


def test_a_script_replaces_the_rows_of_its_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of no other: another device's row stays, and a second run does not add to the first."""
    out = tmp_path / "results.csv"
    first = next(rows(BENCH / "results.csv"))
    out.write_text(",".join(first) + "\n" + ",".join(value or "" for value in (first | {"device": "another"}).values()))
    script = str(BENCH / "bench_info_nce.py")
    command = [script, "--losses", "sigmoid", "--shapes", "1x2x4x8"]
    command += ["--dtypes", "float32", "--rounds", "1", "--device", "cpu", "--out", str(out)]
    counts = []
    for _ in range(2):
        with monkeypatch.context() as patch:  # the script finds its neighbors by itself
            patch.setattr(sys, "argv", command)
            patch.setattr(sys, "path", list(sys.path))
            runpy.run_path(script, run_name="__main__")
        counts.append(len(list(rows(out))))
    assert counts[0] == counts[1] > 2
    assert [row["device"] for row in rows(out)].count("another") == 1
    new = [row for row in rows(out) if row["device"] != "another"]
    assert {row["op"] for row in new} == {"multi_view_sigmoid"}
    assert [row["auto"] for row in new].count("1") == 1
    for row in new:
        assert row["ratio"] == "1.0" or row["backend"] != row["baseline"]
        assert row["python"]
