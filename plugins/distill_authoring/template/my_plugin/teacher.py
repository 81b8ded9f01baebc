"""A teacher that follows the student in its own way."""

from typing import Annotated

import torch
from pydantic import Field

from distill_core import CopiedTeacher, CopyConfig


class AverageConfig(CopyConfig):
    """Options of `my_plugin_average`."""

    after: Annotated[int, Field(ge=0)] = 0
    """Steps that do not count."""


class Average(CopiedTeacher):
    """The mean of the students after each step from `after` on (stochastic weight averaging, Izmailov et al. 2018)."""

    name = "my_plugin_average"
    Config = AverageConfig

    def __init__(self, config, name, plan, student):
        super().__init__(config, name, plan, student)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def after_step(self, progress, finite=None):
        """teacher += (student - teacher) / n, of n students; nothing where the step was not finite."""
        if progress.step >= self.config.after:
            self.count += 1 if finite is None else finite
            self.follow(1 / (progress.step - self.config.after + 1), finite)
