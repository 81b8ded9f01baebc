"""What vision-language methods share: towers in the CLIP layout, tokenizer, reading of pictures and captions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from distill_core import hookimpl

if TYPE_CHECKING:
    from distill_core.doctor import Diagnostic

distill_api = 1


@hookimpl
def distill_components() -> list[type]:
    """The towers."""
    from distill_towers.clip_text import ClipText
    from distill_towers.masked_text import BertText
    from distill_towers.vit import VisionTransformer

    return [VisionTransformer, ClipText, BertText]


@hookimpl
def distill_commands() -> list[click.Command]:
    """`distill kernels`."""
    from distill_towers.commands import kernels

    return [kernels]


@hookimpl
def distill_diagnostics() -> list[Diagnostic]:
    """Kernel backends, and why not the others."""
    from distill_towers.diagnostics import kernels

    return kernels()
