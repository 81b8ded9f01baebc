"""Aim as a tracker: runs go to a local repository beside the run folders; look at it with `distill ui`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from distill_core import hookimpl

if TYPE_CHECKING:
    from distill_core import Diagnostic

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """The tracker."""
    from distill_aim.tracker import AimTracker

    return [AimTracker]


@hookimpl
def distill_commands() -> list[click.Command]:
    """`distill ui`."""
    from distill_aim.commands import ui

    return [ui]


@hookimpl
def distill_diagnostics() -> list[Diagnostic]:
    """Whether Aim is there."""
    from distill_core import Diagnostic
    from distill_core.tools import installed

    release = installed("aim")
    missing = "runs need --set tracking=null, or pip install aim"
    return [Diagnostic("tracking", "aim", release or "not installed", "" if release else missing)]
