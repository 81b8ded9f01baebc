"""`distill kernels` says what runs here, and why the rest does not."""

import csv
import json
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from distill_core import Diagnostic
from distill_core.errors import UserError
from distill_kernels import tune as tuning
from distill_kernels.defaults import table_path
from distill_kernels.dispatch import OPS
from distill_kernels.machine import forget
from distill_kernels.measure import Seconds, interleaved
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


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The real measurement, but one round of single calls; tables lie in the folder that is returned."""
    monkeypatch.setenv("DISTILL_KERNEL_TABLES", str(tmp_path / "tables"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def once(calls: dict[str, Callable[[], object]], *, rounds: int, device: torch.device) -> dict[str, Seconds]:
        return interleaved(calls, rounds=1, device=device, least_seconds=0)

    monkeypatch.setattr(tuning, "interleaved", once)
    forget()
    yield tmp_path / "tables"
    forget()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(kernels, [*arguments], catch_exceptions=False)


def written(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.iterdir()
    assert path == table_path(torch.device("cpu"))
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_tune_writes_the_table_that_auto_goes_by(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one op's own cases; the table names every class's backends, fastest first."""
    name = "cross_attention"
    monkeypatch.setattr(tuning, "OPS", {name: OPS[name]})
    times = json.loads(run("--tune", "--device", "cpu", "--json").output)
    rules = written(quick)
    assert {row["op"] for row in rules} == {name}
    for rule in rules:
        of_class = {row["backend"]: row["milliseconds"] for row in times if row["inputs"] == rule["when"]}
        assert rule["backends"].split() == sorted(of_class, key=lambda backend: of_class[backend])


@pytest.mark.slow
def test_tune_a_recipe(quick: Path, tiny_recipe: Path) -> None:
    """Its own shapes, those of forms that were not chosen as well; a step then goes by what was measured."""
    recipe = str(tiny_recipe)
    before = json.loads(run(recipe, "--device", "cpu", "--json").output)
    text = run("--tune", recipe, "--device", "cpu").output
    rules = {(row["op"], row["when"]): row["backends"].split() for row in written(quick)}
    assert text.splitlines()[-1] == f"`auto` now goes by {table_path(torch.device('cpu'))}"
    more = {*rules} - {(row["op"], row["inputs"]) for row in before}
    assert len(more) == len(rules) - len(before)
    assert {op for op, _ in more} == {"cross_attention", "self_attention"}, "of projected pools, and of packed loops"
    pools = [order for (op, _), order in rules.items() if op == "cross_attention_pool"]
    assert all({*order} == {"projected", "absorbed"} for order in pools)
    assert text.count(" ms\n") == sum(len(order) for order in rules.values())

    forget()
    required = {"self_attention", "cross_attention"}  # of few tokens: correctness decides there
    for row in json.loads(run(recipe, "--device", "cpu", "--json").output):
        if not (row["op"] in required and row["why"].startswith("correctness")):
            assert row["why"] == "measured: here (distill kernels --tune)"
            assert row["backend"] == rules[row["op"], row["inputs"]][0]
    assert run().output.splitlines()[-1] == f"`auto` goes by {table_path(torch.device('cpu'))}"


def test_doctor_says_that_a_table_is_damaged(quick: Path) -> None:
    def row() -> Diagnostic:
        (found,) = (row for row in diagnostics.kernels() if row.name == "auto goes by")
        return found

    assert (row().value[:12], row().warning) == ("the defaults", "")
    path = table_path(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    path.parent.mkdir()
    path.write_text("op,device\n")
    assert row().value == str(path)
    assert row().warning.startswith("its columns are not op, device, model")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_needs_the_device(quick: Path) -> None:
    with pytest.raises(UserError, match="torch sees no GPU"):
        run("--tune", "--device", "cuda")


def test_tune_says_where_it_cannot_write(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick.write_text("a file")
    monkeypatch.setattr(tuning, "OPS", {"cross_attention": OPS["cross_attention"]})
    monkeypatch.setattr(tuning, "_times", lambda op, inputs, rounds: {"sdpa": 1.0})
    with pytest.raises(UserError, match="name a folder that can be written to in DISTILL_KERNEL_TABLES"):
        run("--tune", "--device", "cpu")


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
