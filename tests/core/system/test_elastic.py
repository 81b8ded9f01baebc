"""Runs whose ranks hold parts of the model: saved in parts, and continued on other ranks, in other parts, or alone."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import launched
from torch import Tensor

import distill_core
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder

pytestmark = pytest.mark.slow
STEPS = 6


def launch(ranks: int, *command: str) -> subprocess.CompletedProcess[str]:
    return launched(ranks, "-m", "distill_core.cli", *command)


def start(recipe: Path, runs: Path, ranks: int, shard: str) -> RunFolder:
    """A run of STEPS steps of 8 samples, saved at each second."""
    options = (
        f"data.batch_size={8 // ranks}",
        f"train.steps={STEPS}",
        "train.checkpoint={every: 2, keep: 9}",
        f"train.parallel.shard={shard}",
        "train.log_every=1",
        "evaluate.tasks=[]",
    )
    launch(ranks, "run", str(recipe), "--runs", str(runs), *(part for option in options for part in ("--set", option)))
    return RunFolder(runs / "tiny")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, write_shards: Callable[..., list[Path]], recipe_text: str) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    write_shards(folder / "shards", 3, 7)
    for prefix in ("validation", "test"):
        write_shards(folder / "shards", 1, 8, prefix=prefix)
    path = folder / "tiny.yaml"
    path.write_text(recipe_text.format(folder=folder / "shards"))
    return path


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> RunFolder:
    """On two ranks, each of which holds half of every tower."""
    return start(recipe, tmp_path_factory.mktemp("parts"), 2, "all")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> RunFolder:
    return start(recipe, tmp_path_factory.mktemp("alone"), 1, "1")


def weights(folder: RunFolder) -> dict[str, Tensor]:
    state: dict[str, Tensor] = Checkpoints(folder.path).read()["objective"]
    return state


def losses(folder: RunFolder) -> list[float]:
    return [row["loss"] for row in folder.rows() if "terms" in row]


def test_a_checkpoint_is_in_parts_and_is_read_as_any_other(in_parts: RunFolder) -> None:
    """Catches a first rank that gathers the whole model, and tools that stumble over parts."""
    folder = in_parts.path / "checkpoints"
    names = sorted(path.name for path in folder.glob("step-00000006*"))
    assert names == ["step-00000006.part-0-of-2.pt", "step-00000006.part-1-of-2.pt", "step-00000006.pt"]
    first, second = (folder / name for name in names[:2])
    assert first.stat().st_size == pytest.approx(second.stat().st_size, rel=0.2)
    assert first.stat().st_size > 2 * (folder / names[2]).stat().st_size
    model = distill_core.load(str(in_parts.path))
    assert all(torch.isfinite(p).all() for p in model.backbone["image"].parameters())
    scores = json.loads(launch(1, "eval", str(in_parts.path), "--task", "retrieval", "--json").stdout)
    assert scores


def test_ranks_in_parts_train_as_one_process(in_parts: RunFolder, alone: RunFolder) -> None:
    """Would catch wrong gradients, batches or moving averages."""
    ours, theirs = weights(in_parts), weights(alone)
    assert list(ours) == list(theirs)
    assert losses(in_parts) == pytest.approx(losses(alone), rel=1e-4)
    for name, tensor in theirs.items():
        if name.endswith(
            "attn.in_proj_bias"
        ):  # of keys, whose gradient is zero but for rounding, which Adam makes large
            continue
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    ("ranks", "shard"), [(2, "all"), (1, "1"), (2, "1"), (4, "2"), (4, "all")], ids=lambda value: str(value)
)
def test_a_run_in_parts_goes_on_in_any_layout(tmp_path: Path, in_parts: RunFolder, ranks: int, shard: str) -> None:
    """From step 2, under a `parallel`, numbers of ranks and of workers of its own: catches batches that differ, and an
    optimiser's state or rows of weights that go to other parameters. In the layout of the first run bits are equal."""
    path = shutil.copytree(in_parts.path, tmp_path / "run")
    for number in (4, 6):
        for file in (path / "checkpoints").glob(f"step-0000000{number}*"):
            file.unlink()
    recipe = path / "recipe.yaml"
    text = recipe.read_text().replace("shard: all", f"shard: {shard}")
    recipe.write_text(text.replace("workers: 0", "workers: 1") if ranks == 1 else text)
    done = launch(ranks, "resume", str(path))
    assert f"resumed at step 2 of {STEPS} steps" in done.stderr
    folder = RunFolder(path)
    ours, theirs = weights(folder), weights(in_parts)
    assert list(ours) == list(theirs)
    same = (ranks, shard) == (2, "all")
    for name, tensor in theirs.items():
        if not same and name.endswith("attn.in_proj_bias"):
            continue
        tolerance = {"rtol": 0.0, "atol": 0.0} if same else {"rtol": 1e-3, "atol": 2e-5}
        torch.testing.assert_close(ours[name], tensor, **tolerance, msg=lambda text, n=name: f"{n}: {text}")
    assert losses(folder) == pytest.approx(losses(in_parts), rel=0 if same else 1e-4)


def test_a_damaged_part_is_passed_over(tmp_path: Path, in_parts: RunFolder) -> None:
    path = shutil.copytree(in_parts.path, tmp_path / "run")
    (path / "report.json").unlink()  # else it is finished, and stays as it is
    part = path / "checkpoints" / "step-00000006.part-1-of-2.pt"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    done = launch(2, "resume", str(path))
    assert f"{part}: cannot be read (damaged: its digest differs from the saved one); using step-" in done.stderr
    for name, tensor in weights(in_parts).items():
        assert torch.equal(weights(RunFolder(path))[name], tensor)
