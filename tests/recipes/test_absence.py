"""Samples that lack a modality: every loss that allows it equals itself on the samples that have what it needs."""

from __future__ import annotations

import pytest
import torch
from absences import PAIR, PICTURE, RECIPES, WORDS, StepOutcome, batch_of, objective_of, step
from tiers import cases_of
from torch.testing import assert_close

from distill_authoring.conformance.ranks import on_two_ranks
from distill_core.outputs import Progress
from distill_core.parallel import compile_units
from distill_core.registry import Registry

KINDS = [PAIR, PICTURE, PAIR, WORDS, PICTURE, PAIR, WORDS, PAIR]
IMAGE_ALONE = ("simclr", "dino", "balanced dino", "ibot", "koleo", "flava_mim", "lejepa", "ijepa", "data2vec", "gram")
OF_ONE_RANK = ("captioning", "koleo", "flava_mlm", "flava_mim", "flava_mmm", "flava_itm", "grouping by sample")
"""Losses of each rank's rows alone, and those that do not show a difference."""


FAST = ("clip", "dino")


def complete(name: str) -> list[int]:
    """The numbers of the samples that have all that the loss needs."""
    lacking = {WORDS} if name in IMAGE_ALONE else {PICTURE} if name == "flava_mlm" else {WORDS, PICTURE}
    return [i for i, kind in enumerate(KINDS) if kind not in lacking]


def same(one: StepOutcome, other: StepOutcome) -> None:
    assert one.terms.keys() == other.terms.keys()
    for what in ("terms", "gradients", "state"):
        for name, x in getattr(one, what).items():
            assert_close(x, getattr(other, what)[name], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", cases_of(RECIPES, lambda name: name in FAST))
def test_the_loss_is_that_of_the_samples_that_have_what_it_needs(name: str) -> None:
    """Would catch a row of another sample beside a row, an absent one among the negatives, a mean over all B, a centre
    or batch norm that counts what is not there: terms, all gradients and the state after the step."""
    numbers = complete(name)
    absent = step(RECIPES[name], KINDS)
    same(absent, step(RECIPES[name], [PAIR] * len(numbers), numbers))
    assert max(float(x.abs().max()) for x in absent.gradients.values()) > 1e-4


@pytest.mark.parametrize("name", cases_of(RECIPES, lambda name: name in FAST))
def test_a_batch_in_which_nobody_has_it_changes_nothing(name: str) -> None:
    """Would catch a loss of a filler that reaches the weights, or is not finite."""
    kinds = [PICTURE, PICTURE] if name not in IMAGE_ALONE else [WORDS, WORDS]
    outcome = step(RECIPES[name], kinds)
    for x in (*outcome.terms.values(), *outcome.gradients.values()):
        assert float(x.abs().max()) == 0
    before = objective_of(RECIPES[name])[1].loss.state_dict()
    for key, x in outcome.state.items():
        if "logit_scale" not in key:  # which is clamped all the same
            assert torch.equal(x, before[key])


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    "numbers", [(0, 1, 2, 3, 4, 5, 6, 7), (0, 2, 5, 7, 1, 4, 3, 6)], ids=["uneven", "one_has_none"]
)
def test_ranks_with_different_numbers_of_samples_are_one_batch(name: str, numbers: tuple[int, ...]) -> None:
    """Would catch rows that a rank takes for another's, a mean that weighs ranks alike, and a rank without a single
    pair that leaves a collective to the others."""
    halves = [([KINDS[i] for i in half], half) for half in (numbers[:4], numbers[4:])]
    ranks = on_two_ranks(step, [(RECIPES[name], *half) for half in halves])
    for key, x in ranks[0].state.items():
        assert_close(x, ranks[1].state[key], rtol=0, atol=0, msg=key)
    if name in OF_ONE_RANK:
        assert all(torch.isfinite(x).all() for x in ranks[0].gradients.values())
    else:
        same(ranks[0], step(RECIPES[name], [KINDS[i] for i in numbers], numbers))


def test_where_all_are_there_nothing_is_cut() -> None:
    """Would catch work for recipes whose samples happen to have everything: losses read the very outputs."""
    recipe, objective = objective_of(RECIPES["clip"])
    batch = batch_of(recipe, [PAIR, PAIR])
    outputs = objective.float().represent(batch, Progress(0, 1))
    assert outputs.presence is not None
    assert outputs.having(["image", "text"]) is outputs
    batch.presence = {}
    assert objective.represent(batch, Progress(0, 1)).presence is None


def test_every_loss_that_can_do_without_samples_is_tested_here(registry: Registry) -> None:
    """Would catch a new loss that says `partial` and stands in no recipe above."""
    losses = {name for (kind, name), entry in registry.entries.items() if kind == "loss" and entry.cls.partial}
    tested = {text.split("loss: [{name: ")[1].split("}")[0].split(",")[0] for text in RECIPES.values()}
    assert losses == tested


@pytest.mark.slow
def test_compiled_towers_take_what_is_there() -> None:
    """Would catch losses that are compiled anew for each number of samples, up to an error; towers are, once."""
    recipe, objective = objective_of(RECIPES["clip"])
    objective = objective.float()
    assert compile_units(objective, "eager") == sum(len(tower.units()) for tower in objective.backbone.values())
    for count in range(1, 12):  # more than torch compiles one piece of code for
        kinds = [PAIR] * count + [PICTURE] * (12 - count)
        losses = objective.losses(objective.represent(batch_of(recipe, kinds), Progress(0, 1)))
        assert torch.isfinite(losses.total)
