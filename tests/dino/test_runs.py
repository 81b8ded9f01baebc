"""Two ranks are one process; a run of one modality trains, stops, and goes on as if it had not stopped."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from launching import of_ranks

from distill_core.cli import main
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder

pytestmark = pytest.mark.slow


def test_two_ranks_have_one_centre_and_the_joint_gradients(tmp_path: Path, steps: ModuleType) -> None:
    """Catches a centre of one rank's rows, a mean over ranks that see different numbers of hidden patches, and
    Sinkhorn-Knopp within a rank."""
    ranks = of_ranks(2, Path(__file__).with_name("steps.py"), tmp_path)
    joint = steps.step(0, steps.SAMPLES)
    before = {name: x for name, x in steps.objective(steps.BOTH).named_buffers() if name in joint["centers"]}
    assert {"loss.dino.targets.center", "loss.ibot.targets.center"} <= set(joint["centers"])
    for name, center in joint["centers"].items():
        for rank in ranks:
            torch.testing.assert_close(rank["centers"][name], center, rtol=1e-10, atol=1e-12, msg=name)
        assert (center - before[name]).abs().max() > 1e-3 or ".even" in name, "it has moved"
    for name, term in joint["terms"].items():
        mean = (ranks[0]["terms"][name] + ranks[1]["terms"][name]) / 2
        torch.testing.assert_close(mean, term, rtol=1e-10, atol=1e-10, msg=name)
        assert (ranks[0]["terms"][name] - ranks[1]["terms"][name]).abs() > 1e-4, "ranks see other rows"
    for name, gradient in joint["gradients"].items():
        for rank in ranks:
            torch.testing.assert_close(rank["gradients"][name], gradient, rtol=1e-9, atol=1e-10, msg=name)


RECIPE = """
augment: {{image: {{name: multi_crop, size: 16, local_size: 8, global: 2, local: 1}}}}
backbone:
  image: {{name: vit, image_size: 16, patch: 4, width: 16, layers: 2, heads: 2, dim: 16, masking: {{}}}}
loss: [{{name: ibot, prototypes: 16, hidden: 16, bottleneck: 8, freeze_last_layer: 0.0}}, {{name: koleo, weight: 0.1}}]
teacher: {{momentum: {{name: cosine, start: 0.9, end: 1.0}}}}
data:
  source: {{name: webdataset, urls: "{folder}/train-*.tar"}}
  batch_size: 4
  workers: 0
  shuffle: 4
train: {{steps: 4, optimizer: {{name: adamw, lr: 1e-3}}, schedule: {{name: warmup_cosine, warmup: 1}}, threads: 1, \
log_every: 1, checkpoint: {{every: 2, keep: 9}}}}
tracking: null
"""


def test_a_run_of_one_modality_resumes_exactly(tmp_path: Path, tiny_recipe: Path) -> None:
    """Catches centres, masks or heads that a resumed run loses; and that a recipe of one modality, without a fusion and
    without a task, runs to its report."""
    recipe = tmp_path / "pictures.yaml"
    recipe.write_text(RECIPE.format(folder=tiny_recipe.parent / "shards"), encoding="utf-8")
    main(["run", str(recipe), "--runs", str(tmp_path / "runs"), "--quiet"])
    folder = RunFolder(tmp_path / "runs" / "pictures")
    assert (folder.path / "report.json").is_file()
    whole, rows = Checkpoints(folder.path).read(), folder.rows()
    assert whole["objective"]["loss.ibot.targets.center"].abs().max() > 0
    Checkpoints(folder.path).path(4).unlink()
    Checkpoints(folder.path).path(3).unlink(missing_ok=True)
    main(["resume", str(folder.path), "--quiet"])
    again = Checkpoints(folder.path).read()
    assert again["step"] == 4
    for name, value in whole["objective"].items():
        assert torch.equal(again["objective"][name], value), name
    assert [row["terms"] for row in folder.rows()] == [row["terms"] for row in rows]
    assert set(rows[0]["terms"]) == {"ibot/patch", "ibot/class", "koleo"}
