"""How many bugs `distill check-plugin` finds, of more than a hundred that authors make.

Those of `seeded_later.py` were written when the checks were done: at first 47 of these 54 were found, against 29 by the
checks as they had been; what was missing then is checked now.
"""

from collections import Counter

import components_to_check.seeded_backbones
import components_to_check.seeded_fusions
import components_to_check.seeded_later
import components_to_check.seeded_losses
import components_to_check.seeded_others  # noqa: F401
import pytest
from components_to_check.good import CASES, ReadsIds, TwoRates
from components_to_check.seeded import SEEDED

from distill_authoring.conformance import assert_conforms, check, others, ranks

pytestmark = pytest.mark.slow

CLASSES = {
    "gradient into the teacher",
    "in-place change",
    "undeclared needs",
    "padding",
    "unequal W and D",
    "no class tokens",
    "extra modality",
    "two ranks",
    "gradient where it may not go",
    "missing gradient",
    "nondeterminism",
    "state not in state_dict",
    "wrong shape or dtype",
    "non-picklable",
    "roles not together",
    "optimizer",
    "schedule that is no course",
    "tracker that blocks",
    "source whose shards lie",
    "task changes the model",
    "weights that hides what it loaded",
}
RATE = 0.87
FOUND: dict[type, bool] = {}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """A tracker that blocks, and ranks that wait for each other, need not be waited for as long as in earnest."""
    monkeypatch.setattr(others, "PATIENCE", 1.0)
    monkeypatch.setattr(ranks, "PATIENCE", 20.0)


@pytest.mark.parametrize("seed", SEEDED, ids=lambda seed: f"{seed.bug.replace(' ', '-')}-{seed.component.__name__}")
def test_a_seeded_bug_is_found(seed):
    """Would catch a check that has become blind; the base without the bug conforms (test_checks.py)."""
    FOUND[seed.component] = any(result.status == "failed" for result in check(seed.component, cases=CASES))
    assert FOUND[seed.component], f"{seed.component.__name__} ({seed.bug}) passes every check"


def test_there_are_bugs_of_every_class_and_most_are_found():
    """The figure that the issue asks for, over all and over those that were held back."""
    assert {seed.bug for seed in SEEDED} == CLASSES
    assert len(SEEDED) >= 60
    assert len({seed.component for seed in SEEDED}) == len(SEEDED)
    for held_back in (False, True):
        seeds = [seed for seed in SEEDED if seed.held_back == held_back]
        assert len(seeds) >= 20
        missing = [seed for seed in seeds if seed.component not in FOUND]
        for seed in missing:  # run alone, or out of order
            FOUND[seed.component] = any(result.status == "failed" for result in check(seed.component, cases=CASES))
        counts = Counter(FOUND[seed.component] for seed in seeds)
        assert counts[True] >= RATE * len(seeds), counts


@pytest.mark.parametrize("component", [TwoRates, ReadsIds], ids=lambda component: component.name)
def test_correct_components_that_were_refused(component):
    """Two learning rates in one optimiser; targets that are ids and no floating tensors."""
    assert_conforms(component, CASES)
