"""The embedded default data: emoji in two or three art styles, with sentences made of people's words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_core import hookimpl

if TYPE_CHECKING:
    from distill_core import Component, Diagnostic

distill_api = 2


@hookimpl
def distill_components() -> list[type[Component]]:
    """The components of this plugin."""
    from distill_emoji.scenes import EmojiScenes
    from distill_emoji.source import EmojiSource

    return [EmojiSource, EmojiScenes]


@hookimpl
def distill_diagnostics() -> list[Diagnostic]:
    """The packages that the pictures and sentences come from, the font of the third style, and the cached shards."""
    from distill_emoji.source import diagnostics

    return diagnostics()
