"""Checks of teachers: what they encode, that they stand still when they must, and that a resumed run has the same."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill_authoring.conformance import surroundings
from distill_authoring.conformance.inputs import PROGRESS
from distill_authoring.conformance.modules import close, unmoved, untouched
from distill_authoring.conformance.suite import Case, NotApplicable, checks, require
from distill_core import (
    BadSample,
    Batch,
    ComponentConfig,
    Features,
    Objective,
    Sample,
    Teacher,
    TeacherPlan,
    UserError,
    Views,
    Visit,
)

BATCH = 3


class Around:
    """A student of two modalities with this teacher, and batches for both."""

    def __init__(self, case: Case) -> None:
        self.case = case
        cls, config = case.cls, case.config
        plan = surroundings.plan()
        if problems := list(cls.problems(config, plan)):
            raise NotApplicable(f"it refuses the checks' recipe of two modalities: {problems[0]}")
        specs = cls.specs(config, {name: m.spec for name, m in plan.modalities.items()})
        views = {
            name: own
            for name, m in plan.modalities.items()
            if name in specs and (config.modalities is None or name in config.modalities)
            if (own := tuple(i for i, role in enumerate(m.roles) if role in config.views))
        }
        if not views:
            raise NotApplicable("it encodes no modality of the checks' recipe: give `examples` that name none")
        self.plan = TeacherPlan(views, {name: specs[name] for name in views}, cls.parts(config))
        self.student, self.teacher = self.made()
        self.reader = cls.reader(config, "default", self.plan, dict.fromkeys(surroundings.NAMES, surroundings.stack))

    def made(self) -> tuple[Objective, Teacher]:
        """A student, always with the same weights, and the teacher of it."""
        student = surroundings.objective()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            teacher = self.case.cls(self.case.config, "default", self.plan, student)
        require(isinstance(teacher, Teacher), "it is no Teacher")
        try:
            teacher.prepare()
        except UserError as error:
            raise NotApplicable(f"what it loads is not there: {error}") from error
        return student, teacher

    def batch(self, numbers: tuple[int, ...] = (0, 1, 2)) -> Batch:
        """Samples of these numbers, as the loader's workers hand them over."""
        augment = surroundings.Items(ComponentConfig())
        samples = [self.sample(number) for number in numbers]
        views = {
            name: [augment.train_views(x, np.random.default_rng(i)) for i, x in zip(numbers, samples, strict=True)]
            for name in surroundings.NAMES
        }
        batch = Batch({name: surroundings.stack(x) for name, x in views.items()}, [x["__key__"] for x in samples])
        if self.reader is None:
            return batch
        try:
            read = [
                self.reader(x, {name: views[name][i] for name in views}, Visit(0, 0, x["__key__"]))
                for i, x in enumerate(samples)
            ]
        except BadSample as error:
            raise NotApplicable(
                f"the checks' samples have not what it reads ({error}): give them as ConformanceCase(sample=...)"
            ) from error
        seeds = list(numbers)
        own: dict[str, Views] = {m: c([x[m] for x in read], seeds) for m, c in self.reader.collators.items()}
        batch.teacher = {"default": own}
        return batch

    def sample(self, number: int) -> Sample:
        """A raw sample; with what the teacher's plugin adds."""
        more = self.case.inputs.sample
        fields = more(self.case.config, np.random.default_rng(number)) if more is not None else {}
        return {"__key__": f"sample-{number}", "__url__": "none.tar", "number": str(number).encode(), **fields}

    def encode(self, teacher: Teacher, batch: Batch) -> dict[str, Features]:
        """As a step does."""
        with torch.no_grad():
            return teacher.encode(batch, {})


def pooled(features: Mapping[str, Features]) -> list[Tensor]:
    """Of all modalities."""
    return [features[name].pooled for name in sorted(features)]


def moved(student: Objective) -> None:
    """Give a student other weights."""
    with torch.no_grad():
        for parameter in student.backbone.parameters():
            parameter.add_(0.5)


@checks("teacher")
def features(case: Case) -> None:
    """It encodes the views of its plan, [V, B, D] by its `specs`, without gradients, the same each time; no sample
    depends on another."""
    around = Around(case)
    batch = around.batch()
    encoded = around.encode(around.teacher, batch)
    require(
        set(encoded) == set(around.plan.views),
        f"`encode` gives {sorted(encoded)}; its plan has views of {sorted(around.plan.views)}",
    )
    for name, x in encoded.items():
        expected = (len(around.plan.views[name]), BATCH, around.plan.specs[name].dim)
        require(tuple(x.pooled.shape) == expected, f"{name}: pooled is {list(x.pooled.shape)}, not {list(expected)}")
        require(bool(torch.isfinite(x.pooled).all()), f"{name}: pooled holds values that are not finite")
        require(not x.pooled.requires_grad, f"{name}: pooled carries a gradient")
    again = around.encode(around.teacher, around.batch())
    require(close(pooled(encoded), pooled(again), 0.0), "the same batch is encoded differently the second time")
    single = around.encode(around.teacher, around.batch((1,)))
    middle = [x[:, 1:2] for x in pooled(encoded)]
    require(close(middle, pooled(single), 1e-5), "a sample's features depend on the other samples of its batch")


@checks("teacher")
def inputs_untouched(case: Case) -> None:
    """`encode` changes nothing of the batch, which the student sees next."""
    around = Around(case)
    batch = around.batch()
    with untouched({"views": batch.views, "teacher": batch.teacher}, "batch", "`encode`"):
        around.encode(around.teacher, batch)


@checks("teacher")
def layers(case: Case) -> None:
    """It hands on the layers of `plan.layers_of`, where its `specs` say that it has some."""
    around = Around(case)
    read = {name: {0: (0,)} for name, spec in around.plan.specs.items() if spec.layers}
    if not read:
        raise NotApplicable("its `specs` have no layers")
    around.plan = replace(around.plan, layers_of=read)
    _, teacher = around.made()
    with torch.no_grad():
        encoded = teacher.encode(around.batch(), dict.fromkeys(read, (0,)))
    for name in read:
        tokens, layer = encoded[name].tokens.get(0), encoded[name].layers.get(0, {}).get(0)
        require(
            tokens is not None and layer is not None and layer.shape == tokens.shape,
            f"{name}: its `specs` have layers, and it does not hand on the layer 0 that `plan.layers_of` asks for, "
            "[B, L, W]; say `layers=0` in `specs` where it has none",
        )


@checks("teacher")
def reading(case: Case) -> None:
    """What its reader reads in a worker is the same after pickling: a function of the sample and its views alone."""
    around = Around(case)
    if around.reader is None:
        raise NotApplicable("it reads nothing of its own")
    first = around.batch()
    around.reader = pickle.loads(pickle.dumps(around.reader))
    second = around.batch()
    for name, views in first.teacher["default"].items():
        ours, theirs = ([g.x for g in x.groups] for x in (views, second.teacher["default"][name]))
        require(close(ours, theirs, 0.0), f"{name}: what is read differs the second time, or after pickling")


@checks("teacher")
def not_finite(case: Case) -> None:
    """A step that is not finite moves nothing; no step moves the student."""
    around = Around(case)
    moved(around.student)
    before = [x.clone() for x in around.teacher.state_dict().values()]
    for rule in (around.teacher.before_optimizer, around.teacher.after_step):
        rule(PROGRESS, torch.tensor(False))
    require(
        close(before, around.teacher.state_dict().values(), 0.0), "a step that is not finite moves it: see `finite`"
    )
    with unmoved(around.student, "a step of the teacher"):
        for finite in (None, torch.tensor(True)):
            around.teacher.before_optimizer(PROGRESS, finite)
            around.teacher.after_step(PROGRESS, finite)


@checks("teacher")
def resumed(case: Case) -> None:
    """Its state dict and `digest` are all its state: after loading them it encodes the same, and moves the same."""
    around = Around(case)
    moved(around.student)
    around.teacher.after_step(PROGRESS)
    student, teacher = around.made()
    require(teacher.digest() == around.teacher.digest(), "`digest` differs for the same weights")
    teacher.load_state_dict(around.teacher.state_dict())
    for other in (student, student, around.student):
        moved(other)
    batch = around.batch()
    for what in ("after loading its state", "a step after loading its state"):
        ours, theirs = pooled(around.encode(around.teacher, batch)), pooled(around.encode(teacher, batch))
        require(close(ours, theirs, 1e-6), f"{what} it encodes differently: hold what moves in buffers")
        for x in (around.teacher, teacher):
            x.before_optimizer(PROGRESS)
            x.after_step(PROGRESS)


@checks("teacher")
def frozen(case: Case) -> None:
    """A `cacheable` teacher is a function of the views: neither steps nor the student's weights change what it says."""
    if not case.cls.cacheable(case.config):
        raise NotApplicable("it is not cacheable")
    around = Around(case)
    batch = around.batch()
    before = pooled(around.encode(around.teacher, batch))
    moved(around.student)
    around.teacher.before_optimizer(PROGRESS)
    around.teacher.after_step(PROGRESS)
    require(
        close(before, pooled(around.encode(around.teacher, batch)), 0.0), "it is `cacheable`, and what it says moves"
    )


@checks("teacher")
def copied_parts(case: Case) -> None:
    """What it copies of the student shares no memory with it."""
    around = Around(case)
    theirs = {x.data_ptr() for x in around.student.state_dict().values() if x.numel()}
    ours: list[Any] = [name for name, x in around.teacher.state_dict().items() if x.numel() and x.data_ptr() in theirs]
    require(not ours, f"{', '.join(ours[:3])} is the student's own tensor, which trains: copy it")
