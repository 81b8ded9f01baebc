"""Loads weights (open_clip, OpenAI, Hugging Face, timm's ViTs), exports them (open_clip, HF, ONNX), averages runs."""

import click

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """Weights of other libraries to start from."""
    from distill_weights.initializers import HfClip, HfSiglip, OpenClip, TimmVit

    return [OpenClip, HfClip, HfSiglip, TimmVit]


@hookimpl
def distill_commands() -> list[click.Command]:
    """`distill export`, `distill average`."""
    from distill_weights.commands import average, export

    return [average, export]
