"""What `distill check-plugin` feeds the losses of masked tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_core import ConformanceCase, Plan
from distill_flava.fusion import MultimodalEncoder, MultimodalEncoderConfig
from distill_flava.losses import (
    MaskedImage,
    MaskedImageConfig,
    MaskedLanguage,
    MaskedLanguageConfig,
    MaskedMultimodal,
    MaskedMultimodalConfig,
)


def ids(config: MaskedLanguageConfig | MaskedMultimodalConfig, modality: str, token_mask: Tensor) -> Tensor:
    """An id for each token."""
    return torch.arange(token_mask.numel(), device=token_mask.device).view_as(token_mask)


def pixels(config: MaskedImageConfig | MaskedMultimodalConfig, modality: str, token_mask: Tensor) -> Tensor:
    """The pixels of each patch."""
    return torch.randn(*token_mask.shape, 3 * config.patch**2, generator=torch.Generator().manual_seed(0))


def pixels_and_ids(config: MaskedMultimodalConfig, modality: str, token_mask: Tensor) -> Tensor:
    """Pixels of the first modality, ids of the second."""
    return (pixels if modality == config.modalities[0] else ids)(config, modality, token_mask)


def encoder(config: MaskedMultimodalConfig, plan: Plan) -> MultimodalEncoder:
    """The fusion that it works with, over the masked views."""
    small = MultimodalEncoderConfig(modalities=config.modalities, role=config.role, layers=1, heads=2)
    return MultimodalEncoder(small, plan)


CASES = [
    ConformanceCase(MaskedLanguage, targets=ids),
    ConformanceCase(MaskedImage, targets=pixels),
    ConformanceCase(MaskedMultimodal, targets=pixels_and_ids, fusion=encoder),
]
