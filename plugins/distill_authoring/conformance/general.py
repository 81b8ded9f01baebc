"""Checks of every component: documentation, options, and what it says of a recipe."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from distill_authoring.conformance.suite import Case, CheckFailed, checks, require
from distill_core import GLOBAL, BackboneSpec, ComponentConfig, LossConfig, MissingModality, ModalityPlan, Needs, Plan


@checks(once=True)
def documented(cls: Any) -> None:
    """The class and each option have a docstring of their own: `distill plugins NAME` prints them."""
    require(vars(cls).get("__doc__"), f"write a docstring for the class {cls.__name__}: what it computes")
    bare = [field.alias or name for name, field in cls.Config.model_fields.items() if not field.description]
    require(not bare, f'write a docstring ("""...""" on the line below) for the option(s) {", ".join(bare)}')


@checks(once=True)
def options(cls: Any) -> None:
    """Options are strict, have defaults or `examples`, and a resolved recipe loads again."""
    kept = ComponentConfig.model_config
    loose = [key for key in ("extra", "frozen", "strict") if cls.Config.model_config.get(key) != kept[key]]
    require(not loose, f"{cls.Config.__name__} changes {', '.join(loose)} of model_config: leave them as they are")
    require(cls.kind != "loss" or issubclass(cls.Config, LossConfig), "a loss's Config must extend LossConfig")
    require(cls.examples, "`examples` is empty; leave it out for the defaults")
    for example in cls.examples:
        try:
            config = cls.Config.model_validate_json(json.dumps(example))
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)]
            raise CheckFailed(
                f"the example {json.dumps(example)} is refused: {'; '.join(lines)}. Give such options as the class "
                f"attribute `examples = ({{...}},)` of {cls.__name__}"
            ) from error
        dumped = config.model_dump(mode="json", by_alias=True)
        try:
            again = cls.Config.model_validate_json(json.dumps(dumped))
        except (ValidationError, ValueError) as error:
            raise CheckFailed(
                f"the options written out, {dumped}, are refused, so no run could resume: {error}"
            ) from error
        require(again == config, f"the options written out, {dumped}, load as something else")


@checks(once=True)
def named(cls: Any) -> None:
    """The name is a word that recipes, paths and scores can hold."""
    require(
        re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", cls.name),
        f"the name {cls.name!r} must be a word of letters, digits, - and _",
    )


@checks()
def needs_and_problems(case: Case) -> None:
    """`needs` and `problems` answer for recipes that lack things: with lines, or with MissingModality."""
    bare = ModalityPlan((GLOBAL,), (), BackboneSpec(24, 16, has_tokens=False))
    lacking = {
        "no modality": Plan({}, False, False),
        "one modality without tokens or teacher": Plan({"other": bare}, False, False),
        "a teacher that sees nothing": Plan({"other": bare, "another": bare}, True, True),
    }
    for what, plan in lacking.items():
        for ask in (case.cls.needs, case.cls.problems):
            try:
                answer = ask(case.config, plan)
                if ask == case.cls.needs:
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
                    f"`{ask.__name__}` raises {type(error).__name__}: {error} on a plan with {what}; it is asked about "
                    "recipes that are wrong, too"
                ) from error


@checks()
def pickled_options(case: Case) -> None:
    """The options go to other processes."""
    require(pickle.loads(pickle.dumps(case.config)) == case.config, "the options change when they are pickled")
