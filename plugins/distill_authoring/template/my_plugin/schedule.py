"""The learning rate over a run."""

from typing import Annotated

from pydantic import Field

from distill_core import ComponentConfig, Schedule


class LinearConfig(ComponentConfig):
    """Options of `my_plugin_linear`."""

    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The factor that the line would reach at the end of the run."""


class Linear(Schedule):
    """A line from 1 down to `final`."""

    name = "my_plugin_linear"
    Config = LinearConfig

    def factor(self, step, steps):
        """Factor of the learning rate at a step (from 0)."""
        return 1 - (1 - self.config.final) * step / steps
