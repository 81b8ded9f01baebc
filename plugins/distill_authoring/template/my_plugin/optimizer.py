"""How parameters move."""

from typing import Annotated

import torch
from pydantic import Field

from distill_core import ComponentConfig, Optimizer


class SgdConfig(ComponentConfig):
    """Options of `my_plugin_sgd`."""

    lr: Annotated[float, Field(gt=0)] = 0.1
    """Peak learning rate; the schedule multiplies it."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the running sum of gradients."""


class Sgd(Optimizer):
    """Gradient descent with momentum."""

    name = "my_plugin_sgd"
    Config = SgdConfig

    def groups(self, parameters):
        """One a learning-rate factor, of (name, parameter, factor)."""
        groups = {}
        for _, parameter, factor in parameters:
            groups.setdefault(factor, []).append(parameter)
        return [{"params": members, "lr": self.config.lr * factor} for factor, members in groups.items()]

    def build(self, groups):
        """Over the groups."""
        return torch.optim.SGD(groups, momentum=self.config.momentum)
