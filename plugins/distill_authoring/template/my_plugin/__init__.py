"""A plugin of distill. Keep this module light: `distill --help` imports it; components are imported inside the hook."""

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_components():
    """One component of each kind."""
    from my_plugin.balance import Random
    from my_plugin.data import Waves
    from my_plugin.fusion import MeanFusion
    from my_plugin.head import Projection
    from my_plugin.hook import Noise
    from my_plugin.joint import SharedGap
    from my_plugin.loss import Match
    from my_plugin.mask import Window
    from my_plugin.optimizer import Sgd
    from my_plugin.schedule import Linear
    from my_plugin.task import Agreement
    from my_plugin.teacher import Average
    from my_plugin.tower import Tower
    from my_plugin.tracker import Csv
    from my_plugin.views import Noisy
    from my_plugin.weights import Zeros

    method = [Noisy, SharedGap, Tower, Window, MeanFusion, Projection, Match, Average]
    return [*method, Waves, Agreement, Sgd, Linear, Noise, Random, Csv, Zeros]


@hookimpl
def distill_conformance_cases():
    """What `distill check-plugin` feeds them."""
    from my_plugin.cases import CASES

    return CASES
