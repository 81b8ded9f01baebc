"""`distill kernels` says what runs here, and why the rest does not."""

import csv
import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import device

from distill_kernels import tune as tuning
from distill_kernels.defaults import table_path
from distill_kernels.dispatch import OPS
from distill_vl import diagnostics
from distill_vl.commands import kernels


def test_every_op_is_listed_with_a_reason_for_what_cannot_run() -> None:
    rows = json.loads(CliRunner().invoke(kernels, ["--json"], catch_exceptions=False).output)
    assert {row["op"] for row in rows} == set(OPS)
    for op in OPS:
        answers = {row["backend"]: row["runs"] for row in rows if row["op"] == op}
        assert answers["reference"] == "yes"
        assert all(answer == "yes" or len(answer) > 10 for answer in answers.values())
    text = CliRunner().invoke(kernels, [], catch_exceptions=False).output
    assert "cross_attention" in text
    assert "auto" in text.splitlines()[-1]


@pytest.mark.slow
def test_tune_writes_the_table_that_auto_goes_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real measurement on the smallest op's cases; the table names every bucket's backends, fastest first."""
    monkeypatch.setenv("DISTILL_KERNEL_TABLES", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    name = "cross_attention"
    monkeypatch.setattr(tuning, "OPS", {name: OPS[name]})
    result = CliRunner().invoke(kernels, ["--tune", "--device", "cpu", "--json"], catch_exceptions=False)
    rows = json.loads(result.output)
    with table_path(device("cpu")).open(newline="") as file:
        written = list(csv.DictReader(file))
    assert {row["op"] for row in written} == {name}
    for rule in written:
        times = {row["backend"]: row["ms"] for row in rows if row["inputs"] == rule["when"]}
        assert rule["backends"].split() == sorted(times, key=lambda backend: times[backend])
    from distill_kernels.machine import forget

    forget()


@pytest.mark.parametrize(
    ("reason", "says", "advice"),
    [
        ("for CUDA 12 and do not load in torch 2.13.0", "its kernels do not load", "pip install 'selfdistill[gpu]'"),
        (None, "its kernels load", ""),
    ],
)
def test_doctor_says_which_pair_is_installed(
    monkeypatch: pytest.MonkeyPatch, reason: str | None, says: str, advice: str
) -> None:
    pytest.importorskip("xformers")
    monkeypatch.setattr(diagnostics, "why_not_built", lambda: reason)
    (row,) = (row for row in diagnostics.kernels() if row.name == "xformers")
    assert row.value == f"{version('xformers')} with torch {torch.__version__}: {says}"
    assert advice in row.warning
    assert (reason or "") in row.warning
