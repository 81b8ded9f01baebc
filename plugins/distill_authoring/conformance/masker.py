"""Checks of maskers."""

from __future__ import annotations

import copy
import math
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill_authoring.conformance.inputs import DIM, WIDTH
from distill_authoring.conformance.modules import close
from distill_authoring.conformance.suite import Case, CheckFailed, checks, require
from distill_core import (
    PREDICTED,
    BackboneSpec,
    Features,
    Group,
    Mask,
    Masker,
    ModalityPlan,
    Needs,
    Plan,
    TeacherPlan,
    Views,
)

NAME, STEP, VIEWS, SAMPLES, HEADS = "first", 2, 2, 5, 3
GRIDS = ((6, 6), (8, 8), (14, 14), (24,))
"""Tried in this order: a masker may refuse grids that are too small, or of so many axes."""


class Around:
    """A modality of two views that the masker masks, and teachers that see them."""

    def __init__(self, case: Case) -> None:
        self.case, self.config, refused = case, case.config, ""
        for grid in GRIDS:
            refused = next(iter(case.cls.grid_problems(self.config, grid)), "")
            if not refused:
                break
        else:
            raise CheckFailed(f"it refuses all grids of the checks, up to {GRIDS[-1]}: {refused}")
        self.grid, self.tokens = grid, math.prod(grid)
        spec = BackboneSpec(
            WIDTH, DIM, can_mask=True, can_drop=True, class_tokens=1, attention=True, stride=(STEP,) * len(grid)
        )
        self.shape = (3, *(STEP * side for side in grid))
        roles = (self.config.role,) * VIEWS
        modality = ModalityPlan(roles, spec, shapes=(self.shape,) * VIEWS)
        self.needs = Needs()
        for _ in range(2):
            names = {**self.needs.teacher, **self.needs.attention}
            teachers = {name: TeacherPlan({NAME: tuple(range(VIEWS))}, {NAME: spec}) for name in names}
            self.plan = Plan({NAME: modality}, teachers)
            self.needs = case.cls.reads(self.config, NAME, self.plan)

    def made(self) -> Masker:
        """The masker."""
        masker: Masker = self.case.cls(self.config, NAME, self.plan)
        require(isinstance(masker, Masker), "it is no Masker")
        return masker

    def drawn(self, masker: Masker, seeds: list[int]) -> Group:
        """The masked views of samples of these seeds."""
        x = torch.stack([_noise(seed, VIEWS, *self.shape) for seed in seeds], 1)
        (group,) = masker.drawn(Views([Group(x, self.config.role)]), seeds).groups
        return group

    def features(self, seeds: list[int]) -> dict[str, Features]:
        """What each teacher has made of these samples: what `reads` names alone."""
        made = {}
        for name in self.plan.teachers:
            tokens = self.needs.teacher.get(name, {}).get(NAME, ())
            views = self.needs.attention.get(name, {}).get(NAME, ())

            def of(view: int, part: int, *shape: int) -> Tensor:
                return torch.stack([_noise(10 * seed + 3 * view + part, *shape) for seed in seeds])

            made[name] = Features(
                torch.stack([of(view, 0, DIM) for view in range(VIEWS)]),
                {view: of(view, 1, self.tokens, WIDTH) for view in tokens},
                class_tokens=torch.stack([of(view, 0, 1, WIDTH) for view in range(VIEWS)]),
                attention={view: of(view, 2, HEADS, self.tokens).softmax(-1) for view in views},
            )
        return made

    def masked(self, masker: Masker, seeds: list[int]) -> Group:
        """The views with their final masks."""
        (group,) = masker.chosen(Views([self.drawn(masker, seeds)]), self.features(seeds)).groups
        return group


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _parts(group: Group) -> list[Tensor]:
    return [x for x in (group.keep, group.token_mask, *group.extra.values()) if x is not None]


@contextmanager
def _global_generators(what: str) -> Iterator[None]:
    """Raises `CheckFailed` where the block draws from generators that everybody shares."""

    def state() -> tuple[Any, ...]:
        return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()

    before = state()
    yield
    require(state() == before, f"{what} draws from a global generator: a resumed run would see other masks")


@checks("masker")
def masks(case: Case) -> None:
    """`draw` gives what the class says (`drops`, `hides`, `extras`), of the right dtypes, always of the same shapes:
    `keep` ascending and not all tokens; over several draws something is masked, and masks differ."""
    around = Around(case)
    masker, draws = around.made(), []
    for seed in range(20):
        mask = masker.draw(around.grid, np.random.default_rng(seed))
        require(isinstance(mask, Mask), "`draw` must return a Mask")
        draws.append(mask)
    names = set(case.cls.extras(case.config))
    for mask in draws:
        require(set(mask.extra) == names, f"a mask has the extras {sorted(mask.extra)}; `extras` names {sorted(names)}")
    shapes = {repr([np.shape(x) for x in (m.keep, m.hidden, *m.extra.values())]) for m in draws}
    require(len(shapes) == 1, f"masks have different shapes: {', '.join(sorted(shapes))}; a batch needs the same")
    group = around.masked(masker, list(range(SAMPLES)))
    count = VIEWS * case.cls.times(case.config)
    for name, expected, has in (("keep", case.cls.drops, group.keep), ("hidden", case.cls.hides, group.token_mask)):
        says = "drops" if name == "keep" else "hides"
        have = "a" if has is not None else "no"
        require((has is not None) == expected, f"`{says}` is {expected}, and masks have {have} `{name}`")
    if group.keep is not None:
        keep = group.keep
        require(keep.dtype == torch.int64 and keep.shape[:2] == (count, SAMPLES), "keep is not int64 [K * V, B, L']")
        inside = bool((keep >= 0).all() and (keep < around.tokens).all() and (keep.diff(dim=-1) > 0).all())
        require(inside, f"keep must be ascending, without doubles, from 0 to {around.tokens - 1}")
        require(0 < keep.shape[-1] < around.tokens, f"{keep.shape[-1]} of {around.tokens} tokens are kept")
    if group.token_mask is not None:
        hidden = group.token_mask
        require(hidden.dtype == torch.bool, "hidden is not bool")
        require(hidden.shape == (count, SAMPLES, around.tokens), f"hidden is {list(hidden.shape)}, not [K * V, B, L]")
        require(bool(hidden.any()), f"nothing is hidden in {count * SAMPLES} masks")
    every = [repr([x.tolist() for x in _parts(group.part(i, i + 1))]) for i in range(SAMPLES)]
    require(len(set(every)) > 1, "all samples have the same masks: draw from `rng`")
    if (times := case.cls.times(case.config)) > 1:
        of_masks = [repr([x[k * VIEWS : (k + 1) * VIEWS].tolist() for x in _parts(group)]) for k in range(times)]
        require(len(set(of_masks)) > 1, f"all {times} masks of a view are the same")


@checks("masker")
def replayable(case: Case) -> None:
    """`draw` is a function of the grid and the generator alone: no global random numbers, no state, the same after
    pickling."""
    around = Around(case)
    seeds = list(range(SAMPLES))
    masker = around.made()
    with _global_generators("`draw`"):
        first = around.drawn(masker, seeds)
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    again = around.drawn(masker, seeds)
    require(close(_parts(first), _parts(again), 0.0), "the same seeds give other masks the second time: it keeps state")
    copied = around.drawn(pickle.loads(pickle.dumps(masker)), seeds)
    require(close(_parts(first), _parts(copied), 0.0), "after pickling it draws other masks")
    order = [3, 0]
    some = around.drawn(around.made(), order)
    ours = [x[:, order] for x in _parts(first)]
    require(close(ours, _parts(some), 0.0), "a sample's masks depend on the other samples of its batch")


@checks("masker")
def chosen(case: Case) -> None:
    """`choose` draws nothing, changes no tensor in place and nothing but masks, and a sample's masks depend on the
    sample alone."""
    around = Around(case)
    seeds, masker = list(range(SAMPLES)), around.made()
    group, teachers = around.drawn(masker, seeds), around.features(seeds)
    before = copy.deepcopy((group, teachers))
    with _global_generators("`choose`"), torch.no_grad():
        first = masker.choose(group, teachers)
    same = close([group.x, *_parts(group)], [before[0].x, *_parts(before[0])], 0.0)
    require(same, "`choose` changes the group in place")
    for name, features in teachers.items():
        old = before[1][name]
        ours, theirs = ([x.pooled, *x.tokens.values(), *x.attention.values()] for x in (features, old))
        require(close(ours, theirs, 0.0), "`choose` changes a teacher's features in place")
    require(first.x is group.x and first.role == group.role, "`choose` changes more of the group than its masks")
    again = masker.choose(around.drawn(masker, seeds), teachers)
    require(close(_parts(first), _parts(again), 0.0), "`choose` gives other masks the second time: it keeps state")
    order = [4, 1]
    some = masker.choose(around.drawn(masker, order), around.features(order))
    ours = [x[:, order] for x in _parts(first)]
    require(
        close(ours, _parts(some), 0.0), "a sample's masks depend on the other samples of its batch: choose for each"
    )


@checks("masker")
def leaks(case: Case) -> None:
    """The student sees none of the tokens that a loss is to predict (`PREDICTED`), after `choose` as well."""
    around = Around(case)
    group = around.masked(around.made(), list(range(30)))
    if PREDICTED not in case.cls.extras(case.config):
        return
    predicted = group.extra[PREDICTED]  # [K * V, B, N, T]
    require(
        predicted.dtype == torch.int64 and predicted.ndim == 4,
        "its extra `predicted` is not int64 [N, T], N blocks of up to T tokens",
    )
    require(bool((predicted >= -1).all() and (predicted < around.tokens).all()), "`predicted` names no token")
    require(bool((predicted >= 0).any(-1).any(-1).all()), "a mask has nothing to predict")
    visible = torch.ones(*predicted.shape[:2], around.tokens, dtype=torch.bool)
    if group.keep is not None:
        visible = torch.zeros_like(visible).scatter(-1, group.keep, torch.ones_like(group.keep, dtype=torch.bool))
    if group.token_mask is not None:
        visible &= ~group.token_mask
    flat = predicted.flatten(2)
    leaked = visible.gather(-1, flat.clamp(min=0)) & (flat >= 0)
    require(
        not bool(leaked.any()),
        f"{int(leaked.sum())} tokens of `predicted` are seen by the student: take them out of `keep`, or hide them",
    )
