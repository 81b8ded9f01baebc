"""Two processes over gloo: the joint batch's gradients, and a whole run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from beside import load_beside
from launching import launched, of_ranks
from score_values import reported

from distill_core.cli import main
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_core.run.load import run_recipe
from distill_core.run.lockstep import LOOK_AHEAD
from distill_core.train import Trainer

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("distributed_step.py")


one, two = (partial(launched, ranks, succeeds=False) for ranks in (1, 2))


@pytest.fixture(scope="module")
def step() -> ModuleType:
    return load_beside(__file__, "distributed_step")


def test_two_ranks_have_the_joint_batchs_gradients(tmp_path: Path, step: ModuleType) -> None:
    """Catches negatives of one rank alone, gradients that stop at the gather, a sum in place of a mean, and positives
    looked for in the wrong rows (all but the last give right losses in one process)."""
    ranks = of_ranks(2, SCRIPT, tmp_path)
    joint = step.step(0, step.SAMPLES)
    assert set(joint["terms"]) == {"contrastive", "cross_modal_distillation", "clip"}
    for name, term in joint["terms"].items():
        mean = (ranks[0]["terms"][name] + ranks[1]["terms"][name]) / 2
        torch.testing.assert_close(mean, term, rtol=1e-10, atol=1e-10)
        assert (ranks[0]["terms"][name] - ranks[1]["terms"][name]).abs() > 1e-4, "ranks see other rows"
    for name, gradient in joint["gradients"].items():
        for rank in ranks:
            torch.testing.assert_close(rank["gradients"][name], gradient, rtol=1e-10, atol=1e-10, msg=name)
    alone = step.step(0, step.SAMPLES // 2)["gradients"]["backbone.image.proj"]
    assert (alone - joint["gradients"]["backbone.image.proj"]).abs().max() > 1e-4
    for i, rank in enumerate(ranks):
        assert rank["lonely"].tolist() == [1.0, 2.0], "a parameter without a gradient on one rank counts as 0 there"
        assert rank["any"] == [True, False]
        assert rank["objects"] == [{"rank": 0}, {"rank": 1}], i


def test_compiled_units_in_parts_have_the_joint_batchs_gradients(tmp_path: Path, step: ModuleType) -> None:
    """`train.parallel` with `compile`, `shard: all` and each way of `checkpointing` at once, against the eager step of
    one process. Catches an order of the three that breaks one of them, graphs that hold a unit's parameters as they
    were before they were gathered, and a compilation for each length."""
    ranks = of_ranks(2, SCRIPT.with_name("distributed_compiled.py"), tmp_path)
    for number, tokens in enumerate((7, 6, 8)):
        joint = step.step(0, step.SAMPLES, tokens)
        for kind in ("none", "selective", "full"):
            steps = [rank[kind][number] for rank in ranks]
            for name, term in joint["terms"].items():
                mean = (steps[0]["terms"][name] + steps[1]["terms"][name]) / 2
                torch.testing.assert_close(mean, term, rtol=1e-10, atol=1e-10)
            for made in steps:
                assert made["gradients"].keys() == joint["gradients"].keys()
                for name, gradient in joint["gradients"].items():
                    torch.testing.assert_close(made["gradients"][name], gradient, rtol=1e-10, atol=1e-10, msg=name)
    for rank in ranks:
        for steps in rank.values():
            assert steps[0]["sharded"] > 20
            assert steps[0]["graphs"] > 5
            assert steps[1]["graphs"] == steps[2]["graphs"]


def test_ranks_wait_for_the_device_once_a_step_and_for_one_another_only_where_they_must(
    tiny_recipe: Path, registry: Registry, tmp_path: Path
) -> None:
    """Rank 1 gets a signal in step 4, which the other hears of with that step's numbers, when step 5 has begun.

    Catches a loss, a norm, a length or a parameter's use that is read of the device in a step, a collective on the host
    at each step, and ranks that stop after different steps.
    """
    runs = tmp_path / "runs"
    folder = RunFolder.create(runs, load_recipe(tiny_recipe, registry=registry))
    launched(2, SCRIPT.with_name("distributed_host_reads.py"), tiny_recipe, folder.path)
    for rank in range(2):
        made = json.loads((runs / f"rank-{rank}.json").read_text())
        assert made["met"] == [0, 1, 7], "before the first two steps nobody knows, and before the last that is not made"
        assert made["step"] == 7
        assert made["counts"] == [0, 0, 1, 2, 3, 4, 5], made["lines"]
        assert all("transfer.py" in line for line in made["lines"])


def test_an_evaluation_of_two_ranks_never_falls_out_of_step(tmp_path: Path) -> None:
    """Catches rank 0's pictures that pair with the other rank's next score, and a rank without shards, or that cannot
    read a sample or encode its share, that the other waits for: all would hang, die, or mix embeddings."""
    done = two(str(SCRIPT.with_name("distributed_evaluation.py")), str(tmp_path))
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank-{i}.json").read_text()) for i in range(2))
    assert first["scores"] == second["scores"] == {"student/one/n": 3.0, "student/two/n": 3.0}
    assert "'b' that `run` did not compute, which takes all ranks" in first["no_media"]
    assert second["no_media"] is None
    assert first["missing"] == second["missing"] == ["gone.tar: no such file"]
    directions = torch.nn.functional.normalize(torch.tensor([[float(i), 1.0] for i in range(5)]), dim=1)
    torch.testing.assert_close(torch.tensor(first["shared"]), directions)
    assert first["shared"] == second["shared"]
    assert first["learned"] == second["learned"]
    failed = [
        f"tasks.{i} ({i}): {why}" for i, why in enumerate(["cut.tar: ends too early"] * 3 + ["no sample is left"])
    ]
    assert first["unread"] == second["unread"] == [failed, {"student/4/n": 3.0}]
    cut = [f"tasks ({name}): cut.tar: ends at once" for name in ("segmentation", "composition")]
    assert first["first"] == second["first"] == cut
    assert first["refused"] == second["refused"] == "out of order"
    assert first["learned"]["top1"] == 100.0, "each sample's nearest is itself, whichever rank encoded it"


@pytest.mark.parametrize("where", ["batch", "step", "row"])
def test_a_rank_that_fails(tmp_path: Path, tiny_recipe: Path, where: str) -> None:
    """Catches a rank that waits for ever for one that failed; steps that are lost though both stood between two; a
    checkpoint of one rank alone, or of one step's weights under another's number; and rows of metrics.jsonl with the
    losses of rank 0 alone."""
    runs = tmp_path / "runs"
    done = two(str(SCRIPT.with_name("distributed_failures.py")), str(tiny_recipe), str(runs), where, "3")
    assert done.returncode != 0
    assert "a slip of the plugin" in done.stderr
    folder = RunFolder(runs / "tiny")
    if where == "row":  # of step 4: the ranks have step 5, and meet before step 7 at the latest
        state, step = Checkpoints(folder.path).read(), Checkpoints(folder.path).steps()[-1]
        assert 5 <= step <= 5 + LOOK_AHEAD
        assert {float(of["step"]) for of in state["optimizer"]["state"].values()} == {float(step)}
        assert [rank["data"]["position"] for rank in state["ranks"]] == [8 * step] * 2
        assert f"ZeroDivisionError in the row of step 4: saved at step {step}. Continue with" in done.stderr
    elif where == "batch":
        assert len(Checkpoints(folder.path).read()["ranks"]) == 2
        assert Checkpoints(folder.path).steps() == [2, 3]
        assert "saved at step 3, before the error below" in done.stderr
        assert re.search(r"^rank 1: .* augment\.text \(slips\) failed: ZeroDivisionError", done.stderr, re.MULTILINE)
        failed_first = r"^rank 0: rank 1 \(.*\) failed first: .* augment\.text \(slips\) failed: ZeroDivisionError"
        assert re.search(failed_first, done.stderr, re.MULTILINE)
    else:
        assert Checkpoints(folder.path).steps() == [2]
        assert "rank 1: step 3 is not saved: the other ranks are in the middle of a step" in done.stderr
        assert "the last checkpoint is of step 2" in done.stderr
    rows = [row for row in folder.rows() if "terms" in row]
    # the numbers of step 3 would have been read, by both ranks, in the step that failed: it is lost with its row
    written = {"batch": [1, 2, 3], "step": [1, 2], "row": [1, 2, 3, *range(5, rows[-1]["step"] + 1)]}
    assert [row["step"] for row in rows] == written[where]
    for row in rows:  # of losses 0 and 2, and metrics 0 and 1
        assert (row["loss"], row["terms"], row["metrics"]["rank_loss/rank"]) == (1.0, {"rank_loss": 1.0}, 0.5)


def test_torchrun_restarts_the_run_that_it_began(tmp_path: Path, tiny_recipe: Path) -> None:
    """Catches a second folder and a start at step 1, when torchrun starts all ranks again after one was killed."""
    runs = tmp_path / "runs"
    # not --standalone, which names each launch
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
    restarts = ("-m", "torch.distributed.run", *rendezvous, "--nproc-per-node", "2", "--max-restarts", "1")
    done = one(*restarts, str(SCRIPT.with_name("distributed_failures.py")), str(tiny_recipe), str(runs), "once", "3")
    assert done.returncode == 0, done.stderr
    assert f"{runs / 'tiny'}: restarted by torchrun, so this run is continued" in done.stderr
    assert "resumed at step 2 of 6 steps" in done.stderr
    assert [path.name for path in runs.iterdir()] == ["tiny"]
    assert [row["step"] for row in RunFolder(runs / "tiny").rows() if "terms" in row] == [1, 2, 3, 4, 5, 6]


def test_a_run_of_two_ranks(
    tmp_path: Path,
    tiny_recipe: Path,
    registry: Registry,
    write_shards: Callable[..., list[Path]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a folder or rows for each rank, samples that both ranks see, skipped samples of rank 1 that nobody
    counts, and a resume that loses a rank's place in the data."""
    bad = {(i, 1): {"png": b"no", "txt": b"a"} for i in range(4)}
    write_shards(tiny_recipe.parent / "shards", 4, 5, replace=bad)
    write_shards(tiny_recipe.parent / "shards", 1, 9, prefix="test", replace={(0, 2): {"png": b"no", "txt": b"a"}})
    options = ("data.batch_size=2", "train.steps=7", "train.checkpoint={every: 4, keep: 9}")
    settings = [part for option in options for part in ("--set", option)]
    runs = tmp_path / "runs"
    done = two("-m", "distill_core.cli", "run", str(tiny_recipe), "--runs", str(runs), *settings)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in runs.iterdir()] == ["tiny"]
    folder = RunFolder(runs / "tiny")
    assert [row["step"] for row in folder.rows() if "terms" in row] == list(range(1, 8))
    assert len([row for row in folder.rows() if "scores" in row]) == 1
    report = json.loads((folder.path / "report.json").read_text())
    assert report["samples"] == 7 * 4
    rows = [json.loads(line) for line in folder.skipped.read_text().splitlines()]
    skipped = [row for row in rows if row["key"] != "test-0-2"]
    assert len(rows) == len(skipped) + 1
    assert report["skipped_reads"] == len(skipped)
    assert {row["key"] for row in skipped} == {f"train-{i}-1" for i in range(4)}
    assert done.stdout.count("report.json") == 1
    assert "warning: skipped sample" in done.stderr

    whole = Checkpoints(folder.path).read()
    assert len(whole["ranks"]) == 2
    assert [rank["data"]["position"] for rank in whole["ranks"]] == [28, 28], "of both ranks together"
    rows = folder.rows()
    done = two("-m", "distill_core.cli", "resume", str(folder.path), "--checkpoint", "4")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("going back to step 4: step-00000007.pt and their metrics and reports are set aside") == 1
    assert [path.name for path in folder.path.glob("set-aside-*")] == ["set-aside-1"]
    again = Checkpoints(folder.path).read()
    assert again["step"] == 7
    assert all(torch.equal(again["objective"][key], value) for key, value in whole["objective"].items())
    assert again["ranks"][1]["data"] == whole["ranks"][1]["data"]
    assert [row.get("terms") for row in folder.rows()] == [row.get("terms") for row in rows]
    again_skipped = [line for line in folder.skipped.read_text().splitlines() if "test-0-2" not in line]
    assert sorted(again_skipped) == sorted(json.dumps(row) for row in skipped)

    def one_process(*arguments: str) -> tuple[list[dict[str, Any]], str]:
        """The scores, and what is said beside them."""
        capsys.readouterr()
        main(["eval", str(folder.path), "--json", *arguments])
        printed = capsys.readouterr()
        return json.loads(printed.out), printed.err

    # each rank encodes its share of the samples, or goes through it: all scores are those of one process
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    scenes = "source: {name: emoji_scenes, scenes: 5, concepts: 5, size: 32, emoji: {limit: 150, shards: 1, size: 16}}"
    own = [f"{{name: {name}, {scenes}}}" for name in ("segmentation", "composition")]
    tasks = [part for task in ("retrieval", *own) for part in ("--task", task)]
    alone, said = one_process(*tasks)
    shared = two("-m", "distill_core.cli", "eval", str(folder.path), "--json", "--no-cache", *tasks)
    assert shared.returncode == 0, shared.stderr
    assert json.loads(shared.stdout) == alone
    assert [score for score in alone if score["task"] == "retrieval"] == report["scores"]
    assert reported(alone)["student/segmentation/twemoji/pictures"] == 5
    assert shared.stderr.count("'test-0-2'") == said.count("'test-0-2'") == 1
    # and of one checkpoint, where the run saves another between the two ranks' looks at its folder
    Checkpoints(folder.path).save(7, whole, best=True)
    apart = two(str(SCRIPT.with_name("distributed_eval_command.py")), str(folder.path))
    assert (folder.path / "replaced").exists(), apart.stderr
    assert json.loads(apart.stdout) == report["scores"], apart.stderr
    (later, _), (uncached, _) = (one_process("--checkpoint", "best", *option) for option in ((), ("--no-cache",)))
    assert later == uncached != report["scores"]
    # one process continues with the batches of both
    single = Trainer(run_recipe(folder.path, registry), folder, resume="last", quiet=True)
    assert (single.state.step, single.loader.position, single.loader.batch_size) == (7, 28, 4)
    assert single.state.skipped_samples == len(skipped)
