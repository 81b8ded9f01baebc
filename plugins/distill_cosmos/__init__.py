"""COSMOS: cross-modality self-distillation for vision-language pre-training (arXiv 2412.01814, CVPR 2025).

Read cosmos.py first. The fusion and the losses can be imported from here, for loops of your own (docs/outside.md);
they are loaded when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from distill_core import hookimpl

if TYPE_CHECKING:
    from distill_cosmos.fusion import CrossAttention as CrossAttention
    from distill_cosmos.losses import CrossModalDistillation as CrossModalDistillation
    from distill_cosmos.sigmoid import SigmoidContrastive as SigmoidContrastive
    from distill_cosmos.sigmoid import SigmoidDistillation as SigmoidDistillation
    from distill_vl.contrastive import Contrastive as Contrastive

distill_api = 2

HOMES = {
    "Contrastive": "distill_vl.contrastive",
    "CrossAttention": "distill_cosmos.fusion",
    "CrossModalDistillation": "distill_cosmos.losses",
    "SigmoidContrastive": "distill_cosmos.sigmoid",
    "SigmoidDistillation": "distill_cosmos.sigmoid",
}
"""Each name for loops of your own -> the module that defines it."""


@hookimpl
def distill_components() -> list[type]:
    """Text crops, the fusion, the distillation (InfoNCE or sigmoid), and public checkpoints to start from."""
    from distill_cosmos.fusion import CrossAttention
    from distill_cosmos.losses import CrossModalDistillation
    from distill_cosmos.official import PublicCheckpoint
    from distill_cosmos.sigmoid import SigmoidContrastive, SigmoidDistillation
    from distill_cosmos.text_crop import TextCrop

    return [TextCrop, CrossAttention, CrossModalDistillation, SigmoidContrastive, SigmoidDistillation, PublicCheckpoint]


@hookimpl
def distill_commands() -> list[click.Command]:
    """`distill bench`."""
    from distill_cosmos.commands import bench

    return [bench]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'distill_cosmos' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
