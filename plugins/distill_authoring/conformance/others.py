"""Checks of schedules, optimisers, sources, tasks, trackers and weight loaders."""

from __future__ import annotations

import copy
import gc
import io
import math
import os
import pickle
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from distill_authoring.conformance import surroundings
from distill_authoring.conformance.modules import close, unmoved, untouched
from distill_authoring.conformance.suite import Case, CheckFailed, NotApplicable, checks, require
from distill_core import (
    Batch,
    Computation,
    DataError,
    EvaluationSet,
    FeatureKind,
    LoadReport,
    Losses,
    Model,
    Outputs,
    Progress,
    Sample,
    Score,
    Shard,
    Shards,
    TarShard,
    TrackerConfig,
    UserError,
)
from distill_core.tools import is_local


@contextmanager
def cache() -> Iterator[Path]:
    """A temporary cache folder for the time of a check."""
    previous = os.environ.get("DISTILL_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DISTILL_CACHE"] = folder
        try:
            yield Path(folder)
        finally:
            if previous is None:
                del os.environ["DISTILL_CACHE"]
            else:
                os.environ["DISTILL_CACHE"] = previous


@checks("schedule")
def values(case: Case) -> None:
    """The value is a finite number at every step, and depends on the progress alone, for short and long runs."""
    schedule = case.cls(case.config)
    for steps in (1, 2, 10, 5000):
        run = [Progress(step, steps) for step in range(steps)]
        reached = [schedule.value(progress) for progress in run]
        for step, x in enumerate(reached):
            require(
                isinstance(x, int | float) and math.isfinite(x),
                f"at step {step} of {steps} the value is {x!r}; it must be a finite number",
            )
        repeated = [case.cls(case.config).value(progress) for progress in reversed(run)]
        require(reached == repeated[::-1], "the value depends on earlier calls: a resumed run would differ")


@checks("hook")
def hooked(case: Case) -> None:
    """A step leaves the losses and finite gradients, and weights where they were; two hooks with one state do the same,
    and `state_dict` restores it."""
    ends: list[list[Tensor]] = []
    states: list[dict[str, Any]] = []
    for resumed in (False, True):
        module, hook = _terms(), case.cls(case.config)
        for step in range(4):
            if resumed and step == 2:
                hook = case.cls(case.config)
                hook.load_state_dict(copy.deepcopy(states[1]))
            ends.append(_hooked_step(module, hook, Progress(step, 4)))
            states.append(_saved(hook.state_dict()))
    for one, other in zip(ends[:4], ends[4:], strict=True):
        same = all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        require(same, "a hook that takes the state of another does not continue as it did")


def _saved(state: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint has it, which is read without unpickling code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    try:
        restored: dict[str, Any] = torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckFailed("`state_dict` must hold plain data and tensors: a checkpoint with it is not read") from error
    return restored


def _terms() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3)


def _hooked_step(module: torch.nn.Module, hook: Any, progress: Progress) -> list[Tensor]:
    """The weights after a step of plain descent on two terms."""
    torch.manual_seed(progress.step)
    x, y = torch.randn(8, 4), torch.randn(2, 8, 3)
    batch = Batch({}, [str(i) for i in range(8)])
    outputs = Outputs(progress=progress)

    def forward() -> tuple[Outputs, Losses]:
        terms = {name: (module(x) - target).square().mean() for name, target in zip("ab", y, strict=True)}
        return outputs, Losses(terms["a"] + 0.5 * terms["b"], terms, {}, {"a": 1.0, "b": 0.5})

    module.zero_grad(set_to_none=True)
    before = [p.detach().clone() for p in module.parameters()]
    hook.before_forward(batch, progress)
    computation = Computation([*module.named_parameters()], progress, forward, Tensor.backward, lambda: None)
    losses = hook.gradients(computation, computation.plain)
    require(isinstance(losses, Losses), "`gradients` must return the losses")
    require(computation.outputs is not None, "`gradients` must make a forward pass")
    for (name, p), old in zip(module.named_parameters(), before, strict=True):
        require(torch.equal(p.detach(), old), f"`gradients` leaves {name} elsewhere: the optimiser alone moves weights")
        require(p.grad is not None and bool(p.grad.isfinite().all()), f"`gradients` leaves {name} no finite gradient")
    with torch.no_grad():
        for p in module.parameters():
            p.sub_(0.1 * cast(Tensor, p.grad))
    hook.after_step(computation, torch.tensor(True))
    return [p.detach().clone() for p in module.parameters()]


def _optimizer(case: Case, factor: float = 1.0) -> tuple[torch.nn.Module, Any]:
    """A module with matrices and vectors, and its optimiser; all layers but the first have the learning-rate factor."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4))
    parameters = [(name, p, 1.0 if name.startswith("0") else factor) for name, p in module.named_parameters()]
    component = case.cls(case.config)
    with unmoved(module, "`groups`"):
        groups = component.groups(parameters)
    ids = [id(p) for group in groups for p in group["params"]]
    require(
        sorted(ids) == sorted(id(p) for _, p, _ in parameters),
        "`groups` must contain each parameter exactly once",
    )
    return module, component.build(groups)


def _step(module: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 8, 4, generator=draw)
    (module(x) - y).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _rates(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The learning rate of each parameter."""
    rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in module.named_parameters() if id(p) not in rates]
    require(not missing, f"the optimiser has no group with {', '.join(missing)}: `build` must use all groups")
    return {name: rates[id(p)] for name, p in module.named_parameters()}


@checks("optimizer")
def steps(case: Case) -> None:
    """Every parameter is in one group, whose `lr` follows its factor, and a step moves each parameter downhill."""
    module, optimizer = _optimizer(case)
    whole, half = _rates(module, optimizer), _rates(*_optimizer(case, 0.5))
    for name, rate in whole.items():
        expected = rate * (1.0 if name.startswith("0") else 0.5)
        require(math.isclose(half[name], expected), "a group's lr must be the option times the parameter's factor")
    originals = [p.detach().clone() for p in module.parameters()]
    (module(torch.randn(8, 4)) - torch.randn(8, 4)).square().sum().backward()
    gradients = [cast(Tensor, p.grad).clone() for p in module.parameters()]
    optimizer.step()
    downhill = 0.0
    for (name, p), old, gradient in zip(module.named_parameters(), originals, gradients, strict=True):
        require(not torch.equal(p, old), f"a step does not move a parameter [{', '.join(map(str, p.shape))}] ({name})")
        downhill += float(((p.detach() - old) * gradient).sum())
    require(downhill < 0, "a step goes uphill: it adds the gradient")


@checks("optimizer")
def scheduled(case: Case) -> None:
    """The schedule sets each group's `lr`: a step with lr 0 moves nothing, and no step moves what has no gradient."""
    module, optimizer = _optimizer(case)
    for group in optimizer.param_groups:
        group["lr"] = 0.0 * group["lr"]
    originals = [p.detach().clone() for p in module.parameters()]
    _step(module, optimizer, 0)
    require(
        close(originals, module.parameters(), 0.0),
        "a step moves parameters though every group's lr is 0: read group['lr'] at each step, the schedule sets it",
    )
    module, optimizer = _optimizer(case)
    unused = module[0].weight  # type: ignore[index]
    original = unused.detach().clone()
    (module[2](module[1](torch.randn(8, 4))) - 1).square().sum().backward()  # type: ignore[index]
    optimizer.step()
    require(torch.equal(original, unused), "a step moves a parameter that has no gradient (`p.grad` is None)")


@checks("optimizer")
def weight_decay(case: Case) -> None:
    """Weight decay is for matrices: without a gradient, norms, biases and scales (ndim < 2) do not change."""
    module, optimizer = _optimizer(case)
    originals = {name: p.detach().clone() for name, p in module.named_parameters()}
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(2):
        optimizer.step()
    decayed = [name for name, p in module.named_parameters() if p.ndim < 2 and not torch.equal(p, originals[name])]
    require(not decayed, f"{', '.join(decayed)} decay: in `groups`, give parameters with ndim < 2 weight_decay 0")


@checks("optimizer")
def optimizer_state(case: Case) -> None:
    """Its state dict holds all its state: a resumed run continues identically."""
    module, optimizer = _optimizer(case)
    for seed in range(3):
        _step(module, optimizer, seed)
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(module.state_dict())
    loaded, loaded_optimizer = _optimizer(case)
    loaded.load_state_dict(weights)
    loaded_optimizer.load_state_dict(state)
    for seed in range(3, 9):
        _step(module, optimizer, seed)
        _step(loaded, loaded_optimizer, seed)
    require(close(module.parameters(), loaded.parameters(), 1e-6), "after load_state_dict the next step differs")


@checks("source")
def splits(case: Case) -> None:
    """`splits` returns names, or None, without reading data; `sets` of any other split is {}."""
    names = case.cls.splits(case.config)
    require(
        names is None or (isinstance(names, tuple) and all(isinstance(split, str) for split in names)),
        "`splits` must return a tuple of names, or None if the options do not determine them",
    )
    with cache():
        source = case.cls(case.config)
        try:
            source.prepare()
            for split in {"no such split", "train", "validation", "test"} - set(
                names or ("train", "validation", "test")
            ):
                require(source.sets(split) == {}, f"`sets` of {split!r}, which `splits` does not name, must be {{}}")
        except DataError:
            return


@checks("source")
def shards(case: Case) -> None:
    """After `prepare` each split has samples, the same whenever and in whatever order they are read; else it raises
    DataError with the reason."""
    with cache():
        source = case.cls(case.config)
        try:
            source.prepare()
            sets_by_split = {split: source.sets(split) for split in case.cls.splits(case.config) or ("train",)}
            samples = {split: source.samples(split) for split in sets_by_split}
        except DataError as error:
            raise NotApplicable(f"the example has no data here: {error}") from error
        for split, sets in sets_by_split.items():
            require(
                isinstance(sets, dict) and all(isinstance(names, list) for names in sets.values()),
                "`sets` must return {set: [shards]}",
            )
            require(samples[split] and all(sets.values()), f"the split {split!r} is empty")
            require(
                bool(sets) == case.cls.trainable,
                f"`sets` of {split!r} names {'no ' if not sets else ''}shards, and `trainable` is {case.cls.trainable}",
            )
            require(
                all(isinstance(shard, Shard) for part in sets.values() for shard in part),
                f"`sets` of {split!r} must hold shards, as TarShard(path)",
            )
            every = [shard for part in sets.values() for shard in part]
            names = [shard.name for shard in every]
            require(
                len(names) == len(set(names)), f"a shard of {split!r} is listed twice: its samples would count twice"
            )
            if not all(is_local(name) for name in names):
                continue
            keys = [sample["__key__"] for part in samples[split].values() for sample in part]
            require(keys, f"the shards of {split!r} hold no sample")
            repeated = [sample["__key__"] for part in samples[split].values() for sample in part]
            require(repeated == keys, f"the samples of {split!r} differ when they are read again")
            for shard in every:
                _check_numbers(shard)
        second = case.cls(case.config)
        second.prepare()
        require(
            {split: _names(second.sets(split)) for split in sets_by_split}
            == {split: _names(sets) for split, sets in sets_by_split.items()},
            "a second source lists different shards",
        )


def _names(sets: Mapping[str, Sequence[Shard]]) -> dict[str, list[str]]:
    return {name: [shard.name for shard in shards] for name, shards in sets.items()}


def _check_numbers(shard: Shard) -> None:
    """Training reads samples by number, in any order and in another process."""
    keys = [sample["__key__"] for sample in shard]
    require(len(shard) == len(keys), f"{shard.name}: its length is {len(shard)}, and it holds {len(keys)} samples")
    copied = pickle.loads(pickle.dumps(shard))
    for number in (len(keys) - 1, 0):
        require(copied[number]["__key__"] == keys[number], f"{shard.name}: sample {number} is not the one in its place")


@checks("source")
def pickling(case: Case) -> None:
    """A source can be pickled, for other processes."""
    require(
        pickle.loads(pickle.dumps(case.cls(case.config))).config == case.config, "its options change when it is pickled"
    )


@checks("task")
def scores(case: Case) -> None:
    """Scores are finite numbers with distinct names, the same each time, on one set and on two; a headline has a mean
    over sets, and `means`, if written, names these."""
    with tempfile.TemporaryDirectory() as folder:
        model, first, second = _scorable(case, Path(folder))
        backbones = nn.ModuleList(model.backbone.values())
        for sets in ({"one": first}, {"one": first, "other": second}):
            results = []
            for training in (True, False):
                backbones.train(training)  # a run that trains scores its own model
                watched = [_Watched(name, samples) for name, samples in sets.items()]
                settings = _settings(model)
                with unmoved(backbones, "`run`"):
                    results.append(case.cls(case.config).run(model, watched))
                require(_settings(model) == settings, "`run` changes the model, which training and other tasks use")
                for evaluation_set in watched:
                    require(
                        evaluation_set.unchanged(),
                        "`run` changes embeddings in place, which other tasks read: copy them",
                    )
            require(results[0] and all(isinstance(score, Score) for score in results[0]), "`run` must return `Score`s")
            for score in results[0]:
                finite = isinstance(score.value, float) and math.isfinite(score.value)
                require(finite, f"the score {score.name!r} is {score.value!r}")
            counts = Counter((score.set, score.name) for score in results[0])
            require(
                max(counts.values()) == 1, f"two scores of one set have the same name: {counts.most_common(1)[0][0]}"
            )
            unknown = {score.set for score in results[0]} - {None, *sets}
            require(not unknown, f"scores are of sets that `run` was not given: {unknown}")
            hidden = {score.name for score in results[0] if score.headline} - {
                score.name for score in results[0] if score.headline and score.set is None
            }
            require(not hidden, f"the headline {hidden} has no mean over sets, and is not shown: use `mean_over_sets`")
            declared = case.cls.means(case.config)
            more = {score.name for score in results[0] if score.set is None} - set(declared or ())
            require(declared is None or not more, f"it gives the mean(s) {more}, which `means` does not name")
            require(results[0] == results[1], "the same model and sets give different scores the second time")


def _settings(model: Model) -> dict[str, Any]:
    return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(model).items()}


class _Watched(EvaluationSet):
    """A set that remembers the embeddings that it returned."""

    def __init__(self, name: str, source: Iterable[Sample]) -> None:
        super().__init__(name, source)
        self.embedded: list[tuple[Tensor, Tensor]] = []

    def embeddings(
        self, model: Model, modality: str, field: str | None = None, *, features: FeatureKind = "embedding"
    ) -> tuple[Tensor, Tensor]:
        """Those of the base class; remembers a copy of each."""
        pair = super().embeddings(model, modality, field, features=features)
        self.embedded += [(x, x.clone()) for x in pair]
        return pair

    def unchanged(self) -> bool:
        """Whether all embeddings are as they were returned."""
        return all(torch.equal(x, copied) for x, copied in self.embedded)


def _scorable(case: Case, folder: Path) -> tuple[Model, Iterable[Sample], Iterable[Sample]]:
    """A model and two sets: those of the task's `scorable`, or of numbered samples."""
    if case.inputs.scorable is None:
        first, second = (Shards([TarShard(surroundings.shard(folder, samples))]) for samples in (7, 8))
        return surroundings.model(), first, second
    model, samples = case.inputs.scorable(case.config)
    require(len(samples) > 1, "`scorable` needs two samples or more")
    return model, samples, samples[: len(samples) - 1]


@checks("task")
def nothing_to_score(case: Case) -> None:
    """A set without a sample raises DataError, not an error of torch."""
    scorable = case.inputs.scorable
    model = scorable(case.config)[0] if scorable is not None else surroundings.model()
    try:
        case.cls(case.config).run(model, [EvaluationSet("empty", [])])
    except UserError:
        return
    except Exception as error:
        raise CheckFailed(f"a set without a sample raises {type(error).__name__}: {error}; raise DataError") from error
    raise CheckFailed("a set without a sample must raise DataError: there is nothing to score")


PATIENCE = 5.0
"""Seconds in which a tracker's `log` must return, far more than it should take."""


@checks("tracker")
def tracked(case: Case) -> None:
    """A run is started, described, logged and finished in its folder, and continued when resumed; no call blocks, and
    arguments are not changed.

    A tracker of media (its `Config` extends TrackerConfig) accepts all kinds of pictures, and distributions.
    """  # fmt: skip
    problems: list[Exception] = []

    def work() -> None:
        try:
            _track(case, calls)
        except Exception as error:
            problems.append(error)

    calls: list[str] = []
    thread = threading.Thread(target=work, daemon=True)  # as in training: a thread of its own
    thread.start()
    thread.join(PATIENCE)
    while thread.is_alive():
        known_calls = list(calls)
        thread.join(PATIENCE)
        require(
            known_calls != calls or not thread.is_alive(),
            f"`{calls[-1]}` does not return in {PATIENCE:g} s: hand over to a thread or a queue",
        )
    if problems:
        raise problems[0]


def _track(case: Case, calls: list[str]) -> None:
    recipe, values, context = {"name": "run", "seed": 0}, {"loss": 1.0, "scale": math.nan}, {"subset": "train"}
    facts, tags = {"versions": {"python": "3"}, "device": "cpu"}, ["other", "mine"]
    received = (recipe, values, context, facts, tags)
    original = repr(received)

    def call(run: Callable[..., None], *arguments: Any) -> None:
        calls.append(run.__name__)
        run(*arguments)

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        run.mkdir()
        for resume in (False, True):
            tracker = case.cls(case.config)
            call(tracker.start, str(run), "run", recipe, resume)
            call(tracker.describe, facts, tags)
            for step in (1, 2):
                call(tracker.log, step, values, context)
            if issubclass(case.cls.Config, TrackerConfig):
                array, numbers = np.full((8, 8, 3), 127, np.uint8), np.linspace(-1, 1, 16)
                picture, path = Image.fromarray(array), run / "picture.png"
                picture.save(path)
                with untouched([array, numbers], "media", "the tracker"):
                    for picture_form in (array, picture, str(path)):
                        call(tracker.image, 1, "picture", picture_form, "a caption", context)
                    call(tracker.distribution, 1, "similarity", numbers, context)
            call(tracker.finish)
            require(repr(received) == original, "the tracker changes its arguments, which others read: copy them")
            del tracker
            gc.collect()  # else files that it still holds open would look for the deleted folder later


@checks("weights")
def refusal(case: Case) -> None:
    """If weights cannot be loaded, it raises UserError and changes nothing; else the report names what was loaded."""
    objective = surroundings.objective()
    original = {name: value.clone() for name, value in objective.state_dict().items()}
    try:
        with unmoved(objective, "`apply`", values=False):
            report = case.cls(case.config).apply(objective)
    except UserError:
        after = objective.state_dict()
        changed = [name for name, value in original.items() if not torch.equal(value, after[name])]
        require(not changed, f"it raises UserError after changing {', '.join(changed[:3])}")
        return
    except CheckFailed:
        raise
    except Exception as error:
        raise CheckFailed(
            f"weights that cannot be loaded raise {type(error).__name__}: {error}; raise UserError"
        ) from error
    require(isinstance(report, LoadReport), "`apply` must return LoadReport(line, names)")
    after = objective.state_dict()
    silent = [name for name, x in original.items() if name not in report.names and not torch.equal(x, after[name])]
    require(not silent, f"it changes {', '.join(silent[:3])}, and LoadReport.names does not list them")
    unknown = sorted(report.names - set(after))
    require(not unknown, f"it reports {', '.join(unknown[:3])} as loaded, which the model does not have")
