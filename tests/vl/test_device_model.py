"""`augment.image.device: model` in a whole recipe: workers, extras, the step, and a run that is resumed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distill_core.batch import Batch
from distill_core.data.lengths import measure
from distill_core.data.loader import Loader, patience_of
from distill_core.data.tar_shards import TarShard
from distill_core.outputs import Progress
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import parse_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_core.train import Trainer

pytestmark = pytest.mark.slow

RECIPE = """
augment:
  image: {{name: multi_crop, size: 32, local_size: 16, local: 2, masked: 1, device: {device}}}
  text: {{name: text_crop, local: 1}}
backbone:
  image: {{name: vit, image_size: 32, patch: 8, width: 16, layers: 1, heads: 2, dim: 16,
    masking: {{roles: [masked], targets: pixels, share: 1.0}}}}
  text: {{name: clip_text, width: 16, layers: 1, heads: 2, dim: 16, padding: longest}}
fusion: {{name: cross_attention, heads: 2}}
loss: [{{name: contrastive}}, {{name: cross_modal_distillation}}]
teacher: {{momentum: 0.9}}
data: {{source: {{name: webdataset, urls: "{folder}/train*.tar"}}, batch_size: 4, workers: {workers}, shuffle: 4}}
train: {{steps: 4, threads: 1, checkpoint: {{every: 2, keep: 2}}}}
tracking: null
"""


@pytest.fixture
def recipe(tmp_path: Path, write_shards: Callable[..., list[Path]], registry: Registry) -> Callable[..., Recipe]:
    write_shards(tmp_path, 2, 6)

    def parse(device: str, workers: int = 0) -> Recipe:
        text = RECIPE.format(device=device, workers=workers, folder=tmp_path)
        return parse_recipe(text, "small.yaml", registry=registry)

    return parse


def first_batch(recipe: Recipe) -> Batch:
    folder = Path(str(recipe.data.source.config.urls)).parent
    shards = [TarShard(path) for path in sorted(folder.glob("train*.tar"))]
    batches = iter(Loader(recipe, shards, measure(shards, patience_of(recipe))))
    batch = next(batches)
    batches.close()  # type: ignore[attr-defined]
    return batch


@pytest.mark.parametrize("workers", [0, 1])
def test_both_devices_make_the_same_step(recipe: Callable[..., Recipe], workers: int) -> None:
    """Catches extras that are lost between worker and step, and targets made of pixels that are not normalised yet."""
    finished, losses = [], []
    for device in ("cpu", "model"):
        parsed = recipe(device, workers)
        torch.manual_seed(0)
        objective = build_objective(parsed)
        batch = first_batch(parsed)
        assert all(group.x.dtype == torch.uint8 for group in batch.views["image"].groups)
        finished.append(objective.on_device(batch).views["image"].groups)
        outputs = objective.represent(batch, Progress(0, 4))
        losses.append(objective.losses(outputs).total)
    for a, b in zip(*finished, strict=True):
        count = a.x.shape[0]
        assert a.extra["box"].shape == (count, 4, 4)
        assert a.extra["flip"].shape == (count, 4)
        assert torch.equal(a.extra["box"], b.extra["box"])
        assert ((a.x - b.x).abs() > 1e-3).float().mean() < 0.01
        assert (a.x - b.x).abs().max() < 1.01 / 255 / 0.26
    masked = finished[0][-1]
    assert masked.role == "masked"
    assert torch.equal(masked.x[0], finished[0][0].x[0])
    assert masked.targets is not None
    patch = masked.x[0, 0, :, :8, 8:16].flatten()
    torch.testing.assert_close(masked.targets[0, 0, 1], (patch - patch.mean()) / (patch.var() + 1e-6).sqrt())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)


def test_a_resumed_run_sees_the_same_views(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    parsed = recipe("model", 1)
    whole = RunFolder.create(tmp_path / "whole", parsed)
    Trainer(parsed, whole, quiet=True).run()
    again = RunFolder.create(tmp_path / "again", parsed)
    Trainer(parsed, again, quiet=True).run()
    Trainer(parsed, again, resume="2", quiet=True).run()
    assert list(again.path.glob("set-aside-*")), "it went back to step 2"
    one, other = (Checkpoints(folder.path).read("last")["objective"] for folder in (whole, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
