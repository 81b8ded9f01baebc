"""Checks of augmentations: roles, determinism, pickling, and samples that cannot be used."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill_authoring.conformance.ranks import on_two_ranks
from distill_authoring.conformance.suite import Case, CheckFailed, NotApplicable, checks, input_of, require
from distill_core import GLOBAL, AbsentModality, BadSample, Group, View, Views, with_extra

KIND = "augmentation"


def equal(a: Any, b: Any) -> bool:
    """Whether two views' data are equal."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def equal_views(a: list[View], b: list[View]) -> bool:
    """Whether two lists of views are equal: data, roles and extras."""
    return len(a) == len(b) and all(
        x.role == y.role and equal(x.data, y.data) and equal(x.extra, y.extra) for x, y in zip(a, b, strict=True)
    )


def sample(case: Case, seed: int = 0) -> dict[str, Any]:
    """A raw sample, as read from a shard."""
    fields = input_of(case, "sample", case.inputs.sample)(case.config, np.random.default_rng(seed))
    require(
        all(isinstance(value, bytes) for key, value in fields.items() if not key.startswith("__")),
        "`sample` of its ConformanceCase must return bytes by field: augmentations read raw samples",
    )
    return {"__key__": f"sample-{seed}", "__url__": "shard.tar", **fields}


def draw(augmentation: Any, raw: Mapping[str, Any], seed: int) -> list[View]:
    """The training views of a sample, from a new generator with this seed."""
    views: list[View] = augmentation.train_views(raw, np.random.default_rng(seed))
    return views


@checks(KIND)
def roles(case: Case) -> None:
    """`roles` names the views that `train_views` makes, globals first, each role together."""
    declared = case.cls.roles(case.config)
    require(isinstance(declared, tuple) and declared, "`roles` must return a tuple with a role for each view")
    changes = [role for i, role in enumerate(declared) if i == 0 or role != declared[i - 1]]
    require(len(changes) == len(set(changes)), f"the views of a role must be adjacent; `roles` returns {declared}")
    require(GLOBAL not in declared or declared[0] == GLOBAL, f"global views come first; `roles` returns {declared}")
    augmentation = case.cls(case.config)
    for seed in range(3):
        views = draw(augmentation, sample(case, seed), seed)
        require(all(isinstance(view, View) for view in views), "`train_views` must return a list of View")
        roles_of_views = tuple(view.role for view in views)
        require(roles_of_views == declared, f"`train_views` makes {roles_of_views}, `roles` says {declared}")
        if (shapes := case.cls.shapes(case.config)) is not None:
            sizes = tuple(tuple(view.data.shape) for view in views)
            require(sizes == shapes, f"`train_views` makes data of {sizes}, `shapes` says {shapes}")


@checks(KIND)
def extras(case: Case) -> None:
    """The views of a role have the same extras, of the same shapes in all samples, since they are stacked; all views
    have those that `extras` names, whose work on the device leaves them."""
    augmentation = case.cls(case.config)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for seed in range(3):
        for view in draw(augmentation, sample(case, seed), seed):
            own = {name: np.shape(value) for name, value in view.extra.items()}
            first = shapes.setdefault(view.role, own)
            require(own == first, f"the extras of {view.role} views differ, in names or shapes: {first} and {own}")
            missing = sorted(set(case.cls.extras(case.config)) - set(own))
            require(not missing, f"`extras` names {', '.join(missing)}, which {view.role} views do not have")


@checks(KIND)
def device_work(case: Case) -> None:
    """`on_device` draws nothing, changes no tensor in place, keeps roles, and leaves alone what it made."""
    augmentation = case.cls(case.config)
    made = [draw(augmentation, sample(case, seed), seed) for seed in range(2)]
    if not all(isinstance(view.data, Tensor) for views in made for view in views):
        raise NotApplicable("the data of its views are no tensors; its backbone's collator makes them")
    members: dict[tuple[str, torch.Size], list[int]] = {}
    for i, view in enumerate(made[0]):
        members.setdefault((view.role, view.data.shape), []).append(i)
    groups = [
        Group(torch.stack([torch.stack([views[i].data for views in made]) for i in numbers]), role)
        for (role, _), numbers in members.items()
    ]
    collated = with_extra(Views(groups), made)
    before = copy.deepcopy(collated)
    torch.manual_seed(1)
    once = augmentation.on_device(collated)
    torch.manual_seed(2)
    again, twice = augmentation.on_device(collated), augmentation.on_device(once)

    def alike(a: Views, b: Views) -> bool:
        pairs = zip(a.groups, b.groups, strict=True)
        return all(x.role == y.role and equal(x.x, y.x) and equal(x.extra, y.extra) for x, y in pairs)

    require(alike(before, collated), "`on_device` changes the views that it is handed; make new ones")
    require(
        [group.role for group in once.groups] == [role for role, _ in members],
        "`on_device` must keep the groups and their roles",
    )
    require(alike(once, again), "`on_device` makes other views of the same batch: draw in `train_views`")
    lost = [name for name in case.cls.extras(case.config) for group in once.groups if name not in group.extra]
    require(not lost, f"`extras` names {', '.join(dict.fromkeys(lost))}, which `on_device` drops")
    require(alike(once, twice), "`on_device` must leave alone what it made: a batch may come there twice")


@checks(KIND)
def determinism(case: Case) -> None:
    """The same seed gives the same views, whatever was drawn or seen before; earlier views do not change."""
    augmentation, samples = case.cls(case.config), (sample(case), sample(case, 1))
    require_deterministic(lambda number, seed: draw(augmentation, samples[number], seed), equal_views)


def require_deterministic(drawn: Callable[[int, int], Any], equal: Callable[[Any, Any], bool]) -> None:
    """`drawn(sample's number, seed)` are views, which `equal` compares."""
    views = drawn(0, 5)
    original = copy.deepcopy(views)
    state = random.getstate(), np.random.get_state()
    try:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        drawn(1, 6)
        intact = equal(original, views)
        repeated = drawn(0, 5)
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
    require(
        equal(original, repeated),
        "the same sample and seed give different views: draw only from `rng`, and keep no state between samples",
    )
    require(intact, "views change when the next ones are computed: they share a buffer; give each its own data")


@checks(KIND)
def pickling(case: Case) -> None:
    """A pickled copy, as loader workers get it, makes the same views."""
    augmentation, raw = case.cls(case.config), sample(case)
    expected = draw(augmentation, raw, 3)
    copied = pickle.loads(pickle.dumps(augmentation))
    require(equal_views(draw(copied, raw, 3), expected), "a pickled copy makes different views from the same seed")
    require(
        equal_views(pickle.loads(pickle.dumps(expected)), expected),
        "its views do not survive pickling: give plain data",
    )


@checks(KIND)
def processes(case: Case) -> None:
    """It makes the same views in another process, such as a resumed run's workers, where `hash` of a str differs."""
    augmentation, raw = case.cls(case.config), sample(case)
    expected = draw(augmentation, raw, 3)
    for views in on_two_ranks(draw, [(augmentation, raw, 3)] * 2):
        require(
            equal_views(expected, views),
            "another process makes different views of the same sample and seed: draw only from `rng`",
        )


@checks(KIND)
def sample_untouched(case: Case) -> None:
    """The sample is not changed: other modalities read it too."""
    raw = sample(case)
    original = dict(raw)
    draw(case.cls(case.config), raw, 0)
    require(raw == original, "`train_views` changes the sample; copy what you change")


@checks(KIND)
def evaluation_view(case: Case) -> None:
    """`decode` returns the unaugmented items, `eval_view` one deterministic global view of each."""
    augmentation, raw = case.cls(case.config), sample(case)
    items = augmentation.decode(raw)
    require(isinstance(items, list) and items, "`decode` must return a list with at least one item")
    require(raw == sample(case), "`decode` changes the sample; copy what you change")
    for item in items:
        original = copy.deepcopy(item)
        view, repeated = augmentation.eval_view(item), augmentation.eval_view(item)
        require(equal(original, item), "`eval_view` changes the item, which others read: copy what you change")
        require(isinstance(view, View) and view.role == GLOBAL, "`eval_view` must return a View of role `global`")
        require(equal_views([view], [repeated]), "`eval_view` must return the same view each time")


@checks(KIND)
def bad_samples(case: Case) -> None:
    """A sample that cannot be used (no field, empty or broken bytes) raises BadSample, so that the run continues; one
    without any field AbsentModality."""
    augmentation, good = case.cls(case.config), sample(case)
    head = {key: value for key, value in good.items() if key.startswith("__")}
    fields = [key for key in good if key not in head]
    broken: dict[str, dict[str, Any]] = {
        "no field": head,
        "empty fields": head | dict.fromkeys(fields, b""),
        "broken bytes": head | dict.fromkeys(fields, b"\xff\x00\xfe not what it says"),
    }
    for what, raw in broken.items():
        for name, method in (("train_views", lambda raw: draw(augmentation, raw, 0)), ("decode", augmentation.decode)):
            try:
                method(raw)
            except BadSample as error:
                require(
                    what != "no field" or name == "decode" or isinstance(error, AbsentModality),
                    f"`{name}` of a sample with no field must raise AbsentModality, a BadSample that says so: a recipe "
                    "may let samples lack the modality (data.optional)",
                )
                continue
            except Exception as error:
                raise CheckFailed(
                    f"`{name}` of a sample with {what} raises {type(error).__name__}: {error}; raise BadSample, which "
                    "skips and counts the sample"
                ) from error
            require(what != "no field", f"`{name}` of a sample with no field must raise BadSample")
    try:
        augmentation.eval_view(object())
    except BadSample:
        return
    except Exception as error:
        raise CheckFailed(
            f"`eval_view` of an item that it cannot read raises {type(error).__name__}; raise BadSample"
        ) from error
    raise CheckFailed("`eval_view` accepts any object as an item; raise BadSample for what it cannot read")
