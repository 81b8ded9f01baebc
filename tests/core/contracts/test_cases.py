"""What a component is checked with: its own case, completed by those of its bases; a hook of plugins."""

from types import SimpleNamespace
from typing import Any

import pytest

from distill_core import hookimpl
from distill_core.contracts.cases import ConformanceCase, ConformanceCases
from distill_core.contracts.component import Component
from distill_core.errors import PluginError, UserError
from distill_core.registry import Plugins


class Base(Component):
    """A base that several share."""


class Own(Base):
    """A component with a case of its own."""


class Further(Own):
    """A component without one."""


def of_base(*arguments: Any) -> Any:
    return "base"


def of_own(*arguments: Any) -> Any:
    return "own"


def plugin(*cases: ConformanceCase) -> Any:
    return SimpleNamespace(distill_conformance_cases=hookimpl(lambda: list(cases)))


def test_a_case_is_completed_by_those_of_the_bases() -> None:
    """Would catch a subclass without inputs, a base's that win over its own, and one that hides a base's other."""
    plugins = Plugins()
    plugins.add("bases", plugin(ConformanceCase(Base, sample=of_base, views=of_base)), "one")
    plugins.add("own", plugin(ConformanceCase(Own, views=of_own)), "other")
    cases = plugins.conformance_cases()
    for cls in (Own, Further):
        case = cases.of(cls)
        assert (case.component, case.sample, case.views, case.targets) == (cls, of_base, of_own, None)
    assert cases.of(Base).views is of_base
    assert cases.of(Component) == ConformanceCase(Component)


def test_two_cases_of_one_component_are_refused() -> None:
    """Would catch one that silently takes the other's place."""
    with pytest.raises(UserError, match=r"two cases of .*test_cases\.Own; give one"):
        ConformanceCases([ConformanceCase(Own, views=of_own), ConformanceCase(Own, views=of_base)])


def test_a_hook_that_fails_names_its_package() -> None:
    def fail() -> list[ConformanceCase]:
        raise ImportError("no module of that name")

    plugins = Plugins()
    plugins.add("broken", SimpleNamespace(distill_conformance_cases=hookimpl(fail)), "its-package")
    with pytest.raises(PluginError, match=r"plugin 'broken' \(package its-package\) fails to import its"):
        plugins.conformance_cases()
