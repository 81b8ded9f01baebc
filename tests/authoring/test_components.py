"""Every component of every installed plugin conforms, and so do the packages that stand for a third party's."""

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from distill_authoring.conformance import assert_conforms
from distill_core.registry import Entry, Plugins, Registry

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PLUGINS = Plugins.discover()
CASES = PLUGINS.conformance_cases()
ENTRIES = sorted(
    Registry.discover(PLUGINS).entries.values(), key=lambda entry: (entry.plugin, entry.cls.kind, entry.cls.name)
)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.plugin}-{entry.cls.kind}-{entry.cls.name}")
def test_component_conforms(entry: Entry) -> None:
    """Whatever a third party's component is held to, the built-in ones keep; plugins that are installed beside, too."""
    assert_conforms(entry.cls, CASES)


def name_of(project: Path) -> str:
    found: str = tomllib.loads((project / "pyproject.toml").read_text())["project"]["name"]
    return found


@pytest.mark.parametrize(
    ("project", "kinds"),
    [("docs/example_plugin", {"fusion", "loss"}), ("tests/end_to_end/third_party", {"fusion", "loss", "task"})],
)
def test_packages_from_outside_conform(
    project: str,
    kinds: set[str],
    tmp_path: Path,
    install_plugin: Callable[[Path, Path], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Would catch a check that asks more than the shortest honest plugin gives."""
    known = {entry.package for entry in ENTRIES} - {name_of(ROOT / project)}  # it may be installed, too
    monkeypatch.syspath_prepend(install_plugin(ROOT / project, tmp_path / "site"))
    new = [entry for entry in Registry.discover().entries.values() if entry.package not in known]
    assert {entry.cls.kind for entry in new} == kinds
    for entry in new:
        assert_conforms(entry.cls)
