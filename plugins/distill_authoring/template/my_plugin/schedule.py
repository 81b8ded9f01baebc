"""A number over a run: the learning rate's factor, the weight of a loss, ..."""

from typing import Annotated

from pydantic import Field

from distill_core import ComponentConfig, Schedule


class LinearConfig(ComponentConfig):
    """Options of `my_plugin_linear`."""

    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The value that the line would reach at the end of the run."""


class Linear(Schedule):
    """A line from 1 down to `final`."""

    name = "my_plugin_linear"
    Config = LinearConfig

    def value(self, progress):
        """The value at a step, of which `progress` knows the number (from 0) and how many there are."""
        return 1 - (1 - self.config.final) * progress.fraction
