"""A small model of pictures and captions that has learned nothing, for conformance cases and tests."""

from __future__ import annotations

import numpy as np
import torch

from distill_core import GLOBAL, Augmentation, ComponentConfig, Model, Sample, View
from distill_vl.captions import CaptionAugmentation, CaptionConfig
from distill_vl.clip_text import ClipText, ClipTextConfig
from distill_vl.pictures import PictureAugmentation, PictureConfig
from distill_vl.vit import VisionTransformer, VisionTransformerConfig

SIZE = 16
"""Pixels of a picture's side."""


class Whole(PictureAugmentation):
    """The picture as it is."""

    name = "whole"

    @classmethod
    def roles(cls, config: ComponentConfig) -> tuple[str, ...]:
        return (GLOBAL,)

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        return [self.eval_view(self.decode(sample)[0])]


class Words(CaptionAugmentation):
    """The caption as it is."""

    name = "words"

    @classmethod
    def roles(cls, config: ComponentConfig) -> tuple[str, ...]:
        return (GLOBAL,)

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        return [self.eval_view(self.decode(sample)[0])]


def model(seed: int = 0) -> Model:
    """A ViT of two layers on 16 px in patches of 4, and a text tower of one."""
    image = VisionTransformerConfig(image_size=SIZE, patch=4, width=32, layers=2, heads=2, dim=24)
    text = ClipTextConfig(width=32, layers=1, heads=2, dim=24, padding="longest")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbones = {"image": VisionTransformer(image), "text": ClipText(text)}
    augment: dict[str, Augmentation] = {"image": Whole(PictureConfig(size=SIZE)), "text": Words(CaptionConfig())}
    collators = {"image": VisionTransformer.collator(image), "text": ClipText.collator(text)}
    return Model(backbones, augment, collators, batch_size=8)
