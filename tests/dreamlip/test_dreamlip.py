"""DreamLIP: its sub-captions, and its losses against loops; over ranks in tests/recipes/test_distributed_methods.py."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill_core.errors import RecipeErrors
from distill_core.outputs import Features, Outputs, Progress
from distill_core.plan import BackboneSpec, ModalityPlan, Plan
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_dreamlip.losses import MultiPositive, SubcaptionGrouping
from distill_dreamlip.views import SubCaptions

RECIPE = Path(__file__).parents[2] / "recipes/dreamlip_tiny.yaml"
BATCH, COUNT, PATCHES, WIDTH, DIM = 3, 4, 6, 7, 5


def plan() -> Plan:
    image = ModalityPlan(("global", "local"), BackboneSpec(WIDTH, DIM))
    return Plan({"image": image, "text": ModalityPlan(("global",) * COUNT, BackboneSpec(8, DIM))})


def outputs(mask: Tensor | None = None) -> Outputs:
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    image = Features(random(2, BATCH, DIM), {0: random(BATCH, PATCHES, WIDTH)}, {} if mask is None else {0: mask})
    return Outputs(student={"image": image, "text": Features(random(COUNT, BATCH, DIM))})


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum().sqrt()


def info_nce(queries: list[Tensor], keys: list[Tensor], scale: Tensor) -> Tensor:
    """Mean of -log exp(s q_i . k_i) / sum over j of exp(s q_i . k_j), and of the same with q and k exchanged."""
    total = torch.zeros((), dtype=torch.float64)
    for left, right in ((queries, keys), (keys, queries)):
        for i in range(len(left)):
            every = torch.stack([torch.exp(scale * (left[i] @ right[j])) for j in range(len(right))])
            total = total - torch.log(every[i] / every.sum())
    return total / (2 * len(queries))


def check(term: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(term, expected, rtol=1e-10, atol=1e-10)
    for got, true in zip(torch.autograd.grad(term, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-10, atol=1e-10)


def test_multi_positive() -> None:
    """Catches sub-captions of one sample that are negatives of each other here, and a second picture that enters."""
    loss, given = MultiPositive(MultiPositive.Config(temperature=0.3), plan()).double(), outputs()
    image, text = (given.student[m].pooled for m in ("image", "text"))
    scale = loss.logit_scale.exp()
    pictures = [unit(x) for x in image[0]]
    expected = torch.stack([info_nce(pictures, [unit(x) for x in view], scale) for view in text]).mean()
    terms, metrics = loss(given)
    check(terms["multi_positive"], expected, [image, text, loss.logit_scale])
    assert metrics["scale"].item() == pytest.approx(1 / 0.3)


def kept(patches: list[Tensor], text: Tensor, threshold: float | None) -> list[Tensor]:
    """Min-max-normalised similarities of one sub-caption, those below the threshold made 0."""
    similarities = [patch @ text for patch in patches]
    low, high = min(similarities), max(similarities)
    normalised = [(s - low) / (high - low) for s in similarities]
    limit = 1 / len(patches) if threshold is None else threshold
    return [s if s >= limit else s * 0 for s in normalised]


def grouped(patches: list[Tensor], text: Tensor, threshold: float | None) -> Tensor:
    """What is kept, as weights of patches."""
    weights = kept(patches, text, threshold)
    total = torch.stack(weights).sum()
    return unit(torch.stack([w / total * patch for w, patch in zip(weights, patches, strict=True)]).sum(0))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("negatives", ["batch", "sample"])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.6])
def test_grouping(threshold: float | None, negatives: str, padded: bool) -> None:
    """Catches a softmax in min-max's place, a threshold on raw cosines, weights that do not sum to 1, patches that are
    not unit vectors, sub-captions paired with another sample's patches, and padding that counts."""
    mask = None
    if padded:
        mask = torch.ones(BATCH, PATCHES, dtype=torch.bool)
        mask[1, 4:] = False
    config = SubcaptionGrouping.Config(temperature=0.3, threshold=threshold, negatives=negatives)
    loss, given = SubcaptionGrouping(config, plan()).double(), outputs(mask)
    tokens, text = given.student["image"].tokens[0], given.student["text"].pooled
    samples, counted = [], 0
    for i in range(BATCH):
        real = tokens[i] if mask is None else tokens[i][mask[i]]
        patches = [unit(loss.token_map.weight @ token) for token in real]
        texts = [unit(text[k, i]) for k in range(COUNT)]
        counted += sum(int(w > 0) for one in texts for w in kept(patches, one, threshold))
        samples.append(([grouped(patches, one, threshold) for one in texts], texts))
    scale = loss.logit_scale.exp()
    if negatives == "sample":
        expected = torch.stack([info_nce(*sample, scale) for sample in samples]).mean()
    else:
        expected = info_nce(*([x for sample in samples for x in sample[side]] for side in (0, 1)), scale)
    terms, metrics = loss(given)
    check(terms["subcaption_grouping"], expected, [tokens, text, loss.logit_scale, loss.token_map.weight])
    assert metrics["patches"].item() == pytest.approx(counted / (BATCH * COUNT * PATCHES))


@pytest.mark.parametrize("patches", [1, 4])
def test_equal_patches_count_alike(patches: int) -> None:
    """Catches 0 / 0 in the min-max normalisation, in the value or in the gradient."""
    loss, given = SubcaptionGrouping(SubcaptionGrouping.Config(), plan()).double(), outputs()
    token = given.student["image"].tokens[0][:, :1].detach().requires_grad_()
    values = []
    for count in (1, patches):
        given.student["image"].tokens[0] = token.expand(-1, count, -1)
        term = loss(given)[0]["subcaption_grouping"]
        values.append(term)
        for gradient in torch.autograd.grad(term, [token, loss.token_map.weight]):
            assert gradient.isfinite().all()
    torch.testing.assert_close(values[0], values[1], rtol=1e-10, atol=1e-10)


def test_scales_are_clamped() -> None:
    loss = MultiPositive(MultiPositive.Config(), plan())
    loss.logit_scale.data.fill_(9.0)
    loss.after_step(outputs(), Progress(0, 1))
    assert loss.logit_scale.item() == pytest.approx(math.log(100))


def test_sub_captions() -> None:
    """Catches sentences drawn twice while others are left, joined sentences, and a number that is not K."""
    pool = [f"sentence {i}" for i in range(6)]
    sample = {"__key__": "k", "json": json.dumps({"captions": pool}).encode()}
    augment = SubCaptions(SubCaptions.Config(count=4))
    seen = set()
    for seed in range(30):
        views = augment.train_views(sample, np.random.default_rng(seed))
        assert tuple(view.role for view in views) == SubCaptions.roles(augment.config) == ("global",) * 4
        texts = tuple(view.data for view in views)
        assert set(texts) <= set(pool)
        assert len(set(texts)) == 4
        seen.add(texts)
    assert len(seen) > 20
    few = {"__key__": "k", "json": json.dumps({"captions": pool[:3]}).encode()}
    assert {view.data for view in augment.train_views(few, np.random.default_rng(0))} == set(pool[:3])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backbone.text.dim=64"], "'multi_positive' compares embeddings of one width D; the backbones give image 128"),
        (["loss.1.modalities=[image, txt]"], "'subcaption_grouping' needs a modality 'txt', did you mean 'text'?"),
        (
            ["augment.text.count=1", "loss.1.negatives=sample"],
            "'subcaption_grouping' with negatives: sample needs 2 views of 'text'; it has 1",
        ),
        (["loss.1.threshold=2.0"], "must be at most 1, got 2.0"),
    ],
)
def test_what_cannot_work_is_refused(registry: Registry, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(RECIPE, registry=registry, overrides=overrides)
    lines: list[Any] = caught.value.lines
    assert [message in line for line in lines] == [True]


def test_the_recipe_resolves(registry: Registry) -> None:
    recipe = load_recipe(RECIPE, registry=registry)
    assert [node.cls for node in recipe.loss] == [MultiPositive, SubcaptionGrouping]
    assert recipe.plan.modalities["text"].roles == ("global",) * 4


def test_what_is_always_there_is_whole_first_and_not_drawn_again() -> None:
    """The public code: the raw caption, then sentences of the other fields. Catches sentences of the raw caption that
    are drawn as well, also under the name of their group, and one that another field holds too."""
    document = {
        "raw_caption": "A gull. By the sea.",
        "shortSV_captions": "a bird",
        "longSV_captions": "A bird flies. A gull. By the sea. It cries. The sea is grey.",
    }
    sample = {"json": json.dumps(document).encode()}
    for names in (("raw",), ("raw_caption",)):
        augment = SubCaptions(SubCaptions.Config(count=4, always=names))
        drawn = [[view.data for view in augment.train_views(sample, np.random.default_rng(i))] for i in range(60)]
        assert {texts[0] for texts in drawn} == {"A gull. By the sea"}
        others = {"a bird", "A bird flies", "A gull", "By the sea", "It cries", "The sea is grey"}
        assert {text for texts in drawn for text in texts[1:]} == others, "of the other fields, each text"
        assert all(len(set(texts)) == 4 for texts in drawn)
    one = {"json": json.dumps(document | {"raw_caption": "It cries"}).encode()}
    augment = SubCaptions(SubCaptions.Config(count=3, always=("raw",)))
    drawn = [[view.data for view in augment.train_views(one, np.random.default_rng(i))] for i in range(40)]
    assert all(texts[0] == "It cries" and "It cries" not in texts[1:] for texts in drawn)


@pytest.mark.parametrize(
    ("document", "expected"), [({"raw_caption": "A gull"}, {"A gull"}), ({"longSV_captions": "a"}, {"a"})]
)
def test_a_sample_with_the_raw_caption_alone_or_without_one(document: dict[str, str], expected: set[str]) -> None:
    """K texts all the same, of what there is."""
    augment = SubCaptions(SubCaptions.Config(count=3, always=("raw",)))
    views = augment.train_views({"json": json.dumps(document).encode()}, np.random.default_rng(0))
    assert len(views) == 3
    assert {view.data for view in views} == expected
