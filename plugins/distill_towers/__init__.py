"""What vision-language methods share: towers in the CLIP layout, tokenizer, reading of pictures and captions."""

import click

from distill_core import hookimpl

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
