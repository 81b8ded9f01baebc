"""COSMOS: cross-modality self-distillation for vision-language pre-training (arXiv 2412.01814, CVPR 2025)."""

import click

from distill_core import hookimpl

distill_api = 1


@hookimpl
def distill_components() -> list[type]:
    """Views, fusions, the two losses (InfoNCE or sigmoid), and public checkpoints to start from."""
    from distill_cosmos.fusion import CrossAttention, GatedCrossAttention, Identity, MeanPooling
    from distill_cosmos.losses import Contrastive, CrossModalDistillation
    from distill_cosmos.multi_crop import MultiCrop
    from distill_cosmos.official import PublicCheckpoint
    from distill_cosmos.q_former import QFormer
    from distill_cosmos.sigmoid import SigmoidContrastive, SigmoidDistillation
    from distill_cosmos.text_crop import TextCrop
    from distill_cosmos.text_views import MaskedText, SentenceCrop, WordDropout

    return [
        MultiCrop, TextCrop, MaskedText, SentenceCrop, WordDropout,
        CrossAttention, GatedCrossAttention, QFormer, MeanPooling, Identity,
        Contrastive, CrossModalDistillation, SigmoidContrastive, SigmoidDistillation, PublicCheckpoint,
    ]  # fmt: skip


@hookimpl
def distill_commands() -> list[click.Command]:
    """`distill bench`."""
    from distill_cosmos.commands import bench

    return [bench]
