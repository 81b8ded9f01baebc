"""COSMOS: cross-modality self-distillation for vision-language pre-training (arXiv 2412.01814, CVPR 2025).

Read cosmos.py first.
"""

import click

from distill_core import hookimpl

distill_api = 1


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
