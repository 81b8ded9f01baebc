"""Every component of every installed plugin conforms."""

import pytest

from distill_core.conformance import assert_conforms
from distill_core.registry import Entry, Registry

ENTRIES = sorted(Registry.discover().entries.values(), key=lambda entry: (entry.plugin, entry.cls.kind, entry.cls.name))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.plugin}-{entry.cls.kind}-{entry.cls.name}")
def test_component_conforms(entry: Entry) -> None:
    """Whatever a third party's component is held to, the built-in ones keep; plugins that are installed beside, too."""
    assert_conforms(entry.cls)
