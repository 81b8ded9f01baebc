"""CLIPSelf: the loss against loops and torchvision, regions against pixels, the tower against the ViT, and a run."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from distill_clipself.loss import ClipSelf, ClipSelfConfig, region_means, within
from distill_clipself.tower import DenseVit, DenseVitConfig
from distill_clipself.views import GridRegions, cells_of, grids
from distill_core import (
    BackboneSpec,
    Features,
    Group,
    ModalityPlan,
    Outputs,
    Plan,
    Progress,
    TeacherPlan,
    View,
    Views,
)  # fmt: skip
from distill_core.errors import RecipeErrors
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_core.tools import main
from distill_vl.vit import VisionTransformer

VIT = {"image_size": 16, "patch": 4, "width": 12, "layers": 3, "heads": 2, "dim": 8}


def boxes(*shape: int, smallest: float = 0.05) -> Tensor:
    corner = torch.rand(*shape, 2) * 0.6
    return torch.cat([corner, (corner + smallest + torch.rand(*shape, 2) * 0.5).clamp(max=1)], -1)


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (3, 7), (1, 4)])
def test_region_means_are_torchvisions(rows: int, columns: int) -> None:
    """Would catch corners that are taken for centres, directions exchanged, and another number of samples."""
    ops = pytest.importorskip("torchvision.ops")
    features, where = torch.randn(3, rows, columns, 5), boxes(4, 3)
    where[0, 0] = torch.tensor([0.0, 0, 1, 1])
    where[1, 1] = torch.tensor([0.3, 0.3, 0.3001, 0.9])  # next to nothing
    size = torch.tensor([columns, rows] * 2)
    expected = torch.stack(
        [
            ops.roi_align(
                features.permute(0, 3, 1, 2), [(box * size)[None] for box in of_view], 1, 1.0, -1, aligned=True
            ).flatten(1)
            for of_view in where
        ]
    )
    torch.testing.assert_close(region_means(features, where), expected, atol=1e-5, rtol=1e-4)


def example(batch: int = 3, regions: int = 4, mirrored: bool = False) -> tuple[ClipSelf, Outputs, dict[str, Tensor]]:
    """A loss whose teacher sees the regions alone, and what it reads."""
    spec = BackboneSpec(8, 8, stride=(4, 4))
    modality = ModalityPlan(("global", *["region"] * regions), spec, extras=("box", "flip", "counted"))
    plan = Plan({"image": modality}, {"default": TeacherPlan({"image": tuple(range(1, regions + 1))})})
    loss = ClipSelf(ClipSelfConfig(), plan)
    made = {
        "tokens": torch.randn(batch, 12, 8, requires_grad=True),
        "target": torch.randn(regions, batch, 8),
        "whole": boxes(1, batch, smallest=0.3),
        "counted": torch.rand(regions, batch) < 0.6,
    }
    made["counted"][0] = True
    inside = boxes(regions, batch)
    corner, size = made["whole"][..., :2], made["whole"][..., 2:] - made["whole"][..., :2]
    made["inside"], made["box"] = inside, torch.cat([corner, corner], -1) + inside * torch.cat([size, size], -1)
    groups = [
        Group(torch.zeros(1, batch, 3, 12, 16), extra={"box": made["whole"], "counted": torch.ones(1, batch) > 0}),
        Group(torch.zeros(regions, batch, 3, 4, 4), "region", extra={"box": made["box"], "counted": made["counted"]}),
    ]
    student = {"image": Features(torch.zeros(1 + regions, batch, 8), {0: made["tokens"]}, {})}
    teacher = {"default": {"image": Features(made["target"])}}
    outputs = Outputs({"image": Views(groups)}, student, teacher, {}, None, Progress(0, 1), lambda module: module)
    return loss, outputs, made


def test_the_loss_is_a_mean_of_cosines() -> None:
    """Against loops over samples and regions, which sample the map themselves. Would catch regions paired with another
    sample's crop, edges of the picture in place of the view's, and repeated cells that count."""
    loss, outputs, made = example()
    terms, _ = loss(outputs)
    losses = []
    for b in range(3):
        dense = normalize(made["tokens"][b].detach(), dim=-1).view(3, 4, 8)
        for r in range(4):
            if not made["counted"][r, b]:
                continue
            left, top, right, bottom = (made["inside"][r, b] * torch.tensor([4, 3, 4, 3])).tolist()
            down, across = max(1, math.ceil(bottom - top)), max(1, math.ceil(right - left))
            total = torch.zeros(8)
            for i in range(down):
                for j in range(across):
                    y = min(max(top + (i + 0.5) * (bottom - top) / down - 0.5, 0), 2)
                    x = min(max(left + (j + 0.5) * (right - left) / across - 0.5, 0), 3)
                    for row in {math.floor(y), math.ceil(y)}:
                        for column in {math.floor(x), math.ceil(x)}:
                            total += (1 - abs(y - row)) * (1 - abs(x - column)) * dense[row, column]
            losses.append(1 - cosine_similarity(total, made["target"][r, b], dim=0).item())
    assert terms["clipself"].item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    terms["clipself"].backward()
    assert made["tokens"].grad is not None
    assert made["tokens"].grad.abs().sum() > 0


def test_boxes_within_a_box() -> None:
    outer = torch.tensor([0.2, 0.4, 0.6, 0.8])
    assert torch.allclose(within(outer, outer), torch.tensor([0.0, 0, 1, 1]))
    assert torch.allclose(within(torch.tensor([0.3, 0.4, 0.4, 0.6]), outer), torch.tensor([0.25, 0, 0.5, 0.5]))


def public_grids(most: int) -> Iterator[tuple[int, int]]:
    """As the public code lists them, the second from half of the first to twice of it."""
    for m in range(1, most + 1):
        for n in range(math.ceil(m / 2), min(2 * m, most) + 1):
            yield m, n


@pytest.mark.parametrize("split", [1, 3, 6])
def test_grids_are_the_public_codes(split: int) -> None:
    assert sorted(grids(split)) == sorted(public_grids(split))


@pytest.mark.parametrize("box", [(0, 0, 48, 48), (5, 3, 17, 11), (0, 0, 2, 3)])
def test_cells_tile_the_box(box: tuple[int, int, int, int]) -> None:
    """Each pixel is in one cell. Would catch a last cell that is cut off, and cells of nothing."""
    left, top, width, height = box
    for rows, columns in grids(4):
        cells = list(cells_of(box, rows, columns))
        assert len(cells) == rows * columns
        assert all(w >= 1 and h >= 1 and x >= left and y >= top for x, y, w, h in cells)
        assert all(x + w <= left + width and y + h <= top + height for x, y, w, h in cells)
        if rows <= height and columns <= width:
            assert sum(w * h for _, _, w, h in cells) == width * height


def drawn(seed: int, **options: Any) -> tuple[list[View], Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    config = {"size": 16, "region_size": 8, "regions": 5, "split": 3, **options}
    made = GridRegions(GridRegions.Config.model_validate(config))
    return made.train_views({"png": file.getvalue()}, np.random.default_rng(seed)), Image.fromarray(pixels)


def test_regions_are_the_pixels_of_their_boxes() -> None:
    """Cut out of the picture as it is stored, inside of the view. Would catch crops of the resized view, and boxes of
    other cells; repeated cells are marked."""
    seen = set()
    for seed in range(40):
        (whole, *regions), picture = drawn(seed)
        assert (whole.role, bool(whole.extra["counted"])) == ("global", True)
        outer = whole.extra["box"]
        unique = {tuple(view.extra["box"].tolist()) for view in regions}
        assert sum(bool(view.extra["counted"]) for view in regions) == len(unique)
        seen.add(len(unique))
        for view in regions:
            assert not view.extra["flip"]
            left, top, right, bottom = (view.extra["box"] * [60, 40, 60, 40]).round().astype(int).tolist()
            crop = np.asarray(picture.crop((left, top, right, bottom)))
            own = torch.nn.functional.interpolate(
                torch.from_numpy(crop.copy()).permute(2, 0, 1)[None], (8, 8), mode="bicubic", antialias=True
            )[0]
            assert torch.equal(own, view.data)
            inside = within(torch.from_numpy(view.extra["box"]), torch.from_numpy(outer))
            assert inside.min() > -1e-5
            assert inside.max() < 1 + 1e-5
    assert seen == {1, 2, 4, 5}, "no grid has three cells: neither side is more than twice the other"


def towers() -> tuple[VisionTransformer, DenseVit]:
    torch.manual_seed(0)
    plain = VisionTransformer(VisionTransformer.Config.model_validate(VIT))
    dense = DenseVit(DenseVitConfig.model_validate(VIT))
    dense.load_state_dict(plain.state_dict())
    return plain, dense


def test_the_tower_is_the_vit_and_its_dense_embeddings() -> None:
    """Of the same weights: the embedding is the ViT's, the tokens what `segmentation` reads; regions cost nothing."""
    plain, dense = towers()
    x = torch.randn(2, 3, 3, 16, 16)
    views = Views([Group(x), Group(torch.full((4, 3, 3, 8, 8), math.nan), "region")])
    features = dense(views, tokens_of=(1,))
    expected = plain(Views([Group(x)]))
    torch.testing.assert_close(features.pooled[:2], expected.pooled)
    assert features.pooled.shape == (6, 3, 8)
    assert torch.equal(features.pooled[2:], torch.zeros(4, 3, 8))
    _, patches = plain.dense(x[1], attention="value")
    torch.testing.assert_close(features.tokens[1], patches.flatten(1, 2))
    assert list(features.tokens) == [1]
    with pytest.raises(ValueError, match="it must be class_token"):
        DenseVitConfig.model_validate({**VIT, "pooling": "attention"})


def test_a_teacher_that_does_not_see_the_regions_is_refused(registry: Registry) -> None:
    """Before any weights are read."""
    with pytest.raises(RecipeErrors, match=r"of the views of role .region.: set its `views: \[region\]`"):
        load_recipe("clipself_tiny", registry=registry, overrides=["teacher.views=[global]"])


@pytest.mark.slow
def test_two_commands(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of pairs, then one from its checkpoint, whose regions get nearer to the class tokens. Would catch a teacher
    that moves, a text tower that is trained, and a student that starts anew."""
    monkeypatch.chdir(tmp_path)
    main(["run", str(tiny_recipe), "--quiet", "--set", "loss=[{name: contrastive}]", "--set", "fusion=null",
          "--set", "teacher=null", "--set", "augment.image.local=0", "--set", "augment.text={name: caption}",
          "--set", "evaluate=null"])  # fmt: skip
    vit = "image_size: 16, patch: 8, width: 16, layers: 2, heads: 2, dim: 16"
    load = "name: state_dict, source: runs/tiny"
    main(["run", str(tiny_recipe), "--quiet", "--set", "name=self", "--set", "loss=[{name: clipself}]",
          "--set", "fusion=null", "--set", "evaluate=null", "--set", "train.steps=30",
          "--set", "augment.text={name: caption}",
          "--set", "augment.image={name: grid_regions, size: 32, region_size: 16, regions: 3, split: 2}",
          "--set", f"backbone.image={{name: dense_vit, {vit}}}", "--set", "freeze=[backbone.text]",
          "--set", f"weights=[{{{load}, to: backbone}}]",
          "--set", f"teacher={{name: frozen, views: [region], backbone: {{image: {{name: vit, {vit}}}}}, "
                   f"weights: [{{{load}, to: backbone.image}}]}}"])  # fmt: skip
    import json

    rows = [json.loads(line) for line in Path("runs/self/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    first, last = (
        torch.load(next(Path(f"runs/{name}/checkpoints").glob("step-*.pt")), weights_only=True)["objective"]
        for name in ("tiny", "self")
    )
    text = [key for key in first if key.startswith("backbone.text.")]
    assert all(torch.equal(first[key], last[key]) for key in text)
    assert not torch.equal(first["backbone.image.proj"], last["backbone.image.proj"])
