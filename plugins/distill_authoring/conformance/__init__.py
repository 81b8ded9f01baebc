"""What every component has to keep, as checks that say what to fix. `distill check-plugin` runs them; in a test:

from distill_authoring.conformance import assert_conforms

@pytest.mark.parametrize("component", [MyFusion, MyLoss])
def test_conforms(component):
    assert_conforms(component)

A component is built with each of its `examples` and given small inputs made from what its `needs` asks for.
"""

from __future__ import annotations

from distill_authoring.conformance.suite import Result, assert_conforms, check, checks_of

__all__ = ["Result", "assert_conforms", "check", "checks_of"]
