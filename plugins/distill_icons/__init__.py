"""A larger set of drawings: icons of seven npm packages, with their names and tags, and scenes made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_core import hookimpl

if TYPE_CHECKING:
    from distill_core import Component, Diagnostic

distill_api = 2


@hookimpl
def distill_components() -> list[type[Component]]:
    """The components of this plugin."""
    from distill_icons.scenes import IconScenes
    from distill_icons.source import IconsSource

    return [IconsSource, IconScenes]


@hookimpl
def distill_diagnostics() -> list[Diagnostic]:
    """The packages that the icons come from, and the cached shards."""
    from distill_icons.source import diagnostics

    return diagnostics()
