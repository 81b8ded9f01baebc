"""distill: a composable plugin framework for multimodal self-distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from distill_core.model import Model

__version__ = "0.1.0"

API_VERSION = 1
"""The version of the hooks and interfaces. A plugin states the one it was written for as `distill_api = 1`."""

hookimpl = pluggy.HookimplMarker("distill")
"""Marks a plugin's implementation of a hook of `distill_core.hookspecs`."""


def load(run: str, *, teacher: bool = False, checkpoint: str = "last", device: str = "cpu") -> Model:
    """The trained model of a run folder, ready to encode.

    `checkpoint` is `last`, `best`, or a step's number. Raises `distill_core.errors.UserError` with one line when the
    folder is not a run, has no such checkpoint, or trained no teacher.
    """
    from distill_core.run.load import load_model

    return load_model(run, teacher=teacher, checkpoint=checkpoint, device=device)


def __getattr__(name: str) -> Any:
    if name in ("Augmentation", "Backbone", "FusionHead", "Loss"):
        from distill_core import interfaces as components

        return getattr(components, name)
    raise AttributeError(f"module 'distill_core' has no attribute {name!r}")
