"""What vision-language methods share: views, towers, tokenizer, captions, masks, heads, and contrastive losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from distill_core import hookimpl

if TYPE_CHECKING:
    from distill_core import ConformanceCase, Diagnostic

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """Views of images and captions, readers of captions, a masker, towers, decoders of text, and losses."""
    from distill_vl.caption import WholeCaption
    from distill_vl.caption_aware_flips import CaptionAwareFlips
    from distill_vl.caption_readers import READERS
    from distill_vl.captioning import Captioning
    from distill_vl.clip_text import ClipText
    from distill_vl.contrastive import Contrastive, PairedContrastive
    from distill_vl.decoders import CaptionDecoder, PrefixDecoder
    from distill_vl.masked_text import BertText
    from distill_vl.maskers import RandomDrop
    from distill_vl.multi_crop import MultiCrop
    from distill_vl.random_crop import RandomCrop
    from distill_vl.region_crops import RegionCrops
    from distill_vl.vit import VisionTransformer

    views = [MultiCrop, RandomCrop, WholeCaption, CaptionAwareFlips, RegionCrops, RandomDrop]
    towers = [VisionTransformer, ClipText, BertText]
    losses = [Contrastive, PairedContrastive, Captioning]
    return [*views, *towers, CaptionDecoder, PrefixDecoder, *losses, *READERS]


@hookimpl
def distill_conformance_cases() -> list[ConformanceCase]:
    """What `distill check-plugin` feeds them."""
    from distill_vl.cases import CASES

    return CASES


@hookimpl
def distill_commands() -> list[click.Command]:
    """`distill kernels`, `distill bench data`."""
    from distill_vl.commands import bench, kernels

    return [kernels, bench]


@hookimpl
def distill_diagnostics() -> list[Diagnostic]:
    """Kernel backends, and why not the others."""
    from distill_vl.diagnostics import kernels

    return kernels()
