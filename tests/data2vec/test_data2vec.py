"""data2vec 2.0: masks by their properties; targets, decoder and loss against a transcription, view by view."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from distill_core import (
    BackboneSpec,
    Features,
    Group,
    MaskPlan,
    ModalityPlan,
    Outputs,
    Plan,
    Progress,
    TeacherPlan,
    Views,
)
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_core.tools import example_batch
from distill_data2vec.loss import Data2Vec, Data2VecConfig
from distill_data2vec.masks import InverseBlocks, InverseBlocksConfig

GRID = (4, 5)


def plan(times: int = 3) -> Plan:
    """Two global views and a local one; each global one is seen `times` times."""
    spec = BackboneSpec(8, 6, can_drop=True, class_tokens=1, layers=4, stride=(2, 2))
    roles = ("global", "global", "local", *["repeated"] * (2 * (times - 1)))
    image = ModalityPlan(roles, spec, mask=MaskPlan("global", times, True, False))
    return Plan({"image": image}, {"default": TeacherPlan({"image": (0, 1)}, {"image": spec})})


def neighbours(keep: np.ndarray, columns: int) -> int:
    """Pairs of kept patches that stand side by side."""
    have = {divmod(int(i), columns) for i in keep}
    return sum(((r + 1, c) in have) + ((r, c + 1) in have) for r, c in have)


@pytest.mark.parametrize(("grid", "ratio", "count"), [((14, 14), 0.8, 39), ((6, 6), 0.8, 7), ((6, 9), 0.5, 27)])
def test_masks_keep_blocks_of_the_right_number(grid: tuple[int, int], ratio: float, count: int) -> None:
    """Catches blocks of what is dropped in place of what stays, a number that varies, and patches one by one; and
    masks that never come near an edge."""
    made, config = [], InverseBlocksConfig(ratio=ratio)
    masker = InverseBlocks(config, "image", plan())
    for seed in range(300):
        keep = masker.draw(grid, np.random.default_rng(seed)).keep
        assert keep is not None
        assert len(set(keep.tolist())) == count
        made.append(keep)
    rng, tokens = np.random.default_rng(0), grid[0] * grid[1]
    alone = [neighbours(rng.permutation(tokens)[:count], grid[1]) for _ in range(300)]
    assert np.mean([neighbours(keep, grid[1]) for keep in made]) > 1.3 * np.mean(alone)
    often = np.bincount(np.concatenate(made), minlength=tokens) / len(made)
    assert often.min() > 0.3 * count / tokens
    assert often.max() < 2.5 * count / tokens


def test_a_mask_of_a_single_block_is_that_block() -> None:
    """Without surplus: one square of 3 x 3 where it is not cut off, nine patches of 36."""
    masker = InverseBlocks(InverseBlocksConfig(ratio=0.75, adjust=0.0), "image", plan())
    squares = 0
    for seed in range(100):
        keep = masker.draw((6, 6), np.random.default_rng(seed)).keep
        assert keep is not None
        rows, columns = keep // 6, keep % 6
        squares += bool(np.ptp(rows) == 2 and np.ptp(columns) == 2)
    assert 25 < squares < 65, "16 of 36 centres are not at an edge"


def made(**options: Any) -> tuple[Data2Vec, Outputs]:
    torch.manual_seed(0)
    config = Data2VecConfig(**{"top": 3, "width": 8, "layers": 3, "groups": 2, **options})
    loss = Data2Vec(config, plan()).double()
    for parameter in loss.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    samples, kept, tokens = 2, 6, 20
    keep = torch.rand(6, samples, tokens).argsort(-1)[..., :kept].sort(-1).values
    x = torch.zeros(2, samples, 3, 8, 10)
    groups = [Group(x, keep=keep[:2]), Group(torch.zeros(1, samples, 3, 4, 4), "local")]
    groups += [Group(x, "repeated", keep=keep[2:4]), Group(x, "repeated", keep=keep[4:])]
    views = {s: torch.randn(samples, kept, 8).double().requires_grad_() for s in (0, 1, 3, 4, 5, 6)}
    classes = torch.randn(7, samples, 1, 8).double().requires_grad_()
    student = Features(torch.zeros(7, samples, 6), views, class_tokens=classes)
    layers = {layer: {t: 2 * torch.randn(samples, tokens, 8).double() + 1 for t in (0, 1)} for layer in (1, 2, 3)}
    teacher = Features(torch.zeros(2, samples, 6), {}, layers=layers)
    return loss, Outputs({"image": Views(groups)}, {"image": student}, {"default": {"image": teacher}})


def normalised(x: Tensor, dim: int) -> Tensor:
    return (x - x.mean(dim, keepdim=True)) / (x.var(dim, keepdim=True, unbiased=False) + 1e-5).sqrt()


def targets_by_hand(layers: list[Tensor]) -> Tensor:
    """[L, W] of one sample: each feature normalised over the tokens, the mean of the layers, each token normalised."""
    return normalised(torch.stack([normalised(layer, 0) for layer in layers]).mean(0), 1)


def decoder_by_hand(loss: Data2Vec, tokens: Tensor, keep: list[int]) -> Tensor:
    """[L, W] of one sample."""
    image = torch.zeros(20, 8, dtype=torch.float64)
    image = torch.stack([tokens[keep.index(i)] if i in keep else image[i] for i in range(20)])
    x = image.T.reshape(1, 8, *GRID)
    for layer in loss.decoder.layers:
        out = conv2d(x, layer.weight, layer.bias, padding=1, groups=2)  # type: ignore[arg-type]
        x = x + torch.nn.functional.gelu(normalised(out, 1))
    return loss.decoder.project(x[0].flatten(1).T)  # type: ignore[no-any-return]


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_loss_against_a_transcription(weight: float) -> None:
    """With gradients. Catches masks of another time or view, layers of another number, norms over the wrong axis or the
    batch, a decoder that sees what is dropped, tokens that are kept among the targets, and a missing 1 / sqrt(W)."""
    loss, outputs = made(class_weight=weight)
    terms, _ = loss(outputs)
    assert set(terms) == ({"tokens", "class"} if weight else {"tokens"})
    student, teacher = outputs.student["image"], outputs.teacher["default"]["image"]
    groups = outputs.views["image"].groups
    found: dict[str, list[Tensor]] = {"tokens": [], "class": []}
    for view in (0, 1):
        for time, (group, number) in enumerate(((groups[0], view), (groups[2], 3 + view), (groups[3], 5 + view))):
            assert plan().modalities["image"].shown(view)[time] == number
            for b in range(2):
                assert group.keep is not None
                keep = group.keep[view, b].tolist()
                aims = targets_by_hand([teacher.layers[layer][view][b] for layer in (1, 2, 3)])
                decoded = decoder_by_hand(loss, student.tokens[number][b], keep)
                others = [i for i in range(20) if i not in keep]
                squares = [((decoded[i] - aims[i]) ** 2).sum() / 8**0.5 for i in others]
                found["tokens"].append(torch.stack(squares).mean())
                assert student.class_tokens is not None
                aim = ((student.class_tokens[number, b, 0] - aims.mean(0)) ** 2).sum() / 8**0.5
                found["class"].append(weight * aim)
    inputs = [*student.tokens.values(), *loss.parameters()]
    for name, term in terms.items():
        expected = torch.stack(found[name]).mean()
        torch.testing.assert_close(term, expected, rtol=1e-9, atol=1e-12)
    total = torch.stack([torch.stack(found[name]).mean() for name in terms]).sum()
    ours = torch.autograd.grad(torch.stack([*terms.values()]).sum(), inputs)
    for one, other in zip(ours, torch.autograd.grad(total, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 3}, "groups: 3 do not divide the width 8 of the tower of 'image'"),
        ({"kernel": 4}, "kernel: 4 is even"),
        ({"width": 6, "groups": 4}, "groups: 4 do not divide the width 6 of the decoder"),
    ],
)
def test_decoders_that_do_not_fit_are_refused(options: dict[str, int], message: str) -> None:
    config = Data2VecConfig(**{"top": 3, "width": 8, "groups": 2, **options})  # type: ignore[arg-type]
    assert any(message in line for line in Data2Vec.problems(config, plan()))


def test_the_recipe_sees_each_picture_four_times(registry: Registry) -> None:
    """Catches a student that sees more than its fifth, and pictures that are repeated in the batch; nothing but tower
    and decoder trains."""
    recipe = load_recipe(Path(__file__).parents[2] / "recipes/data2vec_tiny.yaml", registry=registry)
    torch.manual_seed(0)
    objective = build_objective(recipe)
    batch = example_batch(recipe, 3)
    assert [tuple(group.x.shape) for group in batch.views["image"].groups] == [(1, 3, 3, 48, 48)]
    outputs = objective.represent(batch, Progress(0, 10))
    assert {view: tuple(x.shape) for view, x in outputs.student["image"].tokens.items()} == dict.fromkeys(
        range(4), (3, 7, 128)
    )
    teacher = outputs.teacher["default"]["image"]
    assert sorted(teacher.layers) == [0, 1, 2, 3]
    objective.losses(outputs).total.backward()
    untouched = {n for n, p in objective.named_parameters() if p.grad is None and not n.startswith("teacher.")}
    assert untouched == {"backbone.image.proj"}
