"""The hooks a plugin may implement. A plugin is a module named by an entry point of the group `distill`:

[project.entry-points.distill]
mine = "my_package"

# my_package/__init__.py: keep it light, import components inside the hook
from distill_core import hookimpl
distill_api = 2

@hookimpl
def distill_components():
    from my_package.fusion import MyFusion
    return [MyFusion]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    import click

    from distill_core.contracts.cases import ConformanceCase
    from distill_core.contracts.component import Component
    from distill_core.contracts.diagnostic import Diagnostic

hookspec = pluggy.HookspecMarker("distill")


@hookspec
def distill_components() -> list[type[Component]]:  # type: ignore[empty-body]
    """The component classes of this plugin; each states its `kind` (by its base class), `name` and `Config`."""


@hookspec
def distill_conformance_cases() -> list[ConformanceCase]:  # type: ignore[empty-body]
    """Inputs that `distill check-plugin` feeds the components: a raw sample of each augmentation, the views of each
    backbone, ... A case serves subclasses, too.
    """


@hookspec
def distill_recipes() -> list[Path]:  # type: ignore[empty-body]
    """Folders of recipes and studies (YAML files, in folders below them too). Commands find each by its file's name
    without `.yaml`, which is unique among all plugins: `distill run NAME`. A wheel must have them as package data.
    """


@hookspec
def distill_commands() -> list[click.Command]:  # type: ignore[empty-body]
    """Further commands of the `distill` command line. Called for `distill --help` too: import nothing heavy."""


@hookspec
def distill_diagnostics() -> list[Diagnostic]:  # type: ignore[empty-body]
    """What `distill doctor` should say of this plugin (a `Diagnostic` a line): what is here, and what is
    wrong. It takes well under a second, and trains, fetches and writes nothing.
    """
