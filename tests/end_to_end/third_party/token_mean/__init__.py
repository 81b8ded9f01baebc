"""A fusion, a loss and a task from outside: what a stranger's plugin looks like."""

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_components():
    from token_mean.components import Agreement, TokenMean, Uniformity

    return [TokenMean, Agreement, Uniformity]
