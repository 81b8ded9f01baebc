"""Checks that every component must pass; a failure says what to fix. `distill check-plugin` runs them; in a test:

from distill_authoring.conformance import assert_conforms

@pytest.mark.parametrize("component", [MyFusion, MyLoss])
def test_conforms(component):
    assert_conforms(component)

A component is built with each of its `examples`, and called with small inputs that hold what its `needs` names.
"""

from __future__ import annotations

from distill_authoring.conformance.suite import Result, assert_conforms, check, checks_of

__all__ = ["Result", "assert_conforms", "check", "checks_of"]
