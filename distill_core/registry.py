"""Finds plugins by their entry points and components by (kind, name)."""

from __future__ import annotations

import importlib.metadata
import os
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from distill_core import API_VERSION, hookspecs
from distill_core.errors import PluginError, did_you_mean

if TYPE_CHECKING:
    from distill_core.contracts.cases import ConformanceCases
    from distill_core.contracts.component import Component, ComponentConfig

ENTRY_POINTS = "distill"
WITHOUT = "DISTILL_WITHOUT"
"""The environment variable that `--without` sets: plugins or packages to leave out, with commas between. In the
environment, since loader workers, ranks and further runs that a command starts must leave out the same."""


@dataclass(frozen=True)
class Entry:
    """A component class, the entry point that brought it and the package that this belongs to."""

    cls: type[Component]
    plugin: str
    package: str


class Plugins:
    """The loaded plugin modules. Importing them is cheap; their components are imported on demand."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager("distill")
        self.manager.add_hookspecs(hookspecs)
        self.packages: dict[str, str] = {}
        self.left_out: dict[str, str] = {}

    def add(self, name: str, module: Any, package: str) -> None:
        """Register one plugin module. Raises `PluginError` when it asks for another version of the hooks."""
        if hasattr(module, "__path__") and getattr(module, "__file__", None) is None:
            folder = next(iter(module.__path__))
            raise PluginError(
                f"plugin {name!r} (package {package}): {folder} is a folder without an __init__.py, "
                "which hides the installed package. Start from another folder."
            )
        version = getattr(module, "distill_api", API_VERSION)
        if version != API_VERSION:
            raise PluginError(
                f"plugin {name!r} (package {package}) asks for hooks of version {version}; this distill has version "
                f"{API_VERSION}. Install a release of {package} for it, uninstall it, or add --without {name}."
            )
        self.manager.register(module, name=name)
        try:
            self.manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(
                f"plugin {name!r} (package {package}): {error}. Fix it, or add --without {name}."
            ) from error
        self.packages[name] = package

    @classmethod
    def discover(cls) -> Plugins:
        """All installed plugins but those that `DISTILL_WITHOUT` names by plugin or package.

        Raises `PluginError`, which names the package, when one fails to import.
        """
        plugins = cls()
        points: dict[tuple[str, str], importlib.metadata.EntryPoint] = {}
        for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
            points.setdefault((point.name, point.value), point)
        packages = {key: point.dist.name if point.dist is not None else point.value for key, point in points.items()}
        unwanted = {name.strip() for name in os.environ.get(WITHOUT, "").split(",")} - {""}
        names = {name for name, _ in points} | set(packages.values())
        for name in sorted(unwanted - names):
            raise PluginError(f"--without {name}: no such plugin or package{did_you_mean(name, sorted(names))}")
        for key, point in sorted(points.items()):
            package = packages[key]
            if point.name in unwanted or package in unwanted:
                plugins.left_out[point.name] = package
                continue
            try:
                module = point.load()
            except Exception as error:
                raise _broken(point.name, package, repr(point.value), point.module, error) from error
            if plugins.manager.has_plugin(point.name):
                raise PluginError(
                    f"two packages register a plugin {point.name!r}: {plugins.packages[point.name]} and {package}. "
                    "Uninstall one, or add --without PACKAGE."
                )
            plugins.add(point.name, module, package)
        return plugins

    def conformance_cases(self) -> ConformanceCases:
        """What the plugins' components are checked with. Raises `PluginError` with the package's name."""
        from distill_core.contracts.cases import ConformanceCases

        return ConformanceCases(case for _, _, case in self.call("distill_conformance_cases"))

    def commands(self) -> list[Any]:
        """Further click commands. Raises `PluginError` with the package's name."""
        return [command for _, _, command in self.call("distill_commands")]

    def call(self, hook: str) -> Iterator[tuple[str, str, Any]]:
        """(plugin, package, item) of all that the plugins' implementations of a hook return."""
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            plugin = implementation.plugin_name
            package = self.packages[plugin]
            function = implementation.function
            try:
                items: list[Any] = [*function()]
            except Exception as error:
                what = f"its {hook.removeprefix('distill_')}"
                raise _broken(plugin, package, what, function.__module__, error) from error
            for item in items:
                yield plugin, package, item


class Registry:
    """Components by (kind, name)."""

    def __init__(self, entries: Iterable[Entry], left_out: Iterable[str] = ()) -> None:
        from distill_core.contracts.kinds import INTERFACES

        self.entries: dict[tuple[str, str], Entry] = {}
        self.interfaces = dict(INTERFACES)
        """Kind -> the class that its components implement: the core's, then those of plugins."""
        self.left_out = tuple(left_out)
        for entry in entries:
            interface = _interface_of(entry.cls)
            if problem := _unfit(entry.cls, interface):
                raise PluginError(f"package {entry.package}: component {entry.cls!r} {problem}")
            assert interface is not None
            kind, name = entry.cls.kind, entry.cls.name
            if (known := self.interfaces.setdefault(kind, interface)) is not interface:
                raise PluginError(
                    f"package {entry.package}: component {entry.cls!r} is of kind {kind!r}, and not a "
                    f"{known.__module__}.{known.__qualname__}. Take that as its base, or rename the kind, or add "
                    f"--without {entry.plugin}."
                )
            other = self.entries.get((kind, name))
            if other is not None and other.cls is not entry.cls:
                raise PluginError(
                    f"two packages claim the {kind} {name!r}: {other.package} and {entry.package}. Uninstall one, or "
                    "add --without PACKAGE."
                )
            self.entries[kind, name] = entry

    @classmethod
    def discover(cls, plugins: Plugins | None = None) -> Registry:
        """The components of all installed plugins. Raises `PluginError` with the package's name."""
        plugins = plugins or Plugins.discover()
        components = plugins.call("distill_components")
        return cls((Entry(item, plugin, package) for plugin, package, item in components), plugins.left_out)

    @classmethod
    def of(cls, *modules: ModuleType | Any) -> Registry:
        """The components of these plugin modules alone: a registry for a test."""
        plugins = Plugins()
        for module in modules:
            name = getattr(module, "__name__", type(module).__name__)
            plugins.add(name, module, name)
        return cls.discover(plugins)

    def get(self, kind: str, name: str, *others: str) -> Entry:
        """The component of this name, of this kind or one of the others. Raises KeyError with a message that suggests
        the nearest name."""
        kinds = (kind, *others)
        entry = next((self.entries[k, name] for k in kinds if (k, name) in self.entries), None)
        if entry is None:
            names = [known for k, known in self.entries if k in kinds]
            elsewhere = sorted(k for k, known in self.entries if known == name)
            if elsewhere:
                raise KeyError(f"{name!r} is a component of kind {elsewhere[0]}, not {kind}")
            without = f"; plugins left out: {', '.join(self.left_out)}" if self.left_out else ""
            raise KeyError(f"no {kind} named {name!r}{did_you_mean(name, names)}{without}")
        return entry

    def named(self, name: str) -> list[Entry]:
        """Components of any kind with this name."""
        return [entry for (_, known), entry in sorted(self.entries.items()) if known == name]


def _broken(plugin: str, package: str, what: str, module: str, error: Exception) -> PluginError:
    """A plugin of this module, whose code failed."""
    place = _raised_at(error, module.partition(".")[0])
    return PluginError(
        f"plugin {plugin!r} (package {package}) fails to import {what}{f', at {place}' if place else ''}: "
        f"{type(error).__name__}: {error}. Repair or uninstall {package}, or add --without {plugin}."
    )


def _raised_at(error: Exception, package: str) -> str | None:
    """`file:line`: the last of the package that ran before the error was raised."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}:{error.lineno}"
    place = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__")).partition(".")[0] == package:
            place = f"{frame.f_code.co_filename}:{line}"
    return place


def _interface_of(cls: Any) -> type[Component] | None:
    """The class that a component has its `kind` from: of its bases that state one, the outermost."""
    from distill_core.contracts.component import Component

    if not isinstance(cls, type) or not issubclass(cls, Component):
        return None
    return next((base for base in reversed(cls.__mro__) if "kind" in vars(base)), None)


def _unfit(cls: Any, interface: type[Component] | None) -> str | None:
    """Why this cannot be a component."""
    if interface is None or interface is cls:
        return "needs an interface as its base: one of distill_core.interfaces, or a plugin's class with a `kind`"
    if cls.kind != interface.kind:
        return f"changes the kind {interface.kind!r} of its base {interface.__qualname__}"
    if not isinstance(getattr(cls, "name", None), str):
        return "needs a `name`, which recipes use"
    base: type[ComponentConfig] = interface.Config
    if not issubclass(getattr(cls, "Config", object), base):
        return f"needs a `Config` that extends {base.__module__}.{base.__qualname__}"
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        return f"does not define {', '.join(missing)}"
    return None
