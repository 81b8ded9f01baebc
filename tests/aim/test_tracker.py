"""What a run leaves in Aim's repository, read back by Aim."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distill_core.run.folder import RunFolder


@pytest.fixture(scope="module")
def kept(aim_run: RunFolder) -> Iterator[Any]:
    from aim import Repo

    repo = Repo(str(aim_run.path.parent))
    # a finished run is in Aim's index once its page, or `aim storage reindex`, has seen it
    repo._recreate_index()
    yield repo.get_run(json.loads((aim_run.path / "aim.json").read_text())["run"])
    repo.close()


@pytest.mark.slow
def test_curves_are_the_rows(aim_run: RunFolder, kept: Any) -> None:
    """Would catch series that are cut off, shifted by a step, or mixed up between splits."""
    rows = [row for row in aim_run.rows() if "terms" in row]
    found = {}
    for metric in kept.metrics():
        at, (values, *_) = metric.data.items_list()
        found[metric.name, metric.context.to_dict()["subset"]] = at, values
    steps, losses = found["loss", "train"]
    assert list(steps) == [row["step"] for row in rows] == list(range(1, 13))
    assert np.allclose(losses, [row["loss"] for row in rows])
    assert np.allclose(found["loss/contrastive", "train"][1], [row["terms"]["contrastive"] for row in rows])
    for split, at in (("validation", [6, 12]), ("test", [12])):
        steps, values = found["teacher/retrieval/M", split]
        assert list(steps) == at
        assert np.allclose(
            values, [row["scores"]["teacher/retrieval/M"] for row in aim_run.rows() if row.get("split") == split]
        )


def test_a_run_is_found_by_its_components(aim_run: RunFolder, kept: Any) -> None:
    """By Aim's own query language. Would catch tags, recipe or environment that cannot be searched."""
    from aim import Repo

    report = json.loads((aim_run.path / "report.json").read_text())
    assert {"vit", "cross_attention", "retrieval"} <= set(kept.tags)
    assert kept["recipe"]["train"]["steps"] == 12
    assert kept["environment"]["versions"] == report["versions"]
    assert kept["environment"].get("git") == report.get("git")
    repo = Repo(str(aim_run.path.parent))
    for query, runs in [
        ("'cross_attention' in run.tags and run.recipe.fusion.name == 'cross_attention'", 1),
        ("'clip' in run.tags", 0),
        ("run.recipe.teacher.momentum < 0.5", 0),
        (f"run.environment.versions.python == '{report['versions']['python']}'", 1),
    ]:
        assert len(list(repo.query_runs(query, report_mode=0).iter_runs())) == runs, query
    repo.close()


def test_pictures_and_distributions(aim_run: RunFolder, kept: Any) -> None:
    """Would catch pictures that do not open, captions that are lost, and histograms of something else."""
    pictures = [
        (sequence.name, sequence.context.to_dict(), step, image)
        for name, context, _ in kept.iter_sequence_info_by_type(("aim.image",))
        for sequence in [kept.get_image_sequence(name, context)]
        for step, image in _values(sequence)
    ]
    views = [(context, step, image) for name, context, step, image in pictures if name == "views"]
    assert sorted({step for _, step, _ in views}) == [1, 6, 12]
    assert {context["sample"] for context, _, _ in views} == {"train-0-0", "train-1-0"}
    for context, _, image in views:
        assert image.caption.splitlines()[0] == context["sample"]
        assert image.caption.count("text, global: ") == 2
        assert image.to_pil_image().size[0] == 640
    assert {(name, context["subset"]) for name, context, _, _ in pictures if name.startswith("retrieval")} == {
        (f"retrieval/{way}", split) for way in ("image_to_text", "text_to_image") for split in ("validation", "test")
    }
    (report,) = [image for name, _, _, image in pictures if name == "report"]
    with Image.open(aim_run.path / "report.png") as drawn:
        assert report.to_pil_image().size == drawn.size
    totals = {
        context["pairs"]: sum(distribution.weights)
        for name, where, _ in kept.iter_sequence_info_by_type(("aim.distribution",))
        for sequence in [kept.get_distribution_sequence(name, where)]
        if (context := sequence.context.to_dict())["subset"] == "test" and context["model"] == "student"
        for _, distribution in _values(sequence)
    }
    assert totals == {"positive": 4, "negative": 12}


def _values(sequence: Any) -> Iterator[tuple[int, Any]]:
    """(step, picture or distribution) of a sequence that holds one at each step."""
    for step, (value, *_) in sequence.data.items():
        yield int(step), value[0] if isinstance(value, list) else value


@pytest.mark.slow
def test_the_repository_is_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--runs runs` is relative: would catch a `distill ui RUN` from elsewhere that finds no repository."""
    from distill_aim.commands import where
    from distill_aim.tracker import AimConfig, AimTracker

    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    tracker = AimTracker(AimConfig(repo="aim"))
    tracker.start("runs/one", "one", {}, resume=False)
    tracker.finish()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert where(tmp_path / "runs" / "one")[0] == tmp_path / "aim"


@pytest.mark.slow
def test_a_branch_is_a_run_of_its_own_that_names_its_parent(tmp_path: Path) -> None:
    """Would catch curves of two branches in one run, and a resumed branch that goes on in its parent."""
    from aim import Repo

    (tmp_path / "one").mkdir()

    def run(resume: bool) -> str:
        """In a process of its own: a `Repo` does not see runs that another of its process has made."""
        code = (
            "import sys; from distill_aim.tracker import AimConfig, AimTracker; tracker = AimTracker(AimConfig()); "
            f"tracker.start(sys.argv[1], 'one', {{}}, {resume}); tracker.finish()"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "one")], check=True, timeout=120)
        kept: str = json.loads((tmp_path / "one" / "aim.json").read_text())["run"]
        return kept

    first = run(False)
    branch = run(False)
    assert branch != first
    assert run(True) == branch
    repo = Repo(str(tmp_path))
    repo._recreate_index()
    assert repo.get_run(branch).get("parent") == first
    assert repo.get_run(first).get("parent") is None
    repo.close()
