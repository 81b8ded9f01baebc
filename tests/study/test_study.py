"""Studies of real runs in processes of their own: to the end, stopped and killed in the middle, through submitit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from score_values import reported

from distill_core.cli import main
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_study.launch import in_use, state

pytestmark = pytest.mark.slow

GATE = Path(__file__).parents[1] / "end_to_end" / "gate"
LESS = "{loss.1: null, fusion: null, teacher: null}"


def ablate(*arguments: str | Path) -> int:
    """The exit code of `distill ablate` in this process."""
    code: object = 0
    try:
        main(["ablate", *map(str, arguments)])
    except SystemExit as end:
        code = end.code
    assert isinstance(code, int)
    return code


def test_a_study_with_a_variant_that_fails(
    tiny_recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The init file is looked for when the run is built: a mistake that no check of recipes can find."""
    study = tmp_path / "small.yaml"
    study.write_text(
        "recipe: tiny.yaml\nseeds: [0, 1]\nbudget: {steps: 3}\nscores: [student/retrieval/M]\nvariants:\n"
        f"  less: {LESS}\n  broken:\n    weights: [{{name: state_dict, source: {tmp_path}/nowhere.safetensors}}]\n"
        "  loud: {loss.1: null, fusion: null, teacher: null, loss.0.temperature: 0.5}\n",
        encoding="utf-8",
    )
    assert ablate(study, "--runs", tmp_path / "runs", "--jobs", 2) == 3
    out, err = capfd.readouterr()
    assert "2 run(s) failed; retry them with:" in err
    assert "broken-seed0: exit code 2:" in err
    assert "Traceback" not in err
    folder = tmp_path / "runs" / "small"
    table = json.loads((folder / "table.json").read_text())
    rows = {row["name"]: row for row in table["variants"]}
    for seed in ("0", "1"):
        report = json.loads((folder / f"loud-seed{seed}" / "report.json").read_text())
        assert report["steps"] == 3
        cell = rows["loud"]["scores"]["student/retrieval/M"]
        assert cell["values"][seed] == reported(report["scores"])["student/retrieval/M"]
    assert rows["broken"]["runs"] == []
    assert "| broken | missing |" in (folder / "table.md").read_text()
    assert "the range of 2 would cover it in 50% of studies" in out
    assert (folder / "study.png").stat().st_size > 10_000
    recipe = (folder / "loud-seed1" / "recipe.yaml").read_text()
    assert "tags:\n  study: small\n  variant: loud\n  seed: 1\n" in recipe
    assert "\nseed: 1\n" in recipe
    assert "name: loud-seed1\n" in recipe


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that must not outlive the test."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()


def start(study: Path, runs: Path, gate: Path, step: int) -> subprocess.Popen[str]:
    """`distill ablate` in a process of its own, whose first run waits in the middle of its step `step` (from 0)."""
    for name in ("reached", "go"):
        (gate / name).unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "distill_core.cli", "ablate", str(study), "--runs", str(runs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(GATE), "GATE": str(gate), "GATE_STEP": str(step)},
    )
    wait_for(lambda: (gate / "reached").exists(), process)
    return process


def wait_for(there: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    end = time.monotonic() + 600
    while not there():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only there a run hears of its study's death")
def test_stopped_then_killed_in_the_middle_then_finished(
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    started: list[subprocess.Popen[str]],
) -> None:
    """Catches runs that train on when the study is killed, that start anew, and a step that is taken twice."""
    study, runs = tmp_path / "gated.yaml", tmp_path / "runs"
    study.write_text(
        "recipe: tiny.yaml\nset: {loss.1: null, fusion: null, teacher: null, loss.2: gate}\nbudget: {steps: 6}\n"
        "variants:\n  plain: {}\n  loud: {loss.0.temperature: 0.5}\n",
        encoding="utf-8",
    )
    run, log = runs / "gated" / "plain-seed0", runs / "gated" / "logs" / "plain-seed0.log"
    process = start(study, runs, tmp_path, 1)
    started.append(process)
    os.killpg(process.pid, signal.SIGTERM)  # the run has a group of its own: it hears of it from the study
    wait_for(lambda: log.read_text().count("SIGTERM: saving after this step") == 1)
    (tmp_path / "go").touch()
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert f"stopped: 0 of 2 runs are done. Continue with: distill ablate {study} --runs {runs}" in errors
    assert Checkpoints(run).steps() == [2]
    assert not (runs / "gated" / "loud-seed0").exists()

    process = start(study, runs, tmp_path, 3)
    started.append(process)
    process.kill()
    process.communicate(timeout=600)
    wait_for(lambda: log.read_text().count("SIGTERM: saving after this step") == 2)  # its study had died
    (tmp_path / "go").touch()
    wait_for(lambda: not in_use(run))
    assert Checkpoints(run).steps() == [2, 4]
    assert state(run) == "half"

    monkeypatch.setenv("PYTHONPATH", str(GATE))
    monkeypatch.syspath_prepend(str(GATE))
    assert ablate(study, "--runs", runs) == 0
    out = capfd.readouterr().out
    assert "plain" in out
    assert "loud" in out
    assert [row["step"] for row in RunFolder(run).rows() if "terms" in row] == [1, 2, 3, 4, 5, 6]
    assert "resumed at step 2 of 6" in log.read_text()
    assert "resumed at step 4 of 6" in log.read_text()


def test_through_submitit(tiny_recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its `local` cluster is processes of this machine, with SLURM's life of a job."""
    pytest.importorskip("submitit")
    study = tmp_path / "jobs.yaml"
    study.write_text(
        f"recipe: tiny.yaml\nbudget: {{steps: 2}}\nvariants:\n  less: {LESS}\n"
        "  broken: {loss.1: null, fusion: null, teacher: null, "
        f"weights: [{{name: state_dict, source: {tmp_path}/nowhere.safetensors}}]}}\n",
        encoding="utf-8",
    )
    code = ablate(study, "--runs", tmp_path / "runs", "--slurm", "cluster=local", "--slurm", "timeout_min=10")
    out, err = capfd.readouterr()
    assert code == 3, err
    folder = tmp_path / "runs" / "jobs"
    assert state(folder / "less-seed0") == "done"
    assert "broken-seed0: exit code 2:" in err
    assert list((folder / "slurm").glob("*_log.out"))
    assert "less" in out


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the job's process in /proc")
def test_requeued_jobs_go_on(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM's signal before the time is up: the run saves, and the requeued job goes on from there."""
    submitit = pytest.importorskip("submitit")
    from distill_core.recipe.resolve import load_recipe
    from distill_core.registry import Registry
    from distill_core.system.jobs import Slurm
    from distill_study.launch import SlurmJobs

    for key, value in {"PYTHONPATH": str(GATE), "GATE": str(tmp_path), "GATE_STEP": "1"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.syspath_prepend(str(GATE))
    changes = ["loss.1=null", "fusion=null", "teacher=null", "loss.2=gate", "name=one"]
    recipe = load_recipe(tiny_recipe, registry=Registry.discover(), overrides=changes)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "one.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    job = SlurmJobs(Slurm(tmp_path / "slurm", {"cluster": "local", "timeout_min": 10})).start(tmp_path, "one")
    wait_for(lambda: (tmp_path / "reached").exists())
    controller = job.job._process.pid
    task = int(Path(f"/proc/{controller}/task/{controller}/children").read_text().split()[0])
    os.kill(task, submitit.JobEnvironment._usr_sig())
    log = tmp_path / "logs" / "one.log"
    wait_for(lambda: "SIGTERM: saving after this step" in log.read_text())
    (tmp_path / "go").touch()
    wait_for(lambda: job.poll() is not None)
    assert job.poll() == 0
    assert state(tmp_path / "one") == "done"
    assert "resumed at step 2 of 4" in (tmp_path / "logs" / "one.log").read_text()


def test_checking_trains_nothing(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    arguments = [tiny_recipe, "--swap", "fusion.heads=1,2", "--swap", "loss.1.weight=0,1", "--runs", tmp_path / "runs"]
    assert ablate(*arguments, "--check", "--seeds", "0,1", "--budget", "samples=40") == 0
    out = capfd.readouterr().out
    assert "4 variants, 2 seeds" in out
    assert "fusion.heads=1, loss.1.weight=0 (base)" in " ".join(out.split())
    assert ablate(*arguments, "--check", "--json", "--seeds", "0,1", "--budget", "samples=40") == 0
    plan = json.loads(capfd.readouterr().out)
    assert plan["seeds"] == [0, 1]
    assert [variant["changes"] for variant in plan["variants"]][1] == ["fusion.heads=1", "loss.1.weight=1"]
    assert {variant["steps"] for variant in plan["variants"]} == {10}
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["nowhere.yaml"], "nowhere.yaml: no such file"),
        (["tiny.yaml"], "tiny.yaml: is a recipe; say what to try with --swap PATH=A,B, or write a study file"),
        (["s.yaml", "--swap", "a=1"], "s.yaml: is a study; --swap is for recipes. Write the swap in its `swaps`."),
        (["s.yaml", "--seeds", "0,x"], "--seeds: seeds.1: must be an integer, got 'x'"),
        (["s.yaml", "--budget", "step=3"], "--budget: budget.step: unknown option 'step', did you mean 'steps'?"),
        (["s.yaml", "--base", "b"], "--base: base: no variant 'b' (there are: a)"),
        (["s.yaml", "--set", "fusion.heads=x"], "--set fusion.heads: variant 'a': must be a"),
        (["s.yaml", "--set", "seed=9"], "--set seed: 'seed' is set by the study; see `seeds`"),
        (["s.yaml", "--set", "name=x"], "--set name: 'name' is set by the study; see `name`"),
        (
            ["s.yaml", "--budget", "steps=3", "--set", "train.steps=7"],
            "--set train.steps: 'train.steps' and `budget` are both given; remove one",
        ),
        (["s.yaml", "--slurm", "fast"], "--slurm fast: write it as key=value"),
        (["s.yaml", "--slurm", "a=1"], "--slurm: no sbatch on this machine"),
        (["s.yaml", "--slurm", "cluster=local", "--slurm", "speed=1"], "--slurm: "),
    ],
)
def test_mistakes_are_one_line(
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    error: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.which", lambda name: None)
    Path("s.yaml").write_text("recipe: tiny.yaml\nvariants: {a: {}}\n")
    assert ablate(*arguments) == 2
    err = capfd.readouterr().err
    assert err.startswith(error), err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.glob("runs/*/a-seed0"))
