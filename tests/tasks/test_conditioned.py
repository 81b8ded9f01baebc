"""Conditioned retrieval: every pair by the definition, chunks, several ranks, and what cannot score it."""

from __future__ import annotations

import pytest
import torch
from conditioned import scored, task, trained
from score_values import values
from torch import Tensor
from torch.nn.functional import cosine_similarity

from distill_authoring.conformance.ranks import on_two_ranks
from distill_core import DataError, EvaluationSet, Model, Sample, UserError
from distill_core.errors import RecipeErrors
from distill_core.recipe.resolve import parse_recipe
from distill_core.registry import Registry


def by_definition(model: Model, samples: list[Sample]) -> tuple[Tensor, list[int]]:
    """Similarities [N, M], one image and one text at a time, and whose each text is."""
    texts, owners = [], []
    for i, sample in enumerate(samples):
        for text in model.augment["text"].decode(sample):
            view = model.augment["text"].eval_view(text)
            texts.append(model.features("text", [[view]]).pooled[0, 0])
            owners.append(i)
    matrix = torch.empty(len(samples), len(texts))
    for i, sample in enumerate(samples):
        (picture,) = model.augment["image"].decode(sample)
        tokens = model.features("image", [[model.augment["image"].eval_view(picture)]], tokens_of=(0,)).tokens[0]
        for j, text in enumerate(texts):
            with torch.no_grad():
                pooled = model.fusion.pool("image", text[None, None], tokens)[0, 0]
            matrix[i, j] = cosine_similarity(pooled, text, dim=0)
    return matrix, owners


def recalls(matrix: Tensor, owners: list[int], k: int) -> tuple[float, float]:
    """(image to text, text to image) R@k, by sorting."""
    found = [any(owners[j] == i for j in row.argsort(descending=True)[:k]) for i, row in enumerate(matrix)]
    found_images = [owners[j] in column.argsort(descending=True)[:k] for j, column in enumerate(matrix.T)]
    return 100 * sum(found) / len(found), 100 * sum(found_images) / len(found_images)


@pytest.mark.parametrize("pairs", [1, 3, 9, 8192])
def test_every_pair_by_the_definition(pairs: int) -> None:
    """Catches a text that is paired with another's pooling, queries that were normalised before they pool (the fusion
    reads their length), a chunk that is lost, and images of other batches."""
    model, samples = trained()
    model.batch_size = 3
    matrix, owners = by_definition(model, samples)
    made = task(pairs=pairs)
    compared = made.compared(model, EvaluationSet("s", samples))
    assert compared.owners["text"].tolist() == owners
    torch.testing.assert_close(compared.rows("image", slice(0, 9)), matrix)
    torch.testing.assert_close(compared.rows("text", slice(2, 5)), matrix.T[2:5])
    scores = values(made.run(model, [EvaluationSet("s", samples)]))
    for k in (1, 5):
        assert (scores[f"s/image_to_text/R@{k}"], scores[f"s/text_to_image/R@{k}"]) == recalls(matrix, owners, k)
    plain = (
        model.encode("image", [model.augment["image"].decode(s)[0] for s in samples])
        @ model.encode("text", [t for s in samples for t in model.augment["text"].decode(s)]).T
    )
    assert not torch.equal(plain.argsort(1), matrix.argsort(1)), "the towers' own embeddings order the texts alike"


def test_items_without_a_counterpart_are_left_out() -> None:
    """An image without a text that can be read, and a text whose image cannot: both are listed as skipped."""
    model, samples = trained()
    samples[1]["json"], samples[2]["png"] = b"{", b"no picture"
    made = EvaluationSet("s", samples)
    compared = task().compared(model, made)
    assert compared.owners["image"].tolist() == [0, 3]
    assert compared.owners["text"].tolist() == [0, 0, 3, 3]
    assert compared.rows("image", slice(0, 9)).shape == (2, 4)
    assert {key for key, _ in made.skipped} == {"noise-1", "noise-2"}
    for sample in samples:
        sample["json"] = b"{"
    with pytest.raises(DataError, match="no sample with both image and text"):
        task().run(model, [EvaluationSet("s", samples)])


@pytest.mark.slow
def test_two_ranks_score_as_one() -> None:
    """Each pools its share of the images with the texts of both."""
    alone = scored(5)
    for scores in on_two_ranks(scored, [(5,), (5,)]):
        assert scores == pytest.approx(alone)


RECIPE = """
augment: {image: {name: multi_crop, size: 16, local: 0}, text: {name: caption}}
backbone:
  image: {name: vit, image_size: 16, patch: 4, width: 24, layers: 1, heads: 3, dim: 12}
  text: {name: clip_text, width: 16, layers: 1, heads: 2, dim: 12}
fusion: {name: text_conditioned_pool, queries: [text], heads: 2}
loss: [{name: flair}]
data: {source: {name: emoji}}
train: {steps: 1}
evaluate: {tasks: [{name: conditioned_retrieval}]}
"""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fusion=null", "loss=[{name: clip}]"], "pools with the fusion, and there is none"),
        (["fusion={name: multimodal_encoder, heads: 2}", "loss=[{name: clip}]"], "this recipe's has no `pool`"),
    ],
)
def test_a_recipe_that_cannot_pool_is_refused(registry: Registry, overrides: list[str], message: str) -> None:
    parse_recipe(RECIPE, "r.yaml", registry=registry)
    with pytest.raises(RecipeErrors, match=message):
        parse_recipe(RECIPE, "r.yaml", registry=registry, overrides=overrides)


def test_a_side_without_a_fusion() -> None:
    model, samples = trained()
    model.fusion, model.teacher = None, True
    with pytest.raises(UserError, match="the teacher has no fusion"):
        task().run(model, [EvaluationSet("s", samples)])
