"""Something around each training step."""

from typing import Annotated

import torch
from pydantic import Field

from distill_core import ComponentConfig, Hook


class NoiseConfig(ComponentConfig):
    """Options of `my_plugin_noise`."""

    size: Annotated[float, Field(ge=0)] = 0.01
    """Deviation of the noise at the first step; it falls with the square root of the steps."""


class Noise(Hook):
    """Gaussian noise on the gradients (Neelakantan et al. 2015)."""

    name = "my_plugin_noise"
    Config = NoiseConfig

    def gradients(self, computation, compute):
        """Those of the total, and noise that depends on the step alone."""
        losses = compute()
        step = computation.progress.step
        draw = torch.Generator().manual_seed(step)
        for _, parameter in computation.parameters:
            if parameter.grad is not None:
                noise = torch.randn(parameter.shape, generator=draw).to(parameter.grad)
                parameter.grad.add_(self.config.size * (1 + step) ** -0.5 * noise)
        return losses
