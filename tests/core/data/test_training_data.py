"""What a run says of its data, and does about shards that go: from the recipe to the report."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import distill_core.cli
from distill_core.errors import DataError
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_core.run.folder import RunFolder
from distill_core.train import Trainer

Make = Callable[..., Trainer]


@pytest.fixture
def trainer(tiny_recipe: Path, registry: Registry, tmp_path: Path) -> Make:
    folder = tmp_path / "runs" / "tiny"

    def make(*overrides: str, resume: str | None = None) -> Trainer:
        named = f"data.source.urls={tmp_path}/shards/train-{{000..002}}.tar"
        recipe = load_recipe(tiny_recipe, registry=registry, overrides=["evaluate=null", named, *overrides])
        if resume is None:
            return Trainer(recipe, RunFolder.create(tmp_path / "runs", recipe))
        return Trainer(recipe, RunFolder(folder), resume=resume)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_is_resumed_without_a_shard_that_has_gone(
    trainer: Make, tmp_path: Path, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a resume that refuses, one that never ends, and a loss that neither report nor summary has."""
    first = trainer(f"data.workers={workers}")
    first.run()
    gone = tmp_path / "shards" / "train-001.tar"
    gone.unlink()
    with pytest.raises(DataError, match=r"train-001.tar: does not exist. Check data.source"):
        trainer(f"data.workers={workers}")
    second = trainer(f"data.workers={workers}", "train.steps=12", resume="last")
    second.run()
    report = json.loads((first.folder.path / "report.json").read_text())
    assert report["steps"] == 12
    assert report["skipped_shards"] == 1
    rows = [json.loads(line) for line in second.folder.skipped.read_text().splitlines()]
    assert {row["shard"] for row in rows} == {str(gone)}
    assert "(whole shard)" in {row["key"] for row in rows}
    assert report["skipped_reads"] == len(rows)
    assert f"skipped whole shard: {gone}: cannot be read: No such file" in capfd.readouterr().err.replace("\n", " ")
    for shard in gone.parent.glob("train-*.tar"):
        shard.unlink()
    with pytest.raises(DataError, match=r"train-000.tar: does not exist. .* \(The first of 3, of 3 shards.\)"):
        trainer(resume="last")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_other_shards_are_refused_at_resume_in_one_line(trainer: Make, tmp_path: Path, workers: int) -> None:
    """Of the same number, in another order. Catches a traceback of a worker."""
    made = trainer(f"data.workers={workers}")
    made.run()
    names = [str(tmp_path / "shards" / f"train-00{i}.tar") for i in (1, 0, 2)]
    with pytest.raises(DataError, match="names other shards than the run was started on") as error:
        trainer(f"data.workers={workers}", f"data.source.urls={names}", "train.steps=6", resume="last")
    assert "\n" not in str(error.value)


def test_the_options_of_a_recipe_reach_the_shards(
    trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pipe:` that fails once, with and without retries."""
    mark = shlex.quote(str(tmp_path / "once"))
    urls = [
        f"pipe:[ -e {mark} ] && cat {shlex.quote(str(shard))} || {{ touch {mark}; exit 1; }}"
        for shard in sorted((tmp_path / "shards").glob("train-*.tar"))[:1]
    ]
    setting = f"data.source.urls={json.dumps(urls)}"
    made = trainer(setting, "data.retries=1", "data.workers=0", "name=patient")
    made.run()
    assert not made.folder.skipped.exists()
    (tmp_path / "once").unlink()
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "another cache"))
    with pytest.raises(DataError, match=r"no shard can be read: 1 of 1 failed, .*ended with status 1"):
        trainer(setting, "data.retries=0", "data.workers=0", "name=impatient")


@pytest.mark.slow
def test_a_run_that_loses_too_much_is_saved_and_can_be_resumed(
    trainer: Make, tmp_path: Path, write_shards: Callable[..., list[Path]]
) -> None:
    """With another tolerance. Catches a stop that throws away what was trained."""
    write_shards(tmp_path / "shards", 3, 4, replace={(1, 3): {"png": b"no", "txt": b"a"}})
    options = ("train.steps=6", "data.workers=0", "data.shuffle=1", "seed=2")  # shard 1 comes last
    made = trainer(*options, "data.max_bad_fraction=0")
    with pytest.raises(DataError, match=r"too many samples cannot be used: 1 of the last .*'train-1-3'"):
        made.run()
    assert 0 < made.state.step < 6
    assert made.checkpoints.steps() == [made.state.step]
    again = trainer(*options, resume="last")
    again.run()
    assert again.state.step == 6


@pytest.mark.slow
def test_the_summary_counts_shards(
    tiny_recipe: Path,
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(distill_core.cli, "_registry", lambda: registry)
    shard = tmp_path / "shards" / "train-001.tar"
    shard.write_bytes(shard.read_bytes()[:7000])
    distill_core.cli.main(["run", str(tiny_recipe), "--runs", str(tmp_path / "runs"), "--set", "data.shuffle=1"])
    assert "skipped: 0 samples and 1 shard that could not be used, " in capsys.readouterr().out.replace("\n", " ")
