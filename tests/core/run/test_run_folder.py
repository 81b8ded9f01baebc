"""What a run leaves behind, and trackers that misbehave."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from score_values import means, reported

import distill_core.cli
from distill_core.batch import Skipped
from distill_core.contracts.tracker import Tracker, TrackerConfig
from distill_core.errors import UserError
from distill_core.evaluate.score import TaskScore
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Entry, Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_core.run.load import run_recipe
from distill_core.run.report import Report, _draw_bars, bars, write_report
from distill_core.run.tracking import TrackerThread
from distill_core.train import Trainer


class Keeps(Tracker):
    """Keeps what it is told."""

    name = "keeps"
    Config = TrackerConfig
    calls: ClassVar[list[tuple[str, tuple[Any, ...]]]] = []

    def start(self, folder: str, name: str, recipe: dict[str, Any], resume: bool) -> None:
        Keeps.calls = [("start", (folder, name, recipe, resume))]

    def log(self, step: int, values: Mapping[str, float], context: Mapping[str, str]) -> None:
        self.calls.append(("log", (step, values, context)))

    def describe(self, facts: Mapping[str, Any], tags: Sequence[str]) -> None:
        self.calls.append(("describe", (facts, tags)))

    def image(self, step: int, name: str, picture: Any, caption: str, context: Mapping[str, str]) -> None:
        self.calls.append(("image", (step, name, picture, caption, context)))

    def distribution(self, step: int, name: str, values: np.ndarray, context: Mapping[str, str]) -> None:
        self.calls.append(("distribution", (step, name, values, context)))

    def finish(self) -> None:
        self.calls.append(("finish", ()))


class Fails(Keeps):
    """Its store is full from the second row on."""

    name = "fails"

    def log(self, step: int, values: Mapping[str, float], context: Mapping[str, str]) -> None:
        super().log(step, values, context)
        if step >= 2:
            raise OSError("no space left")


class Blocks(Keeps):
    """Never comes back from its first row."""

    name = "blocks"
    held: ClassVar[threading.Event] = threading.Event()

    def log(self, step: int, values: Mapping[str, float], context: Mapping[str, str]) -> None:
        if not self.held.wait(600):
            raise AssertionError("training waits for it")


@pytest.fixture
def more(registry: Registry) -> Registry:
    return Registry([*registry.entries.values(), *(Entry(cls, "mine", "mine") for cls in (Keeps, Fails, Blocks))])


@pytest.fixture
def run(
    tiny_recipe: Path, more: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[RunFolder, str]]:
    """Trains the tiny recipe; gives its folder and what stood on standard error."""

    def train(*overrides: str) -> tuple[RunFolder, str]:
        recipe = load_recipe(tiny_recipe, registry=more, overrides=overrides)
        folder = RunFolder.create(tmp_path / "runs", recipe)
        Trainer(recipe, folder, quiet=True).run()
        return folder, capsys.readouterr().err

    return train


Run = Callable[..., tuple[RunFolder, str]]


def assert_complete(folder: RunFolder) -> None:
    assert [row["step"] for row in folder.rows() if "terms" in row] == [1, 2, 3, 4]
    assert (folder.path / "report.json").exists()
    assert Checkpoints(folder.path).steps() == [4]


@pytest.mark.slow
def test_a_tracker_hears_everything(run: Run) -> None:
    """Catches rows, scores or the picture that do not reach a tracker, and calls out of order."""
    folder, errors = run("tracking={name: keeps, media: 0}")
    kinds = [name for name, _ in Keeps.calls]
    assert kinds == ["start", "describe", *["log"] * 5, "image", "finish"]
    _, (path, name, recipe, resume) = Keeps.calls[0]
    assert (path, name, resume) == (str(folder.path), "tiny", False)
    assert recipe["train"]["steps"] == 4
    logged = [arguments for kind, arguments in Keeps.calls if kind == "log"]
    for (step, values, context), row in zip(logged[:4], folder.rows(), strict=False):
        assert (step, context) == (row["step"], {"subset": "train"})
        assert values["loss"] == row["loss"]
        assert values["loss/contrastive"] == row["terms"]["contrastive"]
        assert values["metric/contrastive/scale"] == row["metrics"]["contrastive/scale"]
        assert {"lr", "grad_norm", "samples_per_s", "momentum"} <= set(values)
    step, values, context = logged[4]
    assert (step, context) == (4, {"subset": "test"})
    assert values == folder.rows()[-1]["scores"]
    assert Path(dict(Keeps.calls)["image"][2]).name == "report.png"
    assert "warning" not in errors


@pytest.mark.slow
def test_what_a_run_is_made_with(run: Run) -> None:
    """Catches a run that cannot be found by its components, and a report and a tracker that do not say the same."""
    folder, _ = run("tracking={name: keeps, tags: [mine]}")
    facts, tags = dict(Keeps.calls)["describe"]
    assert {"vit", "clip_text", "cross_attention", "contrastive", "retrieval", "webdataset", "mine"} <= set(tags)
    assert len(tags) == len(set(tags))
    assert torch.__version__.startswith(facts["versions"]["torch"].partition("+")[0])
    assert facts["device"].startswith("cpu")
    report = json.loads((folder.path / "report.json").read_text())
    assert {key: report[key] for key in facts} == facts


@pytest.mark.slow
def test_a_run_that_goes_back_is_a_new_one_to_its_tracker(run: Run, more: Registry) -> None:
    """Catches two branches in one run of the tracker's, and a branch that cannot be told from its parent."""
    folder, _ = run("tracking={name: keeps, media: 0}", "train.checkpoint={every: 2, keep: 2}")

    def resume(checkpoint: str) -> tuple[bool, Any]:
        recipe = run_recipe(folder.path, more)
        Trainer(recipe, RunFolder(folder.path), resume=checkpoint, quiet=True).run()
        calls = dict(Keeps.calls[:2])
        return calls["start"][3], calls["describe"][0].get("branch")

    branch = {"step": 2, "set_aside": str(folder.path / "set-aside-1")}
    assert resume("2") == (False, branch)
    assert json.loads((folder.path / "report.json").read_text())["branch"] == branch
    assert resume("4") == (True, None), "the last one: nothing to go back from"


@pytest.mark.slow
def test_pictures_of_a_run(run: Run) -> None:
    """Catches views, matches or similarities that do not reach a tracker, or come at steps nobody asked for."""
    _, errors = run("tracking={name: keeps, media: 2, media_every: 3}", "evaluate.every=2")
    assert "warning" not in errors
    pictures = [arguments for kind, arguments in Keeps.calls if kind == "image"]
    views = [(step, context["subset"]) for step, name, _, _, context in pictures if name == "views"]
    assert views == [(1, "train")] * 2 + [(3, "train")] * 2
    found = {(step, name, c["subset"], c["model"]) for step, name, _, _, c in pictures if name.startswith("retrieval")}
    assert found == {
        (step, f"retrieval/{name}", subset, side)
        for step, subset in ((2, "validation"), (4, "validation"), (4, "test"))
        for name in ("image_to_text", "text_to_image")
        for side in ("student", "teacher")
    }
    values = [arguments for kind, arguments in Keeps.calls if kind == "distribution"]
    assert {c["pairs"]: len(v) for _, name, v, c in values if name == "retrieval/similarity"} == {
        "positive": 4,
        "negative": 12,
    }


@pytest.mark.slow
def test_pictures_that_cannot_be_made_cost_pictures_alone(
    run: Run, monkeypatch: pytest.MonkeyPatch, more: Registry
) -> None:
    """Catches an augmentation's or a task's mistake in showing that ends training, scores or the other rows."""

    def fails(self: Any, *arguments: Any) -> Any:
        raise RuntimeError("no eyes")

    monkeypatch.setattr(more.get("augmentation", "multi_crop").cls, "render", fails)
    monkeypatch.setattr(more.get("task", "retrieval").cls, "media", fails)
    folder, errors = run("tracking={name: keeps}")
    assert_complete(folder)
    assert errors.count("warning") == 1
    assert "no pictures for tracker 'keeps' from here on (RuntimeError: no eyes); numbers continue" in errors
    kinds = [name for name, _ in Keeps.calls]
    assert kinds == ["start", "describe", *["log"] * 5, "image", "finish"]


@pytest.mark.slow
def test_a_batch_larger_than_the_data(run: Run) -> None:
    """Catches a run whose batches hold a sample twice, without a word."""
    _, errors = run("data.batch_size=16", "train.steps=1")
    assert "a step takes 16 samples and there are only 12 to train on" in errors
    _, errors = run("data.batch_size=12", "train.steps=1")
    assert "warning" not in errors


def test_a_tracker_that_fails(run: Run) -> None:
    """Catches a tracker that stops training, is called again after it failed, or warns at every row."""
    folder, errors = run("tracking={name: fails}")
    assert_complete(folder)
    assert errors.count("warning") == 1
    assert "tracker 'fails' failed (OSError: no space left); training continues" in errors
    assert [name for name, _ in Keeps.calls if name != "image"] == ["start", "describe", "log", "log"]


def test_a_tracker_that_blocks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches training or the end of a run that waits for a tracker for ever."""
    monkeypatch.setattr(TrackerThread.finish, "__defaults__", (0.3,))
    folder, errors = run("tracking={name: blocks}")
    Blocks.held.set()
    assert_complete(folder)
    assert errors.count("warning") == 1
    assert "tracker 'blocks' did not finish" in errors


def test_a_slow_tracker_loses_rows_but_never_blocks() -> None:
    """Catches a queue that grows without end, and a call that waits for room in it."""
    held, warnings = threading.Event(), []
    Keeps.calls = []

    class Slow(Keeps):
        name = "slow"

        def log(self, step: int, values: Mapping[str, float], context: Mapping[str, str]) -> None:
            held.wait(300)

    thread = TrackerThread(Slow(None), warnings.append, size=3)
    started = time.monotonic()
    for step in range(50):
        thread.call("log", step, {}, {})
    assert time.monotonic() - started < 100
    assert len(warnings) == 1
    assert "rows are dropped" in warnings[0]
    threading.Timer(0.3, held.set).start()
    thread.finish(100)  # while the queue is full still
    assert ("finish", ()) in Keeps.calls, "a row may be dropped, the end must not"
    assert not thread._thread.is_alive()
    assert len(warnings) == 1


def test_a_tracker_settles() -> None:
    """Before workers are forked. Catches one that is still busy then, and a wait for one that has failed."""
    held, done = threading.Event(), []

    class Slow(Keeps):
        name = "slow"

        def log(self, step: int, values: Mapping[str, float], context: Mapping[str, str]) -> None:
            held.wait(300)
            if step == 2:
                raise OSError("away")
            done.append(step)

    thread = TrackerThread(Slow(None), lambda line: None, size=2)
    thread.call("log", 0, {}, {})
    thread.call("log", 1, {}, {})
    thread.settle(0.2)
    assert done == [], "it waits no longer than it is told"
    threading.Timer(0.3, held.set).start()
    thread.settle(100)
    assert done == [0, 1]
    thread.call("log", 2, {}, {})
    started = time.monotonic()
    thread.settle(300)
    assert time.monotonic() - started < 100
    thread.finish(100)


def test_report(run: Run) -> None:
    """Catches a picture that does not open, scores that are not the last evaluation's, and what is not JSON."""
    folder, _ = run("evaluate.every=2")
    report = json.loads((folder.path / "report.json").read_text())
    scored = [row for row in folder.rows() if "scores" in row]
    assert reported(report["scores"]) == scored[-1]["scores"]
    assert [row["step"] for row in report["validation"]] == [2, 4]
    assert (report["name"], report["steps"], report["samples"], report["split"]) == ("tiny", 4, 16, "test")
    assert report["parameters"] > 49408 * 16
    assert report["samples_per_s"] == pytest.approx(16 / report["seconds"])
    assert {"student/retrieval/test/M", "teacher/retrieval/M"} & set(scored[-1]["scores"]) == {"teacher/retrieval/M"}
    with Image.open(folder.path / "report.png") as picture:
        picture.load()
        assert picture.size[0] > 600
        assert len(np.unique(np.asarray(picture.convert("RGB")))) > 20, "an empty picture"


def test_a_run_without_evaluation_reports_too(run: Run) -> None:
    folder, _ = run("evaluate=null", "fusion=null", "teacher=null", "loss=[{name: contrastive}]")
    assert json.loads((folder.path / "report.json").read_text())["scores"] == []
    with Image.open(folder.path / "report.png") as picture:
        picture.load()


def test_the_pictures_bars_are_means_over_sets_by_unit() -> None:
    """Would catch a set's score among the means, nats drawn on the axis of percent, and a side that is mixed up."""
    scores = [
        *means({"student/retrieval/M": 1.0, "teacher/retrieval/M": 3.0}),
        TaskScore("a", "M", 2.0, side="student", task="retrieval"),
        TaskScore(None, "loss", 0.02, "nats", higher_is_better=False, side="student", task="lm"),
    ]
    assert bars(scores) == {
        "percent": {"retrieval M": {"student": 1.0, "teacher": 3.0}},
        "nats": {"lm loss \N{DOWNWARDS ARROW}": {"student": 0.02}},
    }


def test_a_side_without_a_score_has_no_bar() -> None:
    """Would catch a teacher drawn at 0 % in a task that could not score it."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    _draw_bars(
        axes, {"retrieval M": {"student": 6.0}, "knn top1": {"student": 24.0, "teacher": 23.0}}, "percent", "test"
    )
    assert [[bar.get_width() for bar in bars] for bars in axes.containers] == [[6.0, 24.0], [23.0]]
    student, teacher = axes.containers
    assert teacher[0].get_y() > student[1].get_y() > student[0].get_y() + student[0].get_height()


def test_the_summary_names_skipped_samples(
    tiny_recipe: Path,
    more: Registry,
    tmp_path: Path,
    write_shards: Callable[..., list[Path]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches samples lost in silence: a warning with key and shard, a file of all, a count at the end."""
    monkeypatch.setattr(distill_core.cli, "_registry", lambda: more)
    bad = {(0, j): {"png": b"no", "txt": b"a"} for j in range(3)} | {(1, j): {"txt": b"a"} for j in range(3)}
    write_shards(tiny_recipe.parent / "shards", 3, 4, replace=bad)
    distill_core.cli.main(["run", str(tiny_recipe), "--runs", str(tmp_path / "runs"), "--set", "data.shuffle=1"])
    seen = capsys.readouterr()
    folder = RunFolder(tmp_path / "runs" / "tiny")
    rows = [json.loads(line) for line in folder.skipped.read_text().splitlines()]
    assert len(rows) >= 8, "half of 16 and more"
    assert {row["key"] for row in rows} == {f"train-{i}-{j}" for i in range(2) for j in range(3)}
    assert {Path(row["shard"]).name for row in rows} == {"train-000.tar", "train-001.tar"}
    assert all(row["reason"] and 1 <= row["step"] <= 4 for row in rows)
    report = json.loads((folder.path / "report.json").read_text())
    assert (report["skipped_samples"], report["skipped_reads"]) == (6, len(rows))
    line = f"skipped: 6 samples that could not be used, {len(rows)} times over all passes; keys: "
    assert f"{line}{folder.skipped}" in seen.out.replace("\n", " ")
    assert "warning: skipped sample 'train-" in seen.err
    assert seen.err.count("skipped sample") <= 5, "a warning for each of millions of samples"


def test_the_picture_of_a_run_has_no_empty_half(tmp_path: Path) -> None:
    """Would catch room for scores where there are none."""
    folder = RunFolder(tmp_path)
    folder.log({"step": 3, "loss": 2.0, "terms": {"a": 1.0, "b": 1.0}})
    widths = []
    entropy = TaskScore("one", "entropy", 1.0, "nats", None, side="student", task="maps")
    for scores in ([], [entropy], means({"student/retrieval/M": 1.0})):
        report = Report("r", 3, 9, 1.0, scores, "test", 0, 0, 0, 4)
        widths.append(Image.open(write_report(folder, report, {})).width)
    assert widths[0] == widths[1] < widths[2]


def test_rewind(tmp_path: Path) -> None:
    """Catches rows of steps that are going to be written again, and a row cut off by a kill that ends the reading."""
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3, 4):
        folder.log({"step": step, "terms": {}})
        folder.skip(step, [Skipped(f"k{step}", "s.tar", "bad")])
        if step % 2 == 0:
            folder.log({"step": step, "split": "validation", "scores": {}})
    with folder.metrics.open("a") as file:
        file.write('{"step": 5, "te')
    folder.rewind(2, 9)
    assert [(row["step"], "scores" in row) for row in folder.rows()] == [(1, False), (2, False), (2, True)]
    assert [json.loads(line)["key"] for line in folder.skipped.read_text().splitlines()] == ["k1", "k2"]
    folder.rewind(2, 2)  # the run ended at step 2: its evaluations are made again
    assert [(row["step"], "scores" in row) for row in folder.rows()] == [(1, False), (2, False)]
    folder.metrics.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(UserError, match="not a row of json"):
        folder.rows()


def test_run_folders_do_not_overwrite_one_another(tiny_recipe: Path, more: Registry, tmp_path: Path) -> None:
    recipe = load_recipe(tiny_recipe, registry=more)
    made = [RunFolder.create(tmp_path / "runs", recipe).path.name for _ in range(3)]
    assert made == ["tiny", "tiny-2", "tiny-3"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be created"):
        RunFolder.create(tmp_path / "file", recipe)


@pytest.mark.slow
def test_two_processes_cannot_train_into_one_folder(tmp_path: Path) -> None:
    """Would catch two resumes of one run that mix their rows and checkpoints."""
    tmp_path.mkdir(exist_ok=True)
    code = (
        "import sys; from pathlib import Path; from distill_core.run.folder import RunFolder; "
        "folder = RunFolder(Path(sys.argv[1])); folder.lock(); print('locked', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="another process is training"):
            RunFolder(tmp_path).lock()
    finally:
        holder.stdin.close()
        holder.wait(20)
        holder.stdout.close()
    RunFolder(tmp_path).lock()


def full(path: Path) -> Any:
    """A file that takes 7 bytes, and no more."""
    file = open(path, "ab", buffering=0)  # noqa: SIM115
    write = file.write

    class Full:
        room = 7

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            file.close()

        def tell(self) -> int:
            return file.tell()

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = write(data[: self.room])
            self.room = 0
            return written

    return Full()


def test_rows_wait_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback, half of a row, rows that are lost, and a warning for each of them."""
    folder, warnings = RunFolder(tmp_path), []
    folder.warn = warnings.append
    folder.log({"step": 1})
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *options, **more: full(path))
    for step in (2, 3):
        folder.log({"step": step})
        folder.skip(step, [Skipped(f"k{step}", "s.tar", "bad")])
    assert folder.write_waiting() == [
        f"{folder.metrics}: 2 rows could not be written",
        f"{folder.skipped}: 2 rows could not be written",
    ]
    monkeypatch.setattr(Path, "open", opened)
    assert [row["step"] for row in folder.rows()] == [1]
    assert folder.skipped.read_text() == ""
    (line,) = warnings
    assert line.startswith(f"{folder.metrics}: cannot be written: No space left on device (")
    assert "are free); training continues" in line
    folder.log({"step": 4})
    assert folder.write_waiting() == []
    assert [row["step"] for row in folder.rows()] == [1, 2, 3, 4]
    assert [json.loads(row)["key"] for row in folder.skipped.read_text().splitlines()] == ["k2", "k3"]


def test_a_folder_that_cannot_be_written(
    tiny_recipe: Path, more: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, from `run` and from `resume`, and no folder that holds nothing."""
    recipe = load_recipe(tiny_recipe, registry=more)
    folder = RunFolder.create(tmp_path / "runs", recipe)
    opened, written = Path.open, Path.write_bytes

    def read_only(path: Path, mode: str = "r", *options: Any, **more: Any) -> IO[Any]:
        if set(mode) & set("wa+"):
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, mode, *options, **more)

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(UserError, match=r"tiny/\.lock: cannot be written: Read-only file system; a run needs"):
        folder.lock()
    monkeypatch.undo()

    def no_room(path: Path, data: bytes) -> int:
        written(path, data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_room)
    with pytest.raises(UserError, match=r"tiny-2/recipe\.yaml: cannot be written: No space left on device \(.* free"):
        RunFolder.create(tmp_path / "runs", recipe)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny"]


def test_what_killed_saves_left_is_removed(tmp_path: Path) -> None:
    """Catches 162 MB of halves after 63 kills; what is no half of ours stays, and what another process trains, too."""
    (tmp_path / "checkpoints").mkdir()
    halves = [".metrics.jsonl.17", "checkpoints/.step-00000003.pt.99999", "checkpoints/.best.pt.1"]
    stay = ["metrics.jsonl", ".nfs0001", ".hidden.txt", "checkpoints/step-00000002.pt", "checkpoints/best.pt"]
    for name in [*halves, *stay]:
        (tmp_path / name).write_text("x")
    holder = RunFolder(tmp_path)
    holder.lock()
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {*stay, ".lock"}
    (tmp_path / halves[0]).write_text("of the holder")
    with pytest.raises(UserError, match="another process is training"):
        RunFolder(tmp_path).lock()
    assert (tmp_path / halves[0]).exists()
    holder.unlock()


def test_setting_aside_makes_a_run_folder(tmp_path: Path) -> None:
    """Catches a file that is lost, one that is left in the way of the new branch, and a second time over the first."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for n in (1, 2):
        for name in ("recipe.yaml", "report.json", "report.png", "checkpoints/step-00000009.pt", "checkpoints/best.pt"):
            (run / name).write_text(f"{name} {n}")
        folder = RunFolder(run)
        folder.log({"step": n})
        (run / "bad-steps").mkdir(exist_ok=True)
        for step in (3, 8):
            (run / "bad-steps" / f"step-{step:08d}.json").write_text(f"capture {n}")
        aside = folder.set_aside([run / "checkpoints" / "step-00000009.pt", run / "checkpoints" / "best.pt"], 3)
        assert (aside / "bad-steps" / "step-00000008.json").read_text() == f"capture {n}"
        assert [path.name for path in (run / "bad-steps").iterdir()] == ["step-00000003.json"]
        assert aside == run / f"set-aside-{n}"
        for name in ("recipe.yaml", "report.json", "report.png", "checkpoints/step-00000009.pt", "checkpoints/best.pt"):
            assert (aside / name).read_text() == f"{name} {n}"
        assert [row["step"] for row in RunFolder(aside).rows()] == list(range(1, n + 1))
        assert sorted(path.name for path in run.glob("*.*")) == ["metrics.jsonl", "recipe.yaml"]
        assert list((run / "checkpoints").iterdir()) == []
