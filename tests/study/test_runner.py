"""Which runs a study starts, when, and what it makes of their ends. Runs are stand-ins that leave a run's files."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from score_values import means

from distill_core.errors import RecipeErrors, UserError
from distill_core.recipe.document import read_document
from distill_core.registry import Registry
from distill_core.run.folder import RunFolder
from distill_study.grammar import make_study
from distill_study.launch import Local, StudyTask, _clear
from distill_study.live import StudyDisplay
from distill_study.plan import check_study
from distill_study.run import StudyRunner

STUDY = "recipe: tiny.yaml\nseeds: [0, 1]\nvariants:\n  a: {}\n  b: {fusion.heads: 4}\n"


@dataclass
class FakeJob:
    """Ends with `code` when it has been asked `polls` times; leaves a report where the run came to its end."""

    launcher: Fake
    study: Path
    name: str
    code: int
    left: int
    told: list[int] = field(default_factory=list)

    def poll(self) -> int | None:
        self.left -= 1
        self.launcher.on_poll(self)
        if self.left > 0:
            return None
        self.launcher.running.discard(self.name)
        folder = self.study / self.name
        unscored = self.launcher.unscored.get(self.name, [])
        if self.code == 0 or unscored:
            rows = [asdict(score) for score in means({"student/retrieval/M": 1.0}, "M")]
            report = {"scores": rows, "steps": 4, "samples": 16, "seconds": 1.0}
            report["failed"] = unscored
            (folder / "report.json").write_text(json.dumps({**report, "parameters": 1, "split": "test"}))
            rows = [{"step": i + 1, "terms": {}, "seconds": 9 + 0.5 * i} for i in range(8)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            (self.study / "logs").mkdir(exist_ok=True)
            (self.study / "logs" / f"{self.name}.log").write_text("step 1: fine\nout of luck\n")
        return self.code

    def stop(self, number: int) -> None:
        self.told.append(number)
        self.code, self.left = 128 + number, 1


class Fake:
    """A launcher of `FakeJob`s; `codes` says how runs end (0 if not named)."""

    def __init__(self, **codes: int) -> None:
        self.codes = {name.replace("_", "-"): code for name, code in codes.items()}
        self.started: list[str] = []
        self.jobs: list[FakeJob] = []
        self.unscored: dict[str, list[str]] = {}
        """Evaluation tasks that fail, by run."""
        self.running: set[str] = set()
        self.most = 0
        self.on_poll: Callable[[FakeJob], None] = lambda job: None

    def start(self, study: Path, name: str) -> FakeJob:
        self.started.append(name)
        (study / name).mkdir(exist_ok=True)
        shutil.copy(study / "recipes" / f"{name}.yaml", study / name / "recipe.yaml")
        (study / name / "checkpoints").mkdir(exist_ok=True)
        (study / name / "checkpoints" / "step-00000001.pt").touch()
        self.running.add(name)
        self.most = max(self.most, len(self.running))
        self.jobs.append(FakeJob(self, study, name, self.codes.get(name, 0), 2))
        return self.jobs[-1]


Make = Callable[..., StudyRunner]


@pytest.fixture
def make(tiny_recipe: Path, tmp_path: Path, registry: Registry) -> Make:
    def runner(launcher: Fake, text: str = STUDY, *, jobs: int = 1, retry: bool = False) -> StudyRunner:
        plan = check_study(make_study(read_document(text, "s.yaml"), tmp_path, "s"), registry)
        folder = tmp_path / "runs" / "s"
        display = StudyDisplay("s", folder, [])
        return StudyRunner(plan, folder, launcher, registry, display, jobs=jobs, retry=retry)

    return runner


ALL = ["a-seed0", "b-seed0", "a-seed1", "b-seed1"]


def test_runs_once_each_and_no_more_at_a_time_than_asked(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    launcher = Fake()
    outcome = make(launcher, jobs=2).run()
    assert launcher.started == ALL
    assert launcher.most == 2
    assert (outcome.failed, outcome.stopped, outcome.signal) == ({}, [], None)
    # no terminal: a line for each run that ends
    err = capfd.readouterr().err
    assert err.count(": started; its output: ") == 4, "nothing to see for as long as a run takes"
    assert "a-seed0: 4 steps in 1 s of training, 0 s in all: student/retrieval/M 1.00\n" in err
    lines = [line for line in err.splitlines() if "student/retrieval/M 1.00" in line]
    assert sorted(line.split(":")[0] for line in lines) == sorted(ALL)
    again = Fake()
    make(again).run()
    assert again.started == []


def test_more_seeds_and_variants_later_run_only_what_is_new(make: Make) -> None:
    make(Fake()).run()
    launcher = Fake()
    make(launcher, STUDY.replace("[0, 1]", "[0, 1, 2]") + "  c: {fusion.heads: 1}\n").run()
    assert launcher.started == ["c-seed0", "c-seed1", "a-seed2", "b-seed2", "c-seed2"]


def test_a_failed_run_is_reported_kept_and_tried_again_when_asked(
    make: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    launcher = Fake(b_seed0=3)
    outcome = make(launcher).run()
    assert launcher.started == ALL
    assert outcome.failed == {"b-seed0": "exit code 3: step 1: fine out of luck"}
    assert "b-seed0: failed with exit code 3: step 1: fine out of luck" in capfd.readouterr().err
    second = Fake()
    assert make(second).run().failed == outcome.failed
    assert second.started == []
    third = Fake()
    assert make(third, retry=True).run().failed == {}
    assert third.started == ["b-seed0"]
    assert make(Fake()).run().failed == {}


def test_a_run_that_could_not_be_scored_failed_and_is_evaluated_again_when_asked(make: Make, tmp_path: Path) -> None:
    """It has a report, so it would be taken for done for ever, and its missing scores for nothing."""
    launcher = Fake(b_seed0=2)
    launcher.unscored = {"b-seed0": ["zero_shot: no classes"]}
    outcome = make(launcher).run()
    assert outcome.failed == {"b-seed0": "trained, but not evaluated: zero_shot: no classes"}
    folder = tmp_path / "runs" / "s"
    assert json.loads((folder / "failed.json").read_text()) == outcome.failed
    second = Fake()
    assert make(second).run().failed == outcome.failed
    assert second.started == []
    third = Fake()
    before = third.start

    def start(study: Path, name: str) -> FakeJob:
        assert not (study / name / "report.json").exists(), "a report makes it done"
        assert list((study / name / "checkpoints").iterdir()), "it is not trained again"
        return before(study, name)

    third.start = start  # type: ignore[method-assign]
    assert make(third, retry=True).run().failed == {}
    assert third.started == ["b-seed0"]
    assert json.loads((folder / "failed.json").read_text()) == {}


def test_a_memory_that_was_cut_off_is_said(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "s"
    folder.mkdir(parents=True)
    (folder / "failed.json").write_text('{"b-se')
    with pytest.raises(UserError, match=r"failed\.json: is no JSON .*; remove it"):
        make(Fake()).run()


def test_a_run_that_another_stopped_is_no_failure_and_goes_on_next_time(make: Make) -> None:
    launcher = Fake(a_seed0=-signal.SIGKILL, b_seed0=128 + signal.SIGTERM)
    outcome = make(launcher).run()
    assert launcher.started == ALL
    assert (outcome.failed, outcome.stopped) == ({}, ["a-seed0", "b-seed0"])
    second = Fake()
    make(second).run()
    assert second.started == ["a-seed0", "b-seed0"]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_once_and_starts_nothing_more(make: Make, kind: signal.Signals) -> None:
    launcher = Fake()
    runner = make(launcher, jobs=2)

    def on_poll(job: FakeJob) -> None:
        if runner.interrupt.signal is None:
            job.left = 50
            signal.raise_signal(kind)

    launcher.on_poll = on_poll
    before = signal.getsignal(kind)
    outcome = runner.run()
    assert outcome.signal == kind
    assert launcher.started == ALL[:2]
    assert [job.told for job in launcher.jobs] == [[kind], [kind]]
    assert outcome.failed == {}
    assert signal.getsignal(kind) is before


def test_a_changed_study_is_refused_before_anything_starts(make: Make, tmp_path: Path) -> None:
    make(Fake()).run()
    launcher = Fake()
    with pytest.raises(RecipeErrors) as caught:
        make(launcher, STUDY.replace("heads: 4", "heads: 8") + "  c: {fusion.heads: 1}\n").run()
    assert launcher.started == []
    folder = tmp_path / "runs" / "s"
    assert caught.value.lines == [
        f"{folder}/b-seed0: was trained with fusion.heads 4; the study now says 8",
        f"{folder}/b-seed1: was trained with fusion.heads 4; the study now says 8",
        f"Give the changed study another `name:` (or --name), or remove {folder}.",
    ]


def test_one_study_at_a_time_in_a_folder(make: Make, tmp_path: Path) -> None:
    (tmp_path / "runs" / "s").mkdir(parents=True)
    other = RunFolder(tmp_path / "runs" / "s")
    other.lock()
    with pytest.raises(UserError, match="another `distill ablate` is running this study"):
        make(Fake()).run()


def test_a_run_that_another_process_trains_is_waited_for(make: Make, tmp_path: Path) -> None:
    """As after a study was killed, whose run is still saving: starting it a second time would fail."""
    folder = tmp_path / "runs" / "s" / "a-seed0"
    folder.mkdir(parents=True)
    other = RunFolder(folder)
    other.lock()
    launcher = Fake()

    def on_poll(job: FakeJob) -> None:
        if job.name == "b-seed1" and job.left == 1:
            other.unlock()

    launcher.on_poll = on_poll
    make(launcher).run()
    assert launcher.started == ["b-seed0", "a-seed1", "b-seed1", "a-seed0"]


SECONDS = STUDY + "budget: {seconds: 20, calibrate: 8}\n"


def test_a_budget_of_seconds_is_turned_into_steps_once(make: Make, tmp_path: Path) -> None:
    """Steps 5 to 8 of a stand-in take 0.5 s each (the first 9 s of start-up do not count): 40 steps in 20 s."""
    launcher = Fake()
    outcome = make(launcher, SECONDS, jobs=2).run()
    assert launcher.started == ["a", "b", *ALL]
    assert [run.recipe.train.steps for run in outcome.runs] == [40] * 4
    folder = tmp_path / "runs" / "s"
    times = json.loads((folder / "calibration.json").read_text())
    assert {name: entry["seconds_per_step"] for name, entry in times.items()} == {"a": 0.5, "b": 0.5}
    short = (folder / "calibration" / "recipes" / "a.yaml").read_text()
    assert "steps: 8\n" in short
    assert "tasks: []" in short
    again = Fake()
    make(again, SECONDS).run()
    assert again.started == []
    with pytest.raises(RecipeErrors, match=r"was trained with train.steps 40; the study now says 60"):
        make(Fake(), SECONDS.replace("20", "30")).run()


def test_only_a_changed_variant_is_timed_again(make: Make, tmp_path: Path) -> None:
    make(Fake(), SECONDS).run()
    for name in ("b-seed0", "b-seed1"):
        shutil.rmtree(tmp_path / "runs" / "s" / name)
    launcher = Fake()
    make(launcher, SECONDS.replace("heads: 4", "heads: 8")).run()
    assert launcher.started == ["b", "b-seed0", "b-seed1"]


def test_an_interrupted_calibration_of_another_recipe_is_not_gone_on_with(make: Make, tmp_path: Path) -> None:
    """It would give the changed variant the old one's seconds."""
    launcher = Fake(b=128 + signal.SIGTERM)
    with pytest.raises(UserError, match="calibration of b: stopped"):
        make(launcher, SECONDS).run()
    left = tmp_path / "runs" / "s" / "calibration" / "b" / "checkpoints"
    assert left.exists()
    for text, there in ((SECONDS, True), (SECONDS.replace("heads: 4", "heads: 8"), False)):
        again = Fake(b=128 + signal.SIGTERM)
        before, seen = again.start, []

        def start(study: Path, name: str, before: Any = before, seen: Any = seen) -> FakeJob:
            seen.append((study / name).exists())
            return before(study, name)  # type: ignore[no-any-return]

        again.start = start  # type: ignore[method-assign]
        with pytest.raises(UserError, match="calibration of"):
            make(again, text).run()
        place = again.started.index("b")
        assert seen[place] is there


def test_a_calibration_that_fails_ends_the_study(make: Make) -> None:
    launcher = Fake(b=2)
    with pytest.raises(UserError, match="calibration of b: exit code 2: step 1: fine out of luck"):
        make(launcher, SECONDS).run()
    assert launcher.started == ["a", "b"]


def test_a_folder_that_is_no_run_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "a-seed0").mkdir()
    (tmp_path / "a-seed0" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is in the way of a run, and is no run folder; move it"):
        Local().start(tmp_path, "a-seed0")
    assert (tmp_path / "a-seed0" / "notes.txt").read_text() == "mine"


def test_a_run_that_another_process_trains_is_not_removed(tmp_path: Path) -> None:
    """A job that waited in a queue while a second one of the same run was submitted."""
    folder = tmp_path / "a-seed0"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("seed: 1\n")
    other = RunFolder(folder)
    other.lock()
    with pytest.raises(UserError, match="another process is training in this run folder"):
        StudyTask(tmp_path, "a-seed0")()
    assert (folder / "recipe.yaml").read_text() == "seed: 1\n"


def test_a_job_whose_run_is_done_leaves_it(tmp_path: Path) -> None:
    folder = tmp_path / "a-seed0"
    folder.mkdir()
    for name in ("recipe.yaml", "report.json"):
        (folder / name).write_text("{}")
    assert StudyTask(tmp_path, "a-seed0")() == 0
    assert sorted(path.name for path in folder.iterdir()) == ["recipe.yaml", "report.json"]


def test_a_run_without_a_checkpoint_is_cleared_away(tmp_path: Path) -> None:
    folder = tmp_path / "a-seed0"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("recipe.yaml", ".lock", "checkpoints/.step-1.tmp"):
        (folder / name).write_text("")
    _clear(folder)
    assert list(tmp_path.iterdir()) == []
