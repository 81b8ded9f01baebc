"""Weights of losses that are learned, or follow a rule, in place of constants."""

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """The balances `uncertainty` and `equal_magnitude`."""
    from distill_balance.components import EqualMagnitude, Uncertainty

    return [Uncertainty, EqualMagnitude]
