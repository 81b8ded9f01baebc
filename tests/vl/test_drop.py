"""Patches that the student never sees: drawn by a masker, dropped before the first block."""

from __future__ import annotations

import copy
import pickle
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from distill_core import (
    Backbone,
    BackboneSpec,
    Batch,
    Collator,
    Encoded,
    Group,
    ModalityPlan,
    Plan,
    Progress,
    View,
    Views,
    stable_hash,
)
from distill_core.errors import RecipeErrors
from distill_core.gradient_cache import GradientCache
from distill_core.presence import Present
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import parse_recipe
from distill_core.registry import Registry
from distill_vl.maskers import RandomDrop, RandomDropConfig
from distill_vl.vit import PictureCollator, VisionTransformer, VisionTransformerConfig

SMALL = {"image_size": 24, "patch": 4, "width": 24, "layers": 3, "heads": 3, "dim": 10}


def samples(count: int) -> list[list[View]]:
    def view(side: int, role: str) -> View:
        return View(torch.randn(3, side, side), role)

    return [[view(24, "global"), view(24, "global"), view(8, "local")] for _ in range(count)]


def vit(**options: object) -> VisionTransformer:
    torch.manual_seed(0)
    tower = VisionTransformer(VisionTransformerConfig(**SMALL, **options)).double()  # type: ignore[arg-type]
    for parameter in tower.parameters():  # biases are 0 at first, and a lost one would not be seen
        torch.nn.init.normal_(parameter, std=0.3)
    return tower


def drop(share: float, role: str = "global") -> RandomDrop:
    spec = VisionTransformer.spec(VisionTransformerConfig(**SMALL))  # type: ignore[arg-type]
    plan = Plan({"image": ModalityPlan(("global", "global", "local"), spec)})
    return RandomDrop(RandomDropConfig(share=share, role=role), "image", plan)


def dropped(share: float, made: list[list[View]], seeds: list[int]) -> Views:
    return drop(share, "local").drawn(drop(share).drawn(PictureCollator(4)(made), seeds), seeds)


def test_what_is_kept_is_a_function_of_the_samples_seed() -> None:
    """Catches a draw that depends on the batch's other samples, their order, or the call; patches kept twice; views of
    a sample that keep the same; and a share that is not of the crop's own patches."""
    made, seeds = samples(6), list(range(50, 56))
    first = dropped(0.75, made, seeds).groups
    order = [5, 3, 0]
    again = dropped(0.75, [made[i] for i in order], [seeds[i] for i in order]).groups
    for group, count, total in zip(first, (9, 1), (36, 4), strict=True):
        assert group.keep is not None
        assert group.keep.shape == (*group.x.shape[:2], count)
        assert int(group.keep.min()) >= 0
        assert int(group.keep.max()) < total
        assert bool((group.keep.diff(dim=-1) > 0).all()), "ascending, each once"
    keep = cast(Tensor, first[0].keep)
    assert torch.equal(cast(Tensor, again[0].keep), keep[:, order])
    assert len({tuple(row.tolist()) for row in keep.flatten(0, 1)}) == 12
    alone = pickle.loads(pickle.dumps(drop(0.75))).draw(
        (6, 6), np.random.default_rng(stable_hash(53, "masker", "image"))
    )
    assert alone.keep.tolist() == keep[0, 3].tolist()


def doubled(views: Views) -> Views:
    return Views([Group(group.x.double(), group.role, keep=group.keep) for group in views.groups])


def test_keeping_all_is_dropping_none() -> None:
    """Bit for bit, of packed crops of two sizes; gradients to rounding."""
    torch.manual_seed(1)
    x = [torch.randn(2, 3, 3, 24, 24).double(), torch.randn(1, 3, 3, 8, 8).double()]
    every = [torch.arange(n).expand(*group.shape[:2], n) for n, group in zip((36, 4), x, strict=True)]
    found = []
    for keep in ([None, None], every):
        tower = vit(class_tokens=2)
        views = Views([Group(group, keep=kept) for group, kept in zip(x, keep, strict=True)])
        features = tower(views, tokens_of=(0, 2), masked=True, layers_of={1: (0,)})
        (features.pooled.sum() + sum(tokens.sin().sum() for tokens in features.tokens.values())).backward()
        found.append((features, [p.grad for p in tower.parameters()]))
    (plain, of_plain), (kept, of_kept) = found
    assert torch.equal(plain.pooled, kept.pooled)
    assert torch.equal(plain.class_tokens, kept.class_tokens)
    assert all(torch.equal(plain.tokens[view], kept.tokens[view]) for view in (0, 2))
    assert torch.equal(plain.layers[1][0], kept.layers[1][0])
    for one, other in zip(of_plain, of_kept, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def by_hand(tower: Any, crop: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """FLIP's encoder of one crop [3, S, S], in functions of torch: all patches with their positions, then those kept.
    Returns the embedding and the tokens."""
    config = tower.config
    patches = tower.conv1(crop[None]).flatten(2)[0].T + tower.positional_embedding[1:]
    classes = [tower.class_embedding + tower.positional_embedding[0], *tower.more_class_embeddings]
    x = torch.stack([*classes, *(patches[int(i)] for i in keep)])

    def norm(module: Any, value: Tensor) -> Tensor:
        return layer_norm(value, (config.width,), module.weight, module.bias, config.norm_eps)

    x = norm(tower.ln_pre, x)
    for block in tower.transformer.resblocks:
        qkv = norm(block.ln_1, x) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
        q, k, v = (part.unflatten(1, (config.heads, -1)).transpose(0, 1) for part in qkv.chunk(3, 1))
        x = x + block.attn.out_proj(scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))
        x = x + block.mlp(norm(block.ln_2, x))
    x = norm(tower.ln_post, x)
    return x[0] @ tower.proj, x[config.class_tokens :]


@pytest.mark.parametrize("tokens_of", [(), (1,)])
def test_kept_patches_against_a_transcription(tokens_of: tuple[int, ...]) -> None:
    """Catches positions of other patches, a dropped class token, and patches of another sample. Two crops of other
    sizes are in the pass."""
    tower = vit(class_tokens=2)
    views = doubled(dropped(0.6, samples(3), [4, 5, 6]))
    features = tower(views, tokens_of=tokens_of, masked=True)
    group = views.groups[0]
    assert group.keep is not None
    for view in range(2):
        for i in range(3):
            pooled, tokens = by_hand(tower, group.x[view, i], group.keep[view, i])
            torch.testing.assert_close(features.pooled[view, i], pooled, rtol=1e-9, atol=1e-10)
            if view in tokens_of:
                torch.testing.assert_close(features.tokens[view][i], tokens, rtol=1e-9, atol=1e-10)


def test_only_the_student_drops() -> None:
    """What a teacher and evaluation call: every patch is seen."""
    tower = vit()
    views = doubled(dropped(0.5, samples(2), [4, 5]))
    whole = tower(Views([Group(group.x, group.role) for group in views.groups]))
    assert torch.equal(tower(views).pooled, whole.pooled)
    assert not torch.allclose(tower(views, masked=True).pooled, whole.pooled)


def test_keep_goes_with_its_samples() -> None:
    """Parts of a batch, rows of those that have the modality, copies on other devices."""
    group = Group(torch.randn(2, 5, 3, 4, 4), keep=torch.randint(9, (2, 5, 3)))
    assert torch.equal(cast(Tensor, group.part(1, 3).keep), group.keep[:, 1:3])  # type: ignore[index]
    present = Present(np.array([[True, False, True, True, False]]))
    assert torch.equal(cast(Tensor, group.rows(present, None).keep), group.keep[:, [0, 2, 3]])  # type: ignore[index]
    moved = Batch({"image": Views([group])}, list("abcde")).to("meta").views["image"].groups[0]
    assert moved.keep is not None
    assert moved.keep.device.type == "meta"


class Deaf(Backbone):
    """A tower that does not drop."""

    name = "deaf"

    @classmethod
    def spec(cls, config: Any) -> BackboneSpec:
        return BackboneSpec(2, 2)

    @classmethod
    def collator(cls, config: Any) -> Collator:
        raise NotImplementedError

    def encode(self, x: Tensor, *, tokens: bool, token_mask: Tensor | None) -> Encoded:
        return Encoded(x.mean(1), x if tokens else None)


def test_a_tower_that_cannot_drop_says_so() -> None:
    """It would see all tokens, and nobody would know."""
    views = Views([Group(torch.randn(1, 2, 3, 2), keep=torch.zeros(1, 2, 1, dtype=torch.long))])
    assert Deaf(None)(views).pooled.shape == (1, 2, 2)
    with pytest.raises(ValueError, match="deaf cannot drop tokens"):
        Deaf(None)(views, masked=True)


RECIPE = """
augment:
  image: {name: random_crop, size: 16}
  text: {name: caption}
backbone:
  image: {name: vit, image_size: 16, patch: 4, width: 32, layers: 2, heads: 2, dim: 16, MASKING}
  text: {name: clip_text, width: 32, layers: 1, heads: 2, dim: 16}
masker: {image: {name: random_drop}}
loss: [{name: clip}]
data: {source: {name: webdataset, urls: none.tar}}
train: {steps: 4}
"""


def test_drop_and_masking_exclude_each_other(registry: Registry) -> None:
    """A loss would look for hidden patches by numbers among all, in tokens that are only some."""
    with pytest.raises(RecipeErrors, match=r"masking.roles: global views have a masker"):
        parse_recipe(RECIPE.replace("MASKING", "masking: {}"), "r.yaml", registry=registry)


def test_flip_a_few_samples_at_a_time(registry: Registry) -> None:
    """The recipe's step with a masker: gradients by parts of the batch are those of the whole, so each part has its own
    samples' kept patches."""
    recipe = parse_recipe(RECIPE.replace("MASKING", "masking: null"), "r.yaml", registry=registry)
    torch.manual_seed(0)
    whole = build_objective(recipe).double()
    parts = copy.deepcopy(whole)
    collate = {name: node.cls.collator(node.config) for name, node in recipe.backbone.items()}
    pictures = [[View(torch.randn(3, 16, 16, dtype=torch.float64))] for _ in range(5)]
    texts = [[View(f"drawing number {i}")] for i in range(5)]
    views = {"image": collate["image"](pictures, range(5)), "text": collate["text"](texts, range(5))}
    views["image"] = recipe.maskers()["image"].drawn(views["image"], range(5))
    assert cast(Tensor, views["image"].groups[0].keep).shape == (1, 5, 8)
    batch, progress = Batch(views, list("abcde")), Progress(0, 4)
    whole.losses(whole.represent(batch, progress)).total.backward()
    cache = GradientCache(parts, batch, progress, 2)
    parts.losses(cache.outputs).total.backward()
    cache.backward()
    for one, other in zip(whole.backbone.parameters(), parts.backbone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-10)
