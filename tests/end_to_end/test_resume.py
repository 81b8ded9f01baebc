"""A run that was stopped and resumed is the run that was not stopped, bit for bit (one process, CPU).

Runs are stopped for real: signals to a `distill run` in a process of its own, in the middle of a known step.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_core.run.load import run_recipe
from distill_core.train import Trainer

pytestmark = pytest.mark.slow

GATE = Path(__file__).with_name("gate")
STEPS = 10
EPOCH = 4  # steps, with 0 workers and with 2
RECIPE = """\
augment:
  image: {{name: multi_crop, size: 16, local_size: 8, global: 1, local: 1}}
  text: {{name: text_crop, global: 2, local: 1}}
backbone:
  image: {{name: vit, image_size: 16, patch: 8, width: 16, layers: 1, heads: 2, dim: 16}}
  text: {{name: clip_text, width: 16, layers: 1, heads: 2, dim: 16, padding: longest}}
fusion: {{name: cross_attention, heads: 2}}
loss:
  - {{name: contrastive}}
  - {{name: cross_modal_distillation, weight: {{name: ramp, start: 0.5, end: 1.0}}}}
  - {{name: gate}}
teacher: {{momentum: {{name: cosine, start: 0.9, end: 1.0}}}}
data:
  source: {{name: webdataset, urls: "{folder}/train*.tar", validation: "{folder}/validation-000.tar", \
test: "{folder}/test-000.tar"}}
  batch_size: 4
  shuffle: 6
train:
  steps: 10
  optimizer: {{name: adamw, lr: 1e-3, eps: 1e-6, weight_decay: {{name: cosine, start: 0.04, end: 0.4}}}}
  schedule: {{name: warmup_cosine, warmup: 3}}
  clip_grad: 0.5
  threads: 1
  log_every: 1
  checkpoint: {{every: 3, keep: 2, best: student/retrieval/M}}
evaluate: {{every: 2, tasks: [{{name: retrieval}}]}}
tracking: null
"""


@dataclass
class Place:
    """Where the recipe is, and the end of the run that was not stopped, by its number of workers."""

    recipe: Path
    whole: dict[int, Path]


@pytest.fixture(scope="module")
def with_gate() -> Iterator[Registry]:
    sys.path.insert(0, str(GATE))
    yield Registry.discover()
    sys.path.remove(str(GATE))


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, write_shards: Callable[..., list[Path]], with_gate: Registry
) -> Place:
    base = tmp_path_factory.mktemp("resume")
    shards = base / "shards"
    write_shards(shards, 3, 4)
    # 5 samples of which one is bad: 4 good ones a shard
    write_shards(shards, 1, 5, prefix="trained", replace={(0, 2): {"png": b"no picture", "txt": b"a"}})
    write_shards(shards, 1, 6, prefix="validation")
    write_shards(shards, 1, 4, prefix="test")
    recipe = base / "small.yaml"
    recipe.write_text(RECIPE.format(folder=shards), encoding="utf-8")
    whole = {}
    for workers in (0, 2):
        loaded = load_recipe(recipe, registry=with_gate, overrides=[f"data.workers={workers}"])
        whole[workers] = Trainer(loaded, RunFolder.create(base / f"whole-{workers}", loaded), quiet=True).run().folder
    return Place(recipe, whole)


def distill(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """In a process group of its own, as a terminal gives it."""
    return subprocess.Popen(
        [sys.executable, "-m", "distill_core.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(GATE), "OMP_NUM_THREADS": "1", **environment},
    )


def stop(place: Place, workers: int, steps: int, kind: signal.Signals, folder: Path) -> tuple[Path, int, str]:
    """Run until step `steps` is being computed and signal then: (run folder, exit code, standard error)."""
    folder.mkdir(parents=True, exist_ok=True)
    process = distill(
        "run", str(place.recipe), "--runs", str(folder / "runs"), "--set", f"data.workers={workers}",
        GATE=str(folder), GATE_STEP=str(steps - 1),
    )  # fmt: skip
    end = time.monotonic() + 400
    while not (folder / "reached").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "the run did not reach its gate"
        time.sleep(0.02)
    # as Ctrl-C and batch systems do: to every process of the group, the loader's workers too
    os.killpg(process.pid, kind)
    (folder / "go").touch()
    _, errors = process.communicate(timeout=400)
    return folder / "runs" / "small", process.returncode, errors


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{path}: keys {sorted(map(str, a.keys() ^ b.keys()))}"] if a.keys() != b.keys() else []
        return found + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} entries"]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}.{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    return [] if type(a) is type(b) and a == b else [f"{path}: {a!r} and {b!r}"]


def assert_same_end(run: Path, whole: Path) -> None:
    """Every tensor, count and random state of the last checkpoint, and every row, but for times."""
    end, other = Checkpoints(run).read(), Checkpoints(whole).read()
    assert end["step"] == STEPS
    assert end["ranks"][0]["skipped_samples"] > 0
    assert len(end["optimizer"]["state"]) > 20
    assert any(key.startswith("teacher.") for key in end["objective"])
    end.pop("seconds"), other.pop("seconds")
    assert differences(end, other) == []
    rows, others = (_without_times(RunFolder(folder).rows()) for folder in (run, whole))
    assert [row["step"] for row in rows if "terms" in row] == list(range(1, STEPS + 1))
    assert rows == others
    assert (run / "skipped.jsonl").read_text() == (whole / "skipped.jsonl").read_text()
    assert Checkpoints(run).steps() == Checkpoints(whole).steps()
    best, other = Checkpoints(run).read("best"), Checkpoints(whole).read("best")
    assert best["step"] == other["step"]
    assert differences(best["objective"], other["objective"]) == []


def _without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key not in ("seconds", "samples_per_s", "timing")} for row in rows
    ]


def go_on(run: Path, registry: Registry) -> None:
    Trainer(run_recipe(run, registry), RunFolder(run), resume="last", quiet=True).run()


# the middle of the second epoch is also a step whose validation is due
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("steps", "kind"), [(EPOCH + 2, signal.SIGTERM), (2 * EPOCH, signal.SIGINT)])
def test_signal_then_resume(
    place: Place, with_gate: Registry, tmp_path: Path, workers: int, steps: int, kind: signal.Signals
) -> None:
    """Catches state that is not saved (data, optimiser, teacher, random generators, best score), a stop that loses the
    step it came in or the validation due at it, and workers that die of the signal and take the run with them."""
    run, code, errors = stop(place, workers, steps, kind, tmp_path)
    assert code == 128 + kind, errors
    assert f"{kind.name}: saved at step {steps}. Continue with: distill resume {run}" in errors
    assert "Traceback" not in errors
    assert Checkpoints(run).read()["step"] == steps
    assert not (run / "report.json").exists()
    go_on(run, with_gate)
    assert_same_end(run, place.whole[workers])
    assert (run / "report.json").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_kill_then_resume(place: Place, with_gate: Registry, tmp_path: Path, workers: int) -> None:
    """Nothing can be saved; the run goes on from its last checkpoint. Catches rows of lost steps that stay in the
    metrics (twice, then), and a last row that the kill cut off."""
    run, code, _ = stop(place, workers, 8, signal.SIGKILL, tmp_path)
    assert code == -signal.SIGKILL
    saved = Checkpoints(run).steps()[-1]
    assert saved in (3, 6), "that of step 6 may be half written"
    last = RunFolder(run).rows()[-1]
    assert last["step"] == 6, "a step's row is written during the next"
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**last, "step": 7}) + "\n")
        file.write('{"step": 8, "lo')
    if workers:
        go_on(run, with_gate)
    else:  # by the command, once
        process = distill("resume", str(run))
        output, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors
        assert f"resumed at step {saved} of {STEPS} steps" in errors
        assert re.search(r"skipped: \d+ samples? that could not be used, \d+ times?", output)
    assert_same_end(run, place.whole[workers])


def test_the_run_folders_recipe_gives_the_same_run(place: Place, with_gate: Registry, tmp_path: Path) -> None:
    """Catches a default, an override or the seed that the kept recipe lacks."""
    recipe = load_recipe(place.whole[0] / "recipe.yaml", registry=with_gate)
    again = Trainer(recipe, RunFolder.create(tmp_path, recipe), quiet=True).run().folder
    assert (again / "recipe.yaml").read_text() == (place.whole[0] / "recipe.yaml").read_text()
    assert_same_end(again, place.whole[0])


def test_the_comparison_sees_differences(place: Place, with_gate: Registry, tmp_path: Path) -> None:
    """Another seed must not pass for the same run: else the tests above show nothing."""
    recipe = load_recipe(place.recipe, registry=with_gate, overrides=["data.workers=0", "seed=1"])
    other = Trainer(recipe, RunFolder.create(tmp_path, recipe), quiet=True).run().folder
    with pytest.raises(AssertionError):
        assert_same_end(other, place.whole[0])


def test_resuming_a_finished_run_changes_nothing(place: Place, with_gate: Registry, tmp_path: Path) -> None:
    """Catches evaluations that are written twice when a run is resumed behind its last step."""
    recipe = load_recipe(place.recipe, registry=with_gate, overrides=["data.workers=0"])
    run = Trainer(recipe, RunFolder.create(tmp_path, recipe), quiet=True).run().folder
    go_on(run, with_gate)
    assert_same_end(run, place.whole[0])
