"""`distill_core.fit`: what `distill run` does, from Python, with callbacks that see its rows and may stop it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launched
from torch import Tensor

import distill_core
from distill_core import StopRun, UserError
from distill_core.tools import Registry, load_recipe, main

pytestmark = pytest.mark.slow
VALIDATED = ["evaluate.every=2"]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(folder) if "loss" in row}


def weights(folder: Path, step: int = 4) -> dict[str, Tensor]:
    file = folder / "checkpoints" / f"step-{step:08d}.pt"
    state: dict[str, Tensor] = torch.load(file, weights_only=True)["objective"]
    return state


def assert_same_end(a: Path, b: Path) -> None:
    """Every weight and every row's loss, bit for bit."""
    assert losses(a) == losses(b)
    assert losses(a).keys() == {1, 2, 3, 4}
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_it_is_distill_run(tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same files, losses, weights, scores and table. Would catch a second way to train that drifts from the
    first."""
    main(["run", str(tiny_recipe), "--runs", str(tmp_path / "cli"), "--set", "train.steps=4"])
    printed = capsys.readouterr().out
    result = distill_core.fit(tiny_recipe, overrides="train.steps=4", runs=tmp_path / "python")
    own, folder = capsys.readouterr().out, tmp_path / "cli" / "tiny"
    assert result.folder == tmp_path / "python" / "tiny"
    assert (result.signal, result.failed, result.unsaved) == (None, [], None)
    assert {path.name for path in result.folder.iterdir()} == {path.name for path in folder.iterdir()}
    assert_same_end(result.folder, folder)
    table = [line for line in printed.splitlines() if "┃" in line or "│" in line]
    assert len(table) > 3
    assert [line for line in own.splitlines() if line in table] == table
    saved = {s["side"] + s["name"]: s["value"] for s in json.loads((folder / "report.json").read_text())["scores"]}
    assert {score.side + score.name: score.value for score in result.scores} == pytest.approx(saved)
    assert distill_core.load(result.folder).encode("text", ["a bird"]).shape == (1, 16)


def test_a_recipe_by_text_or_as_an_object(
    tiny_recipe: Path, tmp_path: Path, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    """Would catch overrides that are lost, and a quiet run that prints its table."""
    short = ["train.steps=1", "evaluate=null"]
    text = distill_core.fit(tiny_recipe.read_text(), overrides=short, runs=tmp_path, quiet=True)
    recipe = load_recipe(tiny_recipe, registry=registry)
    own = distill_core.fit(recipe, overrides=[*short, "name=own"], runs=tmp_path, quiet=True)
    assert [result.folder.name for result in (text, own)] == ["run", "own"]
    assert losses(text.folder) == losses(own.folder)
    assert losses(own.folder).keys() == {1}
    assert capsys.readouterr().out == ""


def test_callbacks_see_every_row(tiny_recipe: Path, tmp_path: Path) -> None:
    """Training and validation rows as metrics.jsonl has them, in order, each when it is there. Would catch a callback
    that changes what trackers or other callbacks get."""
    seen: list[tuple[int, dict[str, Any]]] = []
    file = tmp_path / "tiny" / "metrics.jsonl"

    def spoil(step: int, row: dict[str, Any]) -> None:
        assert len(file.read_text().splitlines()) == len(seen) + 1
        row.clear()

    result = distill_core.fit(
        tiny_recipe, overrides=VALIDATED, callbacks=[spoil, lambda *row: seen.append(row)], runs=tmp_path, quiet=True
    )
    written = rows(result.folder)
    assert [row for _, row in seen] == written
    assert [step for step, _ in seen] == [row["step"] for row in written]
    assert {"validation", "test"} <= {row["split"] for row in written if "scores" in row}


def test_a_callback_stops_the_run_and_distill_resume_continues_it(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit the run that was not stopped."""
    whole = distill_core.fit(tiny_recipe, overrides=VALIDATED, runs=tmp_path / "whole", quiet=True)

    def stop(step: int, row: dict[str, Any]) -> None:
        if "loss" in row and step == 1:
            raise StopRun("good enough")

    result = distill_core.fit(tiny_recipe, overrides=VALIDATED, callbacks=[stop], runs=tmp_path, quiet=True)
    assert result.signal == signal.SIGTERM
    assert result.scores == []
    assert f"good enough: saved at step 2. Continue with: distill resume {result.folder}" in " ".join(
        capsys.readouterr().err.split()
    )
    assert losses(result.folder).keys() == {1, 2}
    assert not (result.folder / "report.json").exists()
    main(["resume", str(result.folder), "--quiet"])
    assert_same_end(result.folder, whole.folder)


def test_an_error_in_a_callback_comes_out_when_the_run_is_saved(tiny_recipe: Path, tmp_path: Path) -> None:
    """A row comes when the next step has moved the weights: would catch those saved as the step's before."""
    whole = distill_core.fit(tiny_recipe, overrides=VALIDATED, runs=tmp_path / "whole", quiet=True)
    later: list[int] = []

    def fail(step: int, row: dict[str, Any]) -> None:
        raise LookupError("a plot is closed")

    callbacks = [fail, lambda step, row: later.append(step)]
    with pytest.raises(LookupError, match="a plot is closed"):
        distill_core.fit(tiny_recipe, overrides=VALIDATED, callbacks=callbacks, runs=tmp_path, quiet=True)
    assert later == []
    assert [path.name for path in (tmp_path / "tiny" / "checkpoints").glob("*.pt")] == ["step-00000002.pt"]
    main(["resume", str(tmp_path / "tiny"), "--quiet"])
    assert_same_end(tmp_path / "tiny", whole.folder)


RANKS = """
import os, sys, distill_core

def stop(step, row):
    seen.append(step)
    raise distill_core.StopRun("enough")

seen = []
short = ["train.steps=12", "data.batch_size=2"]
result = distill_core.fit(sys.argv[1], overrides=short, callbacks=[stop], runs=sys.argv[2], quiet=True)
with open(f"{sys.argv[2]}/rank-{os.environ['RANK']}", "w") as file:
    print(len(seen), result.signal, result.folder, file=file)
"""


def test_two_ranks_stop_together(tiny_recipe: Path, tmp_path: Path) -> None:
    """The first rank's callback stops both, in one folder. Would catch a rank that trains on alone, or waits."""
    (tmp_path / "ranks.py").write_text(RANKS)
    launched(2, tmp_path / "ranks.py", tiny_recipe, tmp_path)
    first, second = ((tmp_path / f"rank-{rank}").read_text().split() for rank in (0, 1))
    assert int(first[0]) > 0
    assert second[0] == "0"
    assert first[1:] == second[1:] == ["15", str(tmp_path / "tiny")]
    (saved,) = (tmp_path / "tiny" / "checkpoints").glob("*.pt")
    assert 2 <= int(saved.stem.removeprefix("step-")) <= 4


@pytest.mark.parametrize(
    "changes",
    [["fusion.heads=many", "loss.1=cross_modal_distilation"], ["data.source.urls=nothing-*.tar"], ["train.steps"]],
    ids=["recipe", "data", "override"],
)
def test_errors_are_those_of_the_command(
    changes: list[str], tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also: nothing is left in `runs`, so that the next attempt has the run's own name."""
    with pytest.raises(SystemExit):
        main(["run", str(tiny_recipe), "--runs", str(tmp_path / "runs"), *(x for c in changes for x in ("--set", c))])
    printed = capsys.readouterr().err.strip()
    with pytest.raises(UserError) as error:
        distill_core.fit(tiny_recipe, overrides=changes, runs=tmp_path / "runs")
    assert str(error.value) == printed
    assert list(tmp_path.glob("runs/*")) == []
    with pytest.raises(UserError, match="no such file, and no recipe of this name"):
        distill_core.fit("cosmos_tinny")
    with pytest.raises(UserError, match=r"recipe:2: augment\.image\.sise"):
        distill_core.fit(tiny_recipe.read_text().replace("size: 16,", "sise: 16,", 1))
