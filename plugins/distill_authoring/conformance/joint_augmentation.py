"""Checks of joint augmentations: the views of each modality, determinism, and samples that lack one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np

from distill_authoring.conformance.augmentation import equal_views, require_deterministic, sample
from distill_authoring.conformance.ranks import on_two_ranks
from distill_authoring.conformance.suite import Case, CheckFailed, checks, input_of, require
from distill_core import GLOBAL, AbsentModality, Augmentation, BackboneSpec, BadSample, ModalityPlan, View

KIND = "joint_augmentation"
Drawn = dict[str, list[View]]


def parts_of(case: Case) -> Mapping[str, Augmentation]:
    """The modalities' own augmentations, of the component's case."""
    parts: Mapping[str, Augmentation] = input_of(case, "parts", case.inputs.parts)(case.config)
    return parts


def plans_of(case: Case) -> Mapping[str, ModalityPlan]:
    """What it says of the modalities."""
    own = {
        name: ModalityPlan(
            part.roles(part.config),
            BackboneSpec(width=8, dim=8),
            augment=part.config,
            shapes=part.shapes(part.config),
            extras=part.extras(part.config),
        )
        for name, part in parts_of(case).items()
    }
    plans: Mapping[str, ModalityPlan] = case.cls.plans(case.config, own)
    require(set(plans) == set(own), f"`plans` must return a plan of each modality, {', '.join(own)}")
    return plans


def draw(joint: Any, raw: Mapping[str, Any], seed: int) -> Drawn:
    """The training views of a sample, each modality's own from a generator of its own, as in training."""

    def own(name: str) -> list[View]:
        return list(joint.parts[name].train_views(raw, np.random.default_rng((seed, list(joint.parts).index(name)))))

    views: Drawn = joint.train_views(raw, own, np.random.default_rng((seed, len(joint.parts))))
    return views


def equal_drawn(a: Drawn, b: Drawn) -> bool:
    """Whether two draws are equal in every modality."""
    return a.keys() == b.keys() and all(equal_views(a[name], b[name]) for name in a)


@checks(KIND)
def joint_views(case: Case) -> None:
    """`train_views` makes the views of each modality that `plans` names: roles (each together, globals first), shapes
    and extras, the same in all samples."""
    plans, joint = plans_of(case), case.cls(case.config, parts_of(case))
    shapes: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
    for seed in range(3):
        drawn = draw(joint, sample(case, seed), seed)
        require(set(drawn) == set(plans), f"`train_views` must return views of each of {', '.join(plans)}")
        for name, plan in plans.items():
            roles = tuple(view.role for view in drawn[name])
            require(roles == plan.roles, f"`train_views` makes {roles} of {name!r}, `plans` says {plan.roles}")
            changes = [role for i, role in enumerate(roles) if i == 0 or role != roles[i - 1]]
            ordered = len(changes) == len(set(changes)) and (GLOBAL not in roles or roles[0] == GLOBAL)
            require(ordered, f"views of a role are adjacent, globals first; of {name!r} they are {roles}")
            if plan.shapes is not None:
                sizes = tuple(tuple(view.data.shape) for view in drawn[name])
                require(sizes == plan.shapes, f"`train_views` makes {sizes} of {name!r}, `plans` says {plan.shapes}")
            for view in drawn[name]:
                extra = {key: np.shape(value) for key, value in view.extra.items()}
                first = shapes.setdefault((name, view.role), extra)
                require(extra == first, f"the extras of {view.role} views of {name!r} differ: {first} and {extra}")
                missing = sorted(set(plan.extras) - set(extra))
                require(not missing, f"`plans` names the extras {', '.join(missing)} of {name!r}, which are not there")


@checks(KIND)
def determinism(case: Case) -> None:
    """The same seed gives the same views, whatever was drawn or seen before; earlier views do not change."""
    joint, samples = case.cls(case.config, parts_of(case)), (sample(case), sample(case, 1))
    require_deterministic(lambda number, seed: draw(joint, samples[number], seed), equal_drawn)


@checks(KIND)
def processes(case: Case) -> None:
    """A pickled copy makes the same views in another process, as the loader's workers do."""
    joint, raw = case.cls(case.config, parts_of(case)), sample(case)
    expected = draw(joint, raw, 3)
    copied = pickle.loads(pickle.dumps(joint))
    require(equal_drawn(draw(copied, raw, 3), expected), "a pickled copy makes different views from the same seed")
    for views in on_two_ranks(draw, [(joint, raw, 3)] * 2):
        require(equal_drawn(expected, views), "another process makes different views: draw only from `rng`")


@checks(KIND)
def inputs_untouched(case: Case) -> None:
    """Neither the sample nor the views of the modalities' own augmentations are changed in place."""
    joint, raw = case.cls(case.config, parts_of(case)), sample(case)
    original = dict(raw)
    for seed in range(8):
        views = {
            name: part.train_views(raw, np.random.default_rng((seed, i)))
            for i, (name, part) in enumerate(joint.parts.items())
        }
        before = copy.deepcopy(views)
        joint.train_views(raw, views.__getitem__, np.random.default_rng(seed))
        require(raw == original, "`train_views` changes the sample; copy what you change")
        require(equal_drawn(before, views), "`train_views` changes the views that `own` made; make new ones")


@checks(KIND)
def bad_samples(case: Case) -> None:
    """Of a sample that lacks a modality it raises AbsentModality, of one that cannot be used another BadSample."""
    joint, good = case.cls(case.config, parts_of(case)), sample(case)
    head = {key: value for key, value in good.items() if key.startswith("__")}
    fields = [key for key in good if key not in head]
    broken = dict.fromkeys(fields, b"\xff\x00\xfe not what it says")
    for what, raw, error in (("no field", head, AbsentModality), ("broken bytes", head | broken, BadSample)):
        try:
            draw(joint, raw, 0)
        except error:
            continue
        except Exception as other:
            raise CheckFailed(
                f"`train_views` of a sample with {what} raises {type(other).__name__}: {other}; let what `own` raises "
                f"pass, or raise {error.__name__}"
            ) from other
        raise CheckFailed(f"`train_views` of a sample with {what} must raise {error.__name__}")
