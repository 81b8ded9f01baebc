"""What training starts from."""

import torch

from distill_core import ComponentConfig, LoadReport, UserError, WeightLoader


class ZerosConfig(ComponentConfig):
    """Options of `my_plugin_zeros`."""

    to: str = "backbone"
    """Path of the part that starts at zero, as `backbone.left.project`."""


class Zeros(WeightLoader):
    """All of one part is zero."""

    name = "my_plugin_zeros"
    Config = ZerosConfig

    def apply(self, objective):
        """Says what it has loaded, and changes nothing where it cannot."""
        own, start = objective.state_dict(), f"{self.config.to}."
        state = {name: torch.zeros_like(value) for name, value in own.items() if name.startswith(start)}
        if not state:
            raise UserError(f"my_plugin_zeros: {self.config.to!r} names no part of the model")
        objective.load_state_dict(state, strict=False)
        return LoadReport(f"{self.config.to}: {len(state)} tensors of zeros", frozenset(state))
