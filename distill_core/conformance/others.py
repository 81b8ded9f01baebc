"""Checks of schedules, optimisers, sources, evaluations, trackers and initializers."""

from __future__ import annotations

import copy
import gc
import math
import os
import pickle
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from distill_core.components import Loaded, TrackerConfig
from distill_core.conformance import surroundings
from distill_core.conformance.modules import close
from distill_core.conformance.suite import Case, DoesNotFit, Mend, checks, require
from distill_core.data.opening import is_local
from distill_core.data.shards import Shards
from distill_core.errors import DataError, UserError
from distill_core.evaluate.sets import EvaluationSet
from distill_core.model import Model
from distill_core.types import Sample


@contextmanager
def cache() -> Iterator[Path]:
    """A folder that is the cache while a check runs, and is taken away afterwards."""
    before = os.environ.get("DISTILL_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DISTILL_CACHE"] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["DISTILL_CACHE"]
            else:
                os.environ["DISTILL_CACHE"] = before


@checks("schedule")
def factors(case: Case) -> None:
    """The factor is finite, not negative, and a function of (step, steps) alone, for short and long runs."""
    schedule = case.cls(case.config)
    for steps in (1, 2, 10, 5000):
        at = sorted({0, 1, steps // 3, steps // 2, steps - 1} & set(range(steps)))
        found = [schedule.factor(step, steps) for step in at]
        require(
            all(isinstance(x, int | float) and math.isfinite(x) and x >= 0 for x in found),
            f"of {steps} steps, at {at} the factors are {found}; they must be finite and not negative",
        )
        again = [case.cls(case.config).factor(step, steps) for step in reversed(at)]
        require(found == again[::-1], "the factor depends on the steps asked before: a resumed run would differ")
        require(max(found) > 0, f"of {steps} steps, all factors are 0: nothing would be learned")


def _optimizer(case: Case) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    named = [(name, p, 0.5 if name.startswith("1") else 1.0) for name, p in module.named_parameters()]
    component = case.cls(case.config)
    groups = component.groups(named)
    held = [id(p) for group in groups for p in group["params"]]
    require(
        sorted(held) == sorted(id(p) for _, p, _ in named), "`groups` must hold each parameter it is given exactly once"
    )
    return module, component.build(groups)


def _step(module: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    module(torch.randn(8, 4, generator=draw)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@checks("optimizer")
def steps(case: Case) -> None:
    """Every parameter is in one group with its learning rate, and a step moves the parameters."""
    module, optimizer = _optimizer(case)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    one, half = (rates[id(module[i].weight)] for i in (0, 1))  # type: ignore[index]
    require(math.isclose(half, one / 2), "a group's lr must be the option times the parameter's factor")
    before = [p.clone() for p in module.parameters()]
    _step(module, optimizer, 0)
    require(not close(before, module.parameters(), 0.0), "a step moves no parameter")


@checks("optimizer")
def optimizer_state(case: Case) -> None:
    """Its state dict carries all its state: a resumed run goes on the same."""
    module, optimizer = _optimizer(case)
    _step(module, optimizer, 0)
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(module.state_dict())
    _step(module, optimizer, 1)
    other, again = _optimizer(case)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    _step(other, again, 1)
    require(close(module.parameters(), other.parameters(), 1e-6), "after load_state_dict the next step is another one")


@checks("source")
def splits(case: Case) -> None:
    """`splits` names splits, or None, without touching data; of another split `sets` gives {}."""
    named = case.cls.splits(case.config)
    require(
        named is None or (isinstance(named, tuple) and all(isinstance(split, str) for split in named)),
        "`splits` must return a tuple of names, or None where the options do not tell",
    )
    with cache():
        source = case.cls(case.config)
        try:
            source.prepare()
            require(source.sets("no such split") == {}, "`sets` of a split that it has not must be {}")
        except DataError:
            return


@checks("source")
def shards(case: Case) -> None:
    """After `prepare` each split has samples, and `size` is their number; or a DataError says why not."""
    with cache():
        source = case.cls(case.config)
        try:
            source.prepare()
            found = {split: source.sets(split) for split in case.cls.splits(case.config) or ("train",)}
            samples = {split: source.samples(split) for split in found}
        except DataError as error:
            raise DoesNotFit(f"the example has no data here: {error}") from error
        for split, sets in found.items():
            require(
                isinstance(sets, dict) and all(isinstance(names, list) for names in sets.values()),
                "`sets` must return {set: [shards]}",
            )
            require(samples[split] and all(sets.values()), f"the split {split!r} has nothing in it")
            require(
                bool(sets) == case.cls.trainable,
                f"`sets` of {split!r} names {'no ' if not sets else ''}shards, and `trainable` is {case.cls.trainable}",
            )
            if not all(is_local(name) for part in sets.values() for name in part):
                continue
            keys = [sample["__key__"] for part in samples[split].values() for sample in part]
            size = source.size(split)
            require(keys, f"the shards of {split!r} hold no sample")
            require(size is None or size == len(keys), f"`size` of {split!r} is {size}; its shards hold {len(keys)}")
        again = case.cls(case.config)
        again.prepare()
        require({split: again.sets(split) for split in found} == found, "asked again, the shards are others")


@checks("source")
def pickling(case: Case) -> None:
    """A source goes to other processes."""
    require(pickle.loads(pickle.dumps(case.cls(case.config))).config == case.config, "its options do not survive")


@checks("evaluation")
def scores(case: Case) -> None:
    """Scores are finite numbers by name, the same each time, of one set and of two."""
    with tempfile.TemporaryDirectory() as folder:
        model, one, other = _scorable(case, Path(folder))
        for sets in ({"one": one}, {"one": one, "other": other}):
            found = []
            for _ in range(2):
                given = [EvaluationSet(name, samples) for name, samples in sets.items()]
                found.append(case.cls(case.config).run(model, given))
            require(isinstance(found[0], dict) and found[0], "`run` must return scores by name")
            for name, value in found[0].items():
                require(isinstance(value, float) and math.isfinite(value), f"the score {name!r} is {value!r}")
            require(found[0] == found[1], "the same model and sets give other scores the second time")


def _scorable(case: Case, folder: Path) -> tuple[Model, Iterable[Sample], Iterable[Sample]]:
    """A model and two sets: those of the task's `example`, or of numbered samples."""
    example = case.cls.example(case.config)
    if example is None:
        one, other = (Shards([surroundings.shard(folder, samples)]) for samples in (7, 8))
        return surroundings.model(), one, other
    model, samples = example
    require(len(samples) > 1, "`example` needs two samples or more")
    return model, samples, samples[: len(samples) - 1]


@checks("evaluation")
def nothing_to_score(case: Case) -> None:
    """A set without a sample raises DataError, not an error of torch."""
    model = (case.cls.example(case.config) or (surroundings.model(),))[0]
    try:
        case.cls(case.config).run(model, [EvaluationSet("empty", [])])
    except UserError:
        return
    except Exception as error:
        raise Mend(f"a set without a sample raises {type(error).__name__}: {error}; raise DataError") from error
    raise Mend("a set without a sample must raise DataError: there is nothing to score")


@checks("tracker")
def tracked(case: Case) -> None:
    """A run is started, described, logged and finished in its folder, and goes on when it is resumed.

    A tracker that is given media (its `Config` extends TrackerConfig) takes all kinds of pictures, and distributions.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        run.mkdir()
        for resume in (False, True):
            tracker = case.cls(case.config)
            tracker.start(str(run), "run", {"name": "run", "seed": 0}, resume)
            tracker.describe({"versions": {"python": "3"}, "device": "cpu"}, ["other", "mine"])
            context = {"subset": "train"}
            tracker.log(1, {"loss": 1.0, "scale": math.nan}, context)
            if issubclass(case.cls.Config, TrackerConfig):
                array = np.full((8, 8, 3), 127, np.uint8)
                picture, path = Image.fromarray(array), run / "picture.png"
                picture.save(path)
                for given in (array, picture, str(path)):
                    tracker.image(1, "picture", given, "a caption", context)
                tracker.distribution(1, "similarity", np.linspace(-1, 1, 16), context)
            tracker.finish()
            del tracker
            gc.collect()  # what it still holds open would otherwise look for its folder when that is gone


@checks("init")
def refusal(case: Case) -> None:
    """What cannot be loaded raises UserError and leaves the model as it was; else it names what it loaded."""
    objective = surroundings.objective()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    try:
        loaded = case.cls(case.config).apply(objective)
    except UserError:
        after = objective.state_dict()
        moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
        require(not moved, f"it raises UserError after it has changed {', '.join(moved[:3])}")
        return
    except Exception as error:
        raise Mend(f"weights that cannot be loaded raise {type(error).__name__}: {error}; raise UserError") from error
    require(isinstance(loaded, Loaded), "`apply` must return Loaded(line, names)")
    unknown = sorted(loaded.names - set(objective.state_dict()))
    require(not unknown, f"it says that it loaded {', '.join(unknown[:3])}, which the model has not")
