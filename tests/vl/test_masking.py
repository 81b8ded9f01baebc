"""Masks are the seeds' alone and hide only from the student; more class tokens change nothing else."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from distill_core.batch import Batch, Group, View, Views
from distill_core.data.batches import Item
from distill_core.data.loader import Collate
from distill_core.errors import RecipeErrors
from distill_core.outputs import Progress
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import parse_recipe
from distill_core.registry import Registry
from distill_vl.masking import MaskingConfig, blocks, draw_mask, patch_pixels
from distill_vl.vit import PictureCollator, VisionTransformer, VisionTransformerConfig

MASKING = MaskingConfig(ratio=(0.2, 0.6), share=0.7)


def samples(count: int, seed: int = 0) -> list[list[View]]:
    generator = torch.Generator().manual_seed(seed)

    def view(side: int, role: str) -> View:
        return View(torch.randn(3, side, side, generator=generator), role)

    return [[view(24, "global"), view(24, "global"), view(8, "local")] for _ in range(count)]


def vit(**options: object) -> VisionTransformer:
    torch.manual_seed(0)
    config = {"image_size": 24, "patch": 4, "width": 24, "layers": 3, "heads": 3, "dim": 10, **options}
    return VisionTransformer(VisionTransformerConfig(**config)).double()  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [True, False])
def test_masks_are_a_function_of_the_samples_seed(block: bool) -> None:
    """Catches a mask that depends on the batch's other samples, their order, the global generators, or the call."""
    masking = MASKING.model_copy(update={"block": block})
    collate = pickle.loads(pickle.dumps(PictureCollator(4, masking)))
    made = samples(16)
    seeds = list(range(50, 66))
    first = collate(made, seeds).groups
    torch.manual_seed(99)
    np.random.seed(99)
    order = list(range(15, -1, -2))
    again = collate([made[i] for i in order], [seeds[i] for i in order]).groups
    assert first[0].token_mask is not None
    assert first[0].token_mask.shape == (2, 16, 36)
    assert first[0].token_mask.dtype == torch.bool
    assert torch.equal(again[0].token_mask, first[0].token_mask[:, order])
    assert len({tuple(row.tolist()) for row in first[0].token_mask.flatten(0, 1)}) > 10, "views and samples differ"
    assert first[1].token_mask is None, "only the roles that are named"
    other = collate(made, [seed + 1000 for seed in seeds]).groups[0].token_mask
    assert not torch.equal(other, first[0].token_mask)
    with pytest.raises(ValueError, match="no seeds were given"):
        collate(made)


def test_no_masking_gives_no_masks() -> None:
    groups = PictureCollator(4)(samples(2), [1, 2]).groups
    assert [group.token_mask for group in groups] == [None, None]
    assert [group.targets for group in groups] == [None, None]


@pytest.mark.parametrize("block", [True, False])
def test_how_much_is_hidden(block: bool) -> None:
    """Catches a ratio taken as a fixed number, a share that counts patches, and blocks that overshoot."""
    config = MaskingConfig(ratio=(0.1, 0.5), share=0.5, block=block)
    rng = np.random.default_rng(5)
    counts = np.array([int(draw_mask(14, 14, config, rng).sum()) for _ in range(600)])
    masked = counts[counts > 0]
    assert abs(len(masked) / 600 - 0.5) < 0.07
    assert masked.max() <= round(0.5 * 196)
    assert masked.std() > 10
    mean = masked.mean() / 196
    assert 0.24 < mean < 0.36
    if not block:
        assert masked.min() >= round(0.1 * 196)
    whole = MaskingConfig(ratio=(0.0, 0.0), share=1.0, block=block)
    assert not draw_mask(6, 6, whole, rng).any()
    few = MaskingConfig(ratio=(0.01, 0.01), share=1.0, block=False)
    assert draw_mask(6, 6, few, rng).sum() == 1, "a masked view hides one patch at least"


def test_blocks_are_blocks() -> None:
    """Catches patches drawn one by one: in blocks a hidden patch has far more hidden neighbours."""

    def neighbours(hidden: np.ndarray) -> float:
        pairs = (hidden[1:] & hidden[:-1]).sum() + (hidden[:, 1:] & hidden[:, :-1]).sum()
        return pairs / hidden.sum()

    rng = np.random.default_rng(0)
    made = [blocks(14, 14, 60, rng) for _ in range(50)]
    spread = [rng.permutation(196).reshape(14, 14) < hidden.sum() for hidden in made]
    assert np.mean([neighbours(x) for x in made]) > 2 * np.mean([neighbours(x) for x in spread])
    assert max(hidden.sum() for hidden in made) <= 60
    assert np.mean([hidden.sum() for hidden in made]) > 50


def test_pixel_targets_are_each_patchs_normalised_pixels() -> None:
    """Against loops, in the order in which the patch embedding reads a patch."""
    masking = MASKING.model_copy(update={"targets": "pixels"})
    made = samples(3)
    tower = VisionTransformer(
        VisionTransformerConfig(image_size=24, patch=4, width=8, layers=1, heads=1, masking=masking)
    )
    groups = tower.on_device(PictureCollator(4, masking)(made, [1, 2, 3])).groups
    assert groups[1].targets is None
    targets = groups[0].targets
    assert targets is not None
    assert targets.shape == (2, 3, 36, 48)
    for v in range(2):
        for b in range(3):
            for i in range(6):
                for j in range(6):
                    patch = made[b][v].data[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].double().flatten()
                    expected = (patch - patch.mean()) / (patch.var(unbiased=True) + 1e-6).sqrt()
                    torch.testing.assert_close(targets[v, b, 6 * i + j].double(), expected, rtol=1e-5, atol=1e-5)
    assert patch_pixels(torch.ones(1, 3, 8, 8), 4).abs().max() == 0, "a plain patch divides by no zero"


def test_a_hidden_patch_is_the_mask_token_at_its_place() -> None:
    """Catches hidden pixels that leak, positions that are lost with the patch, and masks of another orientation."""
    tower = vit(masking=MASKING)
    with torch.no_grad():
        tower.mask_token.normal_()
    x = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    mask = torch.zeros(2, 36, dtype=torch.bool)
    mask[0, 8] = mask[0, 31] = mask[1, 0] = True  # patches (1, 2), (5, 1); (0, 0)
    for tokens in (True, False):
        hidden = tower.encode(x, tokens=tokens, token_mask=mask)
        changed = x.clone()
        changed[0, :, 4:8, 8:12] = 7.0
        changed[0, :, 20:24, 4:8] = -3.0
        changed[1, :, :4, :4] = 5.0
        torch.testing.assert_close(tower.encode(changed, tokens=tokens, token_mask=mask).pooled, hidden.pooled)
        assert (tower.encode(x, tokens=tokens, token_mask=None).pooled - hidden.pooled).abs().max() > 1e-4
        changed[0, :, 8:12, 4:8] = 7.0  # patch (2, 1) is seen
        assert (tower.encode(changed, tokens=tokens, token_mask=mask).pooled - hidden.pooled).abs().max() > 1e-6
    # a picture whose patch embeds to the mask token says the same as one whose patch is hidden
    weight = tower.conv1.weight.flatten(1)
    pixels = torch.linalg.lstsq(weight.detach(), tower.mask_token.detach()[:, None]).solution[:, 0].reshape(3, 4, 4)
    drawn = x.clone()
    drawn[0, :, 4:8, 8:12] = drawn[0, :, 20:24, 4:8] = drawn[1, :, :4, :4] = pixels
    expected = tower.encode(drawn, tokens=True, token_mask=None)
    hidden = tower.encode(x, tokens=True, token_mask=mask)
    torch.testing.assert_close(hidden.tokens, expected.tokens, rtol=1e-8, atol=1e-8)


def test_both_paths_agree_with_masks_and_class_tokens() -> None:
    """The last block at the class tokens alone must equal the whole block, in values and in gradients."""
    tower = vit(masking=MASKING, class_tokens=3)
    x = torch.randn(4, 3, 24, 24, dtype=torch.float64)
    mask = torch.rand(4, 36) < 0.4
    weight = torch.randn(4, 3, 24, dtype=torch.float64)
    results = []
    for tokens in (True, False):
        tower.zero_grad()
        features = tower.encode(x, tokens=tokens, token_mask=mask)
        assert features.class_tokens is not None
        assert features.class_tokens.shape == (4, 3, 24)
        torch.testing.assert_close(features.pooled, features.class_tokens[:, 0] @ tower.proj)
        ((features.class_tokens * weight).sum() + features.pooled.square().sum()).backward()
        results.append((features, {n: p.grad.clone() for n, p in tower.named_parameters() if p.grad is not None}))
    assert results[0][0].tokens.shape == (4, 36, 24)
    assert results[1][0].tokens is None
    torch.testing.assert_close(results[0][0].class_tokens, results[1][0].class_tokens, rtol=1e-10, atol=1e-12)
    assert set(results[0][1]) == set(results[1][1]) == {name for name, _ in tower.named_parameters()}
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-9, atol=1e-10)


def test_class_tokens_differ_and_have_no_position() -> None:
    tower = vit(class_tokens=2)
    x = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    both = tower.encode(x, tokens=False, token_mask=None).class_tokens
    assert both is not None
    assert (both[:, 0] - both[:, 1]).abs().max() > 0.1
    # tokens that start alike end alike: the first has a position, the second none
    with torch.no_grad():
        tower.more_class_embeddings[0] = tower.class_embedding + tower.positional_embedding[0]
    same = tower.encode(x, tokens=False, token_mask=None).class_tokens
    assert same is not None
    torch.testing.assert_close(same[:, 0], same[:, 1], rtol=1e-10, atol=1e-12)


def test_the_parameters_of_a_plain_vit_are_what_they_were() -> None:
    """Checkpoints of before must fit: the new parameters are there only where the options ask for them."""
    plain = set(dict(vit().named_parameters()))
    assert plain == {name for name in plain if "mask_token" not in name and "more_class" not in name}
    assert set(dict(vit(masking=MASKING).named_parameters())) - plain == {"mask_token"}
    assert set(dict(vit(class_tokens=2).named_parameters())) - plain == {"more_class_embeddings"}
    with pytest.raises(ValueError, match="only with the option `masking`"):
        vit().encode(torch.zeros(1, 3, 24, 24).double(), tokens=False, token_mask=torch.ones(1, 36, dtype=torch.bool))


RECIPE = """
augment: {image: {name: multi_crop, size: 16, local_size: 8, global: 2, local: 1}, text: {name: text_crop, global: 1}}
backbone:
  image: {name: vit, image_size: 16, patch: 4, width: 8, layers: 1, heads: 2, dim: 6, masking: {share: 1.0}}
  text: {name: clip_text, context: 9, width: 8, layers: 1, heads: 2, dim: 6}
loss: [{name: clip}]
teacher: {}
data: {source: {name: webdataset, urls: none.tar}}
train: {steps: 1}
"""


def test_the_student_is_masked_and_the_teacher_is_not(registry: Registry) -> None:
    recipe = parse_recipe(RECIPE, "r.yaml", registry=registry)
    assert recipe.plan.modalities["image"].spec.can_mask
    assert not recipe.plan.modalities["text"].spec.can_mask
    objective = build_objective(recipe).double()
    with torch.no_grad():
        objective.backbone["image"].mask_token.normal_()
    x = torch.randn(2, 3, 3, 16, 16, dtype=torch.float64)
    mask = torch.zeros(2, 3, 16, dtype=torch.bool)
    mask[:, :, 5] = True
    changed = x.clone()
    changed[..., 4:8, 4:8] += 1.0
    ids = torch.full((1, 3, 5), 49407)
    found = []
    for pixels in (x, changed):
        views = {"image": Views([Group(pixels, token_mask=mask)]), "text": Views([Group(ids)])}
        found.append(objective.represent(Batch(views, ["a", "b", "c"]), Progress(0, 1)))
    torch.testing.assert_close(found[0].student["image"].pooled, found[1].student["image"].pooled)
    assert (
        found[0].teacher["default"]["image"].pooled - found[1].teacher["default"]["image"].pooled
    ).abs().max() > 1e-4


def test_the_loaders_collate_gives_the_same_masks_again(registry: Registry) -> None:
    """As a resumed run's loader does: from pickled collators, items that stand in another batch."""
    recipe = parse_recipe(RECIPE, "r.yaml", registry=registry)
    node = recipe.backbone["image"]
    collate = Collate({"image": node.cls.collator(node.config)})
    made = [[view for view in sample if view.role == "global"] for sample in samples(6)]
    items = [Item(f"k{i}", {"image": views}, 7919 * i) for i, views in enumerate(made)]
    whole = collate(items)
    part = pickle.loads(pickle.dumps(copy.deepcopy(collate)))(items[4:])
    assert isinstance(whole, Batch)
    assert isinstance(part, Batch)
    masks = whole.views["image"].groups[0].token_mask
    assert masks is not None
    assert masks.any(-1).all(), "share 1: every view is masked"
    assert torch.equal(part.views["image"].groups[0].token_mask, masks[:, 4:])


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("{ratio: [0.6, 0.5]}", r"backbone.image.masking: ratio \[0.6, 0.5\] does not go from low to high"),
        ("{roles: [globl]}", "masking.roles: no view has the role 'globl', did you mean 'global'?"),
        ("{roles: [local]}", "backbone.image: masking.roles: no view has the role 'local', did you mean 'global'?"),
        ("{shape: block}", "backbone.image.masking.shape: unknown option 'shape'"),
    ],
)
def test_wrong_masking_is_named(registry: Registry, given: str, line: str) -> None:
    # the texts have local views, the pictures none
    recipe = RECIPE.replace("local_size: 8, global: 2, local: 1", "global: 2, local: 0").replace(
        "global: 1", "global: 1, local: 1"
    )
    with pytest.raises(RecipeErrors, match=line):
        parse_recipe(recipe.replace("{share: 1.0}", given), "r.yaml", registry=registry)
