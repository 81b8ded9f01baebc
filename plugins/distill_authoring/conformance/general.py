"""Checks of every component: documentation, options, and its `needs` and `problems`."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from distill_authoring.conformance.suite import Case, CheckFailed, checks, require, validate_options
from distill_core import (
    DEFAULT_TEACHER,
    GLOBAL,
    BackboneSpec,
    ComponentConfig,
    LossConfig,
    MissingModality,
    ModalityPlan,
    Needs,
    Plan,
    TeacherPlan,
)
from distill_core.tools import option_message


@checks(once=True)
def documented(cls: Any) -> None:
    """The class and each option have a docstring, which `distill plugins NAME` prints."""
    require(vars(cls).get("__doc__"), f"write a docstring for the class {cls.__name__}: what it computes")
    undocumented = [field.alias or name for name, field in cls.Config.model_fields.items() if not field.description]
    require(
        not undocumented, f'write a docstring ("""...""" on the line below) for the option(s) {", ".join(undocumented)}'
    )


@checks(once=True)
def options(cls: Any) -> None:
    """Options are strict, have defaults or `examples`, and a resolved recipe loads again."""
    required = ComponentConfig.model_config
    changed = [key for key in ("extra", "frozen", "strict") if cls.Config.model_config.get(key) != required[key]]
    require(not changed, f"{cls.Config.__name__} changes {', '.join(changed)} of model_config: leave them unchanged")
    require(cls.kind != "loss" or issubclass(cls.Config, LossConfig), "a loss's Config must extend LossConfig")
    require(cls.examples, "`examples` is empty; omit it to use the defaults")
    for example in cls.examples:
        try:
            config = validate_options(cls, example)
        except ValidationError as error:
            lines = [
                f"{'.'.join(map(str, item['loc']))}: {option_message(item)}" for item in error.errors(include_url=False)
            ]
            raise CheckFailed(
                f"the example {json.dumps(example)} is refused: {'; '.join(lines)}. Give valid options in the class "
                f"attribute `examples = ({{...}},)` of {cls.__name__}"
            ) from error
        dumped = config.model_dump(mode="json", by_alias=True)
        try:
            reloaded = validate_options(cls, dumped)
        except (ValidationError, ValueError) as error:
            raise CheckFailed(
                f"the options written out, {dumped}, are refused, so no run could resume: {error}"
            ) from error
        require(reloaded == config, f"the options written out, {dumped}, load as different options")


@checks(once=True)
def named(cls: Any) -> None:
    """The name is a word that can be used in recipes, paths and scores."""
    require(
        re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", cls.name),
        f"the name {cls.name!r} must be a word of letters, digits, - and _",
    )


@checks()
def needs_and_problems(case: Case) -> None:
    """`needs` and `problems` accept plans that lack things: they return, or raise MissingModality."""
    bare_modality = ModalityPlan((GLOBAL,), BackboneSpec(24, 16, has_tokens=False))
    plans = {
        "no modality": Plan({}),
        "one modality without tokens or teacher": Plan({"other": bare_modality}),
        "a teacher that sees nothing": Plan(
            {"other": bare_modality, "another": bare_modality}, {DEFAULT_TEACHER: TeacherPlan({})}, True
        ),
    }
    for what, plan in plans.items():
        for method in (case.cls.needs, case.cls.problems):
            try:
                answer = method(case.config, plan)
                if method == case.cls.needs:
                    require(isinstance(answer, Needs), f"`needs` must return Needs(...), not {type(answer).__name__}")
                else:
                    require(
                        isinstance(answer, Iterable) and not isinstance(answer, str), "`problems` must return strings"
                    )
                    lines = list(answer)
                    require(all(isinstance(line, str) for line in lines), "`problems` must return strings")
            except MissingModality:
                continue
            except CheckFailed:
                raise
            except Exception as error:
                raise CheckFailed(
                    f"`{method.__name__}` raises {type(error).__name__}: {error} on a plan with {what}; it is also "
                    "called for invalid recipes"
                ) from error


@checks()
def pickled_options(case: Case) -> None:
    """The options can be pickled, for other processes."""
    require(pickle.loads(pickle.dumps(case.config)) == case.config, "the options change when they are pickled")
