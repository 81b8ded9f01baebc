"""A teacher as a stranger's package has it, from the public surface alone: the mean of all students so far."""

import torch

from distill_core import CopiedTeacher, CopyConfig, hookimpl

distill_api = 1


class UniformConfig(CopyConfig):
    """The mean of the students after each step."""

    after: int = 0
    """Steps that do not count."""


class Uniform(CopiedTeacher):
    """teacher = mean of the student after each step from `after` on (stochastic weight averaging)."""

    name = "uniform"
    Config = UniformConfig

    def __init__(self, config, name, plan, student):
        super().__init__(config, name, plan, student)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def after_step(self, progress, finite=None):
        if progress.step >= self.config.after:
            self.count += 1 if finite is None else finite
            self.follow(1 / (progress.step - self.config.after + 1), finite)


@hookimpl
def distill_components():
    return [Uniform]
