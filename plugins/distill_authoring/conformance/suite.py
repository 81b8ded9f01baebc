"""Runs the checks of a component and collects their results."""

from __future__ import annotations

import inspect
import json
import os
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import ValidationError

from distill_core import Component, ComponentConfig, ConformanceCase
from distill_core.tools import ConformanceCases, Context, Plugins, Registry

Status = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True)
class Result:
    """The result of one check of one component."""

    kind: str
    name: str
    check: str
    about: str
    """What the check requires of the component."""
    status: Status
    message: str = ""
    """What to fix, or why the check is not applicable."""

    def to_dict(self) -> dict[str, str]:
        """The result as plain data, for JSON."""
        return asdict(self)


class CheckFailed(Exception):
    """A check failed; the message says what to fix."""


class NotApplicable(Exception):
    """A check has nothing to check on this component; the message says why."""


def require(condition: object, message: str) -> None:
    """Raises `CheckFailed` where the condition does not hold."""
    if not condition:
        raise CheckFailed(message)


@dataclass(frozen=True)
class Case:
    """A component class with the options of one of its examples."""

    cls: Any
    config: Any
    options: dict[str, Any]
    inputs: ConformanceCase
    """What its plugin gives for the checks."""
    memo: dict[str, Any] = field(default_factory=dict, compare=False)
    """Values that its checks share."""


Made = TypeVar("Made")


def input_of(case: Case, name: str, make: Callable[..., Made] | None) -> Callable[..., Made]:
    """The function that makes an input. Raises `CheckFailed` where the component's plugin gives none."""
    if make is None:
        raise CheckFailed(
            f"its plugin gives no `{name}` to check it with: return ConformanceCase({case.cls.__name__}, {name}=...) "
            "from the hook `distill_conformance_cases`"
        )
    return make


@dataclass(frozen=True)
class Check:
    """A function that raises `CheckFailed`; with `once` it takes the class instead of a case for each example."""

    name: str
    about: str
    kinds: tuple[str, ...]
    once: bool
    run: Callable[[Any], None]


_CHECKS: list[Check] = []
_MODULES = (
    "general", "augmentation", "joint_augmentation", "backbone", "fusion", "head", "loss", "teacher", "masker",
    "balance", "others",
)  # fmt: skip


def checks(*kinds: str, once: bool = False) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Registers a check for these kinds (all kinds if none is named); its docstring states the requirement."""

    def add(run: Callable[[Any], None]) -> Callable[[Any], None]:
        about = " ".join(inspect.cleandoc(run.__doc__ or "").split())
        _CHECKS.append(Check(run.__name__, about, kinds, once, run))
        return run

    return add


def checks_of(kind: str) -> list[Check]:
    """The checks of a kind, in the order they are run."""
    for module in _MODULES:
        import_module(f"distill_authoring.conformance.{module}")
    return [check for check in _CHECKS if not check.kinds or kind in check.kinds]


def _of_plugin(run: Callable[[ConformanceCase, Any, np.random.Generator], None]) -> Check:
    """A check that the plugin gives that defines the kind."""

    def required(case: Case) -> None:
        try:
            run(case.inputs, case.config, np.random.default_rng(0))
        except AssertionError as error:
            raise CheckFailed(str(error)) from error

    about = " ".join(inspect.cleandoc(run.__doc__ or "").split())
    return Check(run.__name__, about, (), False, required)


def check(
    component: type[Component], only: Collection[str] = (), cases: ConformanceCases | None = None
) -> list[Result]:
    """One result for each check of the component's kind; a check fails where it fails for one of the `examples`.

    `only` names some of the checks. `cases` are inputs for them; None takes those of the installed plugins.
    """
    if cases is None:
        cases = Plugins.discover().conformance_cases()
    inputs = cases.of(component)
    tried, broken = _cases(component, inputs)
    results = []
    for entry in [*checks_of(component.kind), *map(_of_plugin, inputs.checks or ())]:
        if only and entry.name not in only:
            continue
        if entry.once:
            outcomes = [_outcome(entry, component, component)]
        elif broken:
            outcomes = [("skipped", "the check `options` failed")]
        else:
            outcomes = [_outcome(entry, case, component) for case in tried]
        status, message = next(
            (item for preferred in ("failed", "ok", "skipped") for item in outcomes if item[0] == preferred),
            ("skipped", ""),
        )
        results.append(Result(component.kind, component.name, entry.name, entry.about, status, message))
    return results


def assert_conforms(component: type[Component], cases: ConformanceCases | None = None) -> None:
    """Raises AssertionError with every check that failed and what to fix; `cases` as `check` takes them."""
    failed = [result for result in check(component, cases=cases) if result.status == "failed"]
    assert not failed, "\n".join(f"{r.kind} {r.name}: {r.check}: {r.message}" for r in failed)


def validate_options(cls: type[Component], options: Mapping[str, Any]) -> ComponentConfig:
    """Options as a recipe gives them; components among them are those that are installed. Raises `ValidationError`."""
    config: ComponentConfig = cls.Config.model_validate_json(json.dumps(options), context=Context(_installed()))
    return config


@cache
def _installed() -> Registry:
    return Registry.discover()


def _cases(cls: type[Component], inputs: ConformanceCase) -> tuple[list[Case], bool]:
    cases = []
    for options in cls.examples:
        try:
            config = validate_options(cls, options)
        except (ValidationError, TypeError, ValueError):
            return [], True
        cases.append(Case(cls, config, dict(options), inputs))
    return cases, not cases


def _outcome(entry: Check, subject: Any, cls: type[Component]) -> tuple[Status, str]:
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _process_untouched():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            entry.run(subject)
    except CheckFailed as error:
        return "failed", f"{error}{_notes_of(error)}{_example_note(subject, cls)}"
    except NotApplicable as error:
        return "skipped", str(error)
    except NotImplementedError as error:
        return "failed", f"{error or 'NotImplementedError'}: write it{_example_note(subject, cls)}"
    except Exception as error:
        where = _blame(traceback.extract_tb(error.__traceback__), cls)
        text = f"{type(error).__name__}: {error}{where}{_notes_of(error)}{_hint(error, cls)}"
        return "failed", f"{text}{_example_note(subject, cls)}"
    finally:
        torch.set_num_threads(threads)
    return "ok", ""


@contextmanager
def _process_untouched() -> Iterator[None]:
    """Restores state of the process, and raises `CheckFailed` if a component has changed it."""

    def state() -> dict[str, Any]:
        return {
            "whether gradients are recorded": torch.is_grad_enabled(),
            "torch's default dtype": torch.get_default_dtype(),
            "whether torch must be deterministic": torch.are_deterministic_algorithms_enabled(),
            "the working directory": os.getcwd(),
        }

    original = state()
    try:
        yield
        changed = [what for what, value in state().items() if value != original[what]]
        require(not changed, f"it changes {', '.join(changed)} of the whole process: restore it")
    finally:
        torch.set_grad_enabled(original["whether gradients are recorded"])
        torch.set_default_dtype(original["torch's default dtype"])
        torch.use_deterministic_algorithms(original["whether torch must be deterministic"])
        os.chdir(original["the working directory"])


def _notes_of(error: Exception) -> str:
    notes = getattr(error, "__notes__", ())
    return f" ({'; '.join(notes)})" if notes else ""


def _example_note(subject: Any, cls: type[Component]) -> str:
    several = isinstance(subject, Case) and len(cls.examples) > 1
    return f" (with the example {json.dumps(subject.options)})" if several else ""


def _blame(frames: Iterable[traceback.FrameSummary], cls: type[Component]) -> str:
    """The last line of the component's package in the traceback."""
    package = Path(inspect.getfile(cls)).parent
    frames_of_package = [frame for frame in frames if Path(frame.filename).is_relative_to(package)]
    return f" ({Path(frames_of_package[-1].filename).name}:{frames_of_package[-1].lineno})" if frames_of_package else ""


def _hint(error: Exception, cls: type[Component]) -> str:
    if cls.kind in ("fusion", "loss") and isinstance(error, KeyError | IndexError | AttributeError | TypeError):
        return ". The inputs hold only what `needs` names: add what the component reads"
    return ""
