"""Data wait, step time, memory and MFU of a run's rows."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from distill_core import Progress
from distill_core.cli import cli
from distill_core.data.example import example_batch
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import load_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry
from distill_core.run import utilization
from distill_core.run.utilization import Utilization, matmul_peak, step_flops
from distill_core.system import distributed
from distill_core.system.flops import flop_counter

CPU = torch.device("cpu")


@pytest.fixture
def recipe(tiny_recipe: Path, registry: Registry) -> Recipe:
    return load_recipe(tiny_recipe, registry=registry)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))


def test_flops_are_those_of_the_step_and_nothing_is_drawn(recipe: Recipe) -> None:
    batch = example_batch(recipe, 6)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    flops = step_flops(recipe, batch, CPU)
    assert torch.equal(torch.rand(4), expected)
    objective = build_objective(recipe)
    with flop_counter() as counter:
        objective.losses(objective.represent(batch, Progress(0, 1))).total.backward()
    assert flops == counter.get_total_flops() > 0


def test_the_peak_is_measured_once_a_device_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later process reads it; a damaged file is measured again."""
    made: list[torch.dtype] = []

    def measured(device: torch.device, dtype: torch.dtype, n: int) -> float:
        made.append(dtype)
        return 1e9 + len(made)

    monkeypatch.setattr(utilization, "_measured_peak", measured)
    assert [matmul_peak(CPU, "fp32"), matmul_peak(CPU, "bf16"), matmul_peak(CPU, "fp32")] == [1e9 + 1, 1e9 + 2, 1e9 + 1]
    assert made == [torch.float32, torch.bfloat16]
    utilization.cache_folder().joinpath("matmul_peaks.json").write_text("[")
    assert matmul_peak(CPU, "fp32") == 1e9 + 3


def test_a_measured_peak_is_that_of_products() -> None:
    assert utilization._measured_peak(CPU, torch.float32, 64, seconds=0.01) > 1e6


def test_share_of_the_peak(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """None in the first half minute; then FLOPs a second over the peak's, counted for one batch alone."""
    monkeypatch.setattr(utilization, "matmul_peak", lambda device, precision: 100.0)
    monkeypatch.setattr(utilization, "step_flops", lambda recipe, batch, device: 50)
    used = Utilization(recipe, CPU, pytest.fail)
    batch = example_batch(recipe, 2)
    used.look(batch, 29.0)
    assert used.share(2.0) is None
    used.look(batch, 31.0)
    assert used.share(2.0) == 0.25
    monkeypatch.setattr(utilization, "step_flops", lambda recipe, batch, device: 10**9)
    used.look(batch, 32.0)
    assert used.share(2.0) == 0.25


def test_a_step_that_cannot_be_looked_at_is_one_warning(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise RuntimeError("reads values")

    monkeypatch.setattr(utilization, "step_flops", fails)
    said: list[str] = []
    used = Utilization(recipe, CPU, said.append)
    for _ in range(2):
        used.look(example_batch(recipe, 2), 31.0)
    assert used.share(1.0) is None
    assert len(said) == 1
    assert "no mfu" in said[0]
    assert "reads values" in said[0]


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 3)
    with distributed.alone():
        assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert (distributed.rank(), distributed.world_size()) == (3, 4)


@pytest.mark.slow
def test_rows_of_a_run(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row says where its time went; that FLOPs were counted on the way changes no loss."""

    def rows(name: str) -> list[dict[str, object]]:
        runs = str(tmp_path / name)
        done = CliRunner().invoke(cli, ["run", str(tiny_recipe), "--runs", runs, "--set", "evaluate=null"])
        assert done.exit_code == 0, done.output
        (file,) = Path(runs).rglob("metrics.jsonl")
        return [json.loads(line) for line in file.read_text().splitlines()]

    short = rows("short")
    monkeypatch.setattr(utilization, "AFTER", 0.0)
    counted = rows("counted")
    for row, other in zip(short, counted, strict=True):
        timing, with_mfu = row["timing"], other["timing"]
        assert isinstance(timing, dict)
        assert isinstance(with_mfu, dict)
        assert 0 <= timing["data_wait_s"] <= timing["step_s"]
        assert timing["peak_memory_gb"] > 0.01
        assert "mfu" not in timing
        assert 0 < with_mfu["mfu"] < 1
        assert row["loss"] == other["loss"]
