"""FLAIR: pooling and loss against the transcription, chunks, negatives, two ranks, captions, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from launching import of_ranks
from torch import Tensor

from distill_core.errors import BadSample, RecipeErrors, UserError
from distill_core.objective import Objective
from distill_core.outputs import Features, Progress
from distill_core.plan import BackboneSpec, ModalityPlan, Plan
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import parse_recipe
from distill_core.registry import Registry
from distill_flair.captions import SampledCaptions, SampledCaptionsConfig
from distill_flair.fusion import TextConditionedPool, TextConditionedPoolConfig
from distill_flair.loss import Flair, FlairConfig

PLAN = Plan(
    {m: ModalityPlan(("global",) * 3, BackboneSpec(width, 6)) for m, width in (("image", 8), ("text", 5))},
    fusion=True,
)


def weights(objective_or_fusion: Any, modality: str = "image") -> dict[str, Tensor]:
    fusion = getattr(objective_or_fusion, "fusion", objective_or_fusion)
    found = dict(fusion.pooler[modality].named_parameters())
    return {**found, "map": fusion.token_map[modality].weight}


@pytest.mark.slow
@pytest.mark.parametrize("negatives", ["one", "all"])
def test_loss_and_gradients_against_the_transcription(
    transcription: ModuleType, step: ModuleType, negatives: str
) -> None:
    """Catches a residual, a missing zero token, LayerNorm shared by keys and values, wrong positives and divisors."""
    made: Objective = step.objective(negatives=negatives, chunk=64)
    outputs = made.represent(step.batch(), Progress(0, 1))
    torch.manual_seed(3)
    losses = made.losses(outputs)
    torch.manual_seed(3)
    drawn = torch.randint(3, (step.SAMPLES, step.SAMPLES - 1)) if negatives == "one" else None
    loss: Any = made.loss["flair"]
    expected = transcription.losses(
        weights(made), loss.logit_scale.exp(), loss.logit_bias, outputs.student["image"].pooled[0],
        outputs.student["image"].tokens[0], outputs.student["text"].pooled, 2, drawn,
    )  # fmt: skip
    for name, value in zip(("conditioned", "multi_positive"), expected, strict=True):
        torch.testing.assert_close(losses.terms[f"flair/{name}"], value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(losses.total, sum(expected) / 2, rtol=1e-10, atol=1e-10)
    names = [name for name, _ in made.named_parameters()]
    ours = torch.autograd.grad(losses.total, list(made.parameters()), retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(sum(expected) / 2, list(made.parameters()), allow_unused=True)
    for name, mine, right in zip(names, ours, theirs, strict=True):
        assert (mine is None) == (right is None), name
        if mine is not None:
            torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("negatives", ["one", "all"])
@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_change_nothing(step: ModuleType, negatives: str, chunk: int) -> None:
    """4 does not divide the batch of 6: the last chunk is short."""
    whole, parts = (step.step(0, 6, negatives=negatives, chunk=size) for size in (6, chunk))
    for kind in ("terms", "gradients"):
        assert set(whole[kind]) == set(parts[kind])
        for name, value in whole[kind].items():
            torch.testing.assert_close(parts[kind][name], value, rtol=1e-10, atol=1e-10, msg=name)


def test_a_chunk_keeps_no_activations(step: ModuleType) -> None:
    """Catches chunks whose activations all stay until the backward pass, which would bound nothing."""
    made: Objective = step.objective(chunk=1)
    outputs = made.represent(step.batch(), Progress(0, 1))
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        made.losses(outputs)
    whole: list[int] = []
    made.loss["flair"].config = made.loss["flair"].config.model_copy(update={"chunk": 6})
    with torch.autograd.graph.saved_tensors_hooks(lambda x: whole.append(x.numel()) or x, lambda x: x):
        made.losses(outputs)
    assert sum(sizes) < sum(whole) / 4


def test_which_texts_a_picture_meets() -> None:
    loss = Flair(FlairConfig(), PLAN)
    torch.manual_seed(0)
    chosen = loss.choose(3, 7, 7, 0, torch.device("cpu"))
    assert chosen.shape == (7, 3 + 6)
    for i, row in enumerate(chosen.tolist()):
        assert row[:3] == [i, 7 + i, 14 + i], "its own K texts, first"
        assert [place % 7 for place in row[3:]] == [j for j in range(7) if j != i], "one of each other sample"
    assert {place // 7 for place in chosen[:, 3:].flatten().tolist()} == {0, 1, 2}
    torch.manual_seed(0)
    assert torch.equal(loss.choose(3, 7, 7, 0, torch.device("cpu")), chosen)
    assert not torch.equal(loss.choose(3, 7, 7, 0, torch.device("cpu")), chosen)
    every = Flair(FlairConfig(negatives="all"), PLAN).choose(3, 7, 7, 0, torch.device("cpu"))
    for i, row in enumerate(every.tolist()):
        assert sorted(row) == list(range(21))
        assert {place % 7 for place in row[:3]} == {i}


@pytest.mark.slow
def test_two_ranks_have_the_joint_batchs_terms_and_gradients(
    tmp_path: Path, step: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches positives looked for in the wrong rows, negatives of one rank alone, and a divisor of one rank."""
    ranks = of_ranks(2, Path(str(step.__file__)), tmp_path)

    def choose(loss: Flair, k: int, m: int, b: int, offset: int, device: torch.device) -> Tensor:
        """What both ranks draw, each for its 3 of the 6 pictures, from the seed of `step`."""
        torch.manual_seed(7)
        drawn = torch.randint(3, (3, 5)).tolist()
        others = [[j for j in range(6) if j != i] for i in range(6)]
        return torch.tensor(
            [
                [i, 6 + i, 12 + i] + [6 * view + j for view, j in zip(drawn[i % 3], others[i], strict=True)]
                for i in range(6)
            ]
        )

    for negatives in ("all", "one"):
        if negatives == "one":
            monkeypatch.setattr(Flair, "choose", choose)
        joint = step.step(0, step.SAMPLES, negatives=negatives)
        for name, term in joint["terms"].items():
            mean = sum(rank[negatives]["terms"][name] for rank in ranks) / 2
            torch.testing.assert_close(mean, term, rtol=1e-10, atol=1e-10)
        assert len(joint["gradients"]) > 20
        for name, gradient in joint["gradients"].items():
            for rank in ranks:
                found = rank[negatives]["gradients"][name]
                torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-10, msg=name)


def fusion(**options: Any) -> TextConditionedPool:
    torch.manual_seed(0)
    made = TextConditionedPool(TextConditionedPoolConfig(heads=2, **options), PLAN).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return made


def test_pooling_with_padding_against_the_transcription(transcription: ModuleType) -> None:
    """Catches padding that is attended to, and a mask that hides the zero token."""
    made = fusion()
    queries, tokens = torch.randn(4, 3, 6).double(), torch.randn(3, 5, 8).double()
    lengths = [5, 2, 0]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    found = made.pool("image", queries, tokens, mask)
    for v in range(4):
        for b, length in enumerate(lengths):
            expected = transcription.pool(weights(made), queries[v, b], tokens[b, :length], 2)
            torch.testing.assert_close(found[v, b], expected, rtol=1e-10, atol=1e-10)
    junk = torch.where(mask[..., None], tokens, 1e3)
    assert torch.equal(made.pool("image", queries, junk, mask), found)
    alone = made.pool("image", queries[2:3], tokens, mask)
    torch.testing.assert_close(alone[0], found[2], rtol=1e-10, atol=1e-10)


def test_the_fusion_as_a_fusion(transcription: ModuleType) -> None:
    """Both modalities ask by default, and each fused view has length one."""
    made = fusion()
    features = {
        m: Features(torch.randn(3, 2, 6).double(), {0: torch.randn(2, 4, width).double()})
        for m, width in (("image", 8), ("text", 5))
    }
    fused = made(features)
    for mine, other in (("image", "text"), ("text", "image")):
        found = transcription.pool(weights(made, other), features[mine].pooled[1, 0], features[other].tokens[0][0], 2)
        torch.testing.assert_close(fused[mine].pooled[1, 0], found / found.norm(), rtol=1e-10, atol=1e-10)
        assert fused[mine].pooled.shape == (3, 2, 6)
    text_alone = fusion(queries=("text",))
    assert set(text_alone.pooler) == {"image"}, "no weights that nothing uses"
    with pytest.raises(UserError, match=r"image does not ask; set fusion.queries to \[image, text\]"):
        text_alone(features)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("fusion=none", "'flair' pools with the fusion; this recipe has none: add `fusion: text_conditioned_pool`"),
        (
            "fusion=identity",
            "'flair' pools with the fusion, and this recipe's has no `pool`: take text_conditioned_pool",
        ),
        ("fusion.heads=4", "4 heads, which do not divide the embedding width 6"),
        ("fusion.queries=[sound]", "lets image, text ask; `queries` must name one or both"),
        ("backbone.text.dim=4", "compares embeddings of one width D; the backbones give image 6, text 4"),
        ("loss.0.modalities=[picture, text]", "needs a modality 'picture'"),
        ("loss.0.chunk=0", "greater than 0"),
    ],
)
def test_what_is_refused(step: ModuleType, registry: Registry, change: str, message: str) -> None:
    with pytest.raises(RecipeErrors) as caught:
        parse_recipe(step.RECIPE, "r.yaml", registry=registry, overrides=[change])
    assert message in str(caught.value)


def test_a_fusion_in_which_texts_do_not_ask_is_named(registry: Registry, step: ModuleType) -> None:
    """A loss cannot see the fusion's options before it runs; catches a bare KeyError."""
    recipe = parse_recipe(step.RECIPE, "r.yaml", registry=registry, overrides=["fusion.queries=[image]"])
    made = build_objective(recipe).double()
    outputs = made.represent(step.batch(), Progress(0, 1))
    with pytest.raises(UserError, match=r"'text' is to pool the tokens of 'image', but does not ask; add it to fusion"):
        made.losses(outputs)


def test_scale_and_bias_start_as_in_the_public_code() -> None:
    """Its model starts with CLIP's scale, ln(1 / 0.07), though its bias is SigLIP's, whose scale is 10."""
    loss = Flair(FlairConfig(), PLAN)
    assert loss.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-6)
    assert loss.logit_bias.item() == -10


def test_scale_is_clamped(step: ModuleType) -> None:
    made: Objective = step.objective()
    loss: Any = made.loss["flair"]
    outputs = made.represent(step.batch(), Progress(0, 1))
    for value, expected in ((9.0, np.log(100)), (-2.0, 0.0)):
        loss.logit_scale.data.fill_(value)
        made.after_step(outputs, Progress(0, 1))
        assert loss.logit_scale.item() == pytest.approx(expected)


def sample(*sentences: str) -> dict[str, bytes]:
    return {"json": json.dumps({"captions": list(sentences)}).encode()}


def test_sampled_captions() -> None:
    """Catches texts of one kind alone, sentences beyond the most, repeats inside a text, and draws from elsewhere."""
    names = [f"sentence {i}" for i in range(9)]
    made = SampledCaptions(SampledCaptionsConfig(captions=400, sentences=3))
    assert made.roles(made.config) == ("global",) * 400
    views = made.train_views(sample(*names), np.random.default_rng(0))
    again = made.train_views(sample(*names), np.random.default_rng(0))
    assert [v.data for v in again] == [v.data for v in views]
    lengths, neighbours, last = [], 0, 0
    for view in views:
        parts = view.data.split(". ")
        places = [names.index(part) for part in parts]
        assert len(set(places)) == len(places)
        lengths.append(len(places))
        neighbours += len(places) == 3 and places == list(range(places[0], places[0] + 3))
        last += places[-1] == 8
    assert {1, 2, 3} == set(lengths)
    assert all(100 < lengths.count(n) < 170 for n in (1, 2, 3))
    assert 0.4 < neighbours / lengths.count(3) < 0.62, "half of the texts are of neighbouring sentences"
    assert last > 20, "the last sentence is drawn too"
    few = made.train_views(sample("one"), np.random.default_rng(0))
    assert {view.data for view in few} == {"one"}
    with pytest.raises(BadSample):
        made.train_views(sample(), np.random.default_rng(0))


@pytest.mark.slow
def test_a_fixed_batch_is_learned(step: ModuleType) -> None:
    """Both terms fall far below what logits that know nothing of the pairs can reach."""
    made: Objective = step.objective(chunk=6)
    batch = step.batch()
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    for i in range(200):
        losses = made.losses(made.represent(batch, Progress(i, 200)))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    blind = np.log(6) + 5 * np.log(6 / 5)  # a text of 6 samples: one pair is right
    for value in losses.terms.values():
        assert value < blind / 2
