"""Views of several modalities at once, where those of one depend on another's."""

from typing import Annotated

from pydantic import Field

from distill_core import ComponentConfig, JointAugmentation, View


class SharedGapConfig(ComponentConfig):
    """Options of `my_plugin_shared_gap`."""

    share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Part of each signal that is silent."""


class SharedGap(JointAugmentation):
    """The modalities' own views, with the same stretch silent in all of a sample's."""

    name = "my_plugin_shared_gap"
    Config = SharedGapConfig

    def train_views(self, sample, own, rng):
        """`own` makes the views of a modality's own augmentation, which are not changed in place."""
        start = (1 - self.config.share) * rng.random()
        return {name: [self.silenced(view, start) for view in own(name)] for name in self.parts}

    def silenced(self, view, start):
        """A copy of the view; `start` is a part of its length."""
        data, length = view.data.clone(), len(view.data)
        data[round(start * length) : round((start + self.config.share) * length)] = 0
        return View(data, view.role, extra=view.extra)
