"""Plugins and components: what is refused and who is named, what `distill plugins` prints, that all is documented."""

import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import click
import pytest
from pydantic import BaseModel

from distill_authoring import reference
from distill_core import API_VERSION, hookimpl, hookspecs
from distill_core.cli import cli, main
from distill_core.commands import catalogue
from distill_core.contracts.component import Component, ComponentConfig
from distill_core.contracts.kinds import INTERFACES
from distill_core.errors import PluginError
from distill_core.interfaces import Loss
from distill_core.recipe import sections as recipe
from distill_core.registry import Entry, Plugins, Registry
from distill_core.system.extras import project


class Good(Loss):
    """A loss."""

    name = "good"

    def forward(self, outputs):
        raise NotImplementedError


class Same(Good):
    """Another class of the same name."""


class NoName(Loss):
    """A loss that recipes cannot name."""

    def forward(self, outputs):
        raise NotImplementedError


class NoKind(Component):
    """A component of no interface."""

    name = "no_kind"


class SaysKind(Component):
    """A component that only says it is a loss."""

    kind = "loss"


class Heard(SaysKind):
    """A component of an interface that takes the name of a kind of the core."""

    name = "heard"


class OtherKind(Good):
    """A loss that says it is something else."""

    kind = "reader"


class Reader(Component):
    """An interface that a plugin defines."""

    kind = "reader"


class Braille(Reader):
    """A reader."""

    name = "braille"


class AnotherReader(Component):
    """An interface of another plugin, of the same kind."""

    kind = "reader"


class Morse(AnotherReader):
    """Another reader."""

    name = "morse"
    name = "says_kind"


class Unfinished(Loss):
    """A loss without forward."""

    name = "unfinished"


class LaxConfig(Good):
    """A loss whose options pass over unknown keys."""

    name = "lax"

    class Config(BaseModel):
        """Not a ComponentConfig."""


def plugin(components: Callable[[], Any], name: str = "mine", **attributes: Any) -> ModuleType:
    """A plugin module as a package would hold it."""
    module = ModuleType(name)
    module.distill_components = hookimpl(lambda: components())  # type: ignore[attr-defined]
    for attribute, value in attributes.items():
        setattr(module, attribute, value)
    return module


def fails() -> list[type]:
    raise ImportError("No module named 'numba'")


def line_of(function: Callable[[], Any]) -> int:
    """That of its body's only line."""
    return function.__code__.co_firstlineno + 1


def test_a_registry_of_modules_holds_their_components_alone() -> None:
    """Would catch a registry that a plugin fills by being imported."""
    registry = Registry.of(plugin(lambda: [Good]))
    assert list(registry.entries) == [("loss", "good")]
    assert registry.get("loss", "good") == Entry(Good, "mine", "mine")
    assert [entry.cls for entry in registry.named("good")] == [Good]


def test_a_plugin_defines_a_kind_by_an_interface() -> None:
    """Would catch a core that knows all kinds, or two packages' readers in one slot that call different methods."""
    registry = Registry.of(plugin(lambda: [Braille]))
    assert registry.get("reader", "braille").cls is Braille
    assert registry.interfaces == INTERFACES | {"reader": Reader}
    assert "reader" not in Registry.of(plugin(lambda: [Good])).interfaces
    with pytest.raises(
        PluginError, match=r"package second: .*Morse.* of kind 'reader', and not a \S+\.Reader\. .*rename"
    ):
        Registry.of(plugin(lambda: [Braille], "first"), plugin(lambda: [Morse], "second"))
    assert json.loads(catalogue.as_json(registry, "braille"))[0]["kind"] == "reader"


def test_did_you_mean(registry: Registry) -> None:
    with pytest.raises(KeyError, match=r"no loss named 'contrastiv', did you mean 'contrastive'\?"):
        registry.get("loss", "contrastiv")
    with pytest.raises(KeyError, match="'vit' is a component of kind backbone, not loss"):
        registry.get("loss", "vit")
    with pytest.raises(KeyError, match=r"no loss named 'zzz' \(there are: .*clip, .*contrastive"):
        registry.get("loss", "zzz")


def test_two_packages_that_claim_one_name_are_both_named() -> None:
    """Would catch the last one winning. The same class from two entry points is no conflict."""
    with pytest.raises(PluginError, match="two packages claim the loss 'good': first and second"):
        Registry.of(plugin(lambda: [Good], "first"), plugin(lambda: [Same], "second"))
    assert len(Registry.of(plugin(lambda: [Good], "first"), plugin(lambda: [Good], "second")).entries) == 1


def test_a_plugin_for_another_version_of_the_hooks_is_refused_by_name() -> None:
    with pytest.raises(PluginError) as caught:
        Plugins().add("mine", plugin(lambda: [Good], distill_api=API_VERSION + 1), "their-package")
    assert str(caught.value) == (
        f"plugin 'mine' (package their-package) asks for hooks of version {API_VERSION + 1}; this distill has version "
        f"{API_VERSION}. "
        "Install a release of their-package for it, uninstall it, or add --without mine."
    )


def test_a_misspelt_hook_is_refused() -> None:
    """Would catch a plugin that seems installed and gives nothing."""
    wrong = SimpleNamespace(distill_componets=hookimpl(lambda: [Good]))
    with pytest.raises(PluginError, match=r"plugin 'mine' \(package their-package\): unknown hook 'distill_componets'"):
        Plugins().add("mine", wrong, "their-package")


@pytest.mark.parametrize(
    ("components", "message"),
    [
        (
            fails,
            rf"fails to import its components, at {re.escape(__file__)}:{line_of(fails)}: "
            "ImportError: No module named 'numba'. Repair or uninstall mine, or add",
        ),
        (lambda: None, "fails to import its components: TypeError"),
        (lambda: [NoName], "package mine: component .*NoName.* needs a `name`"),
        (lambda: [NoKind], "package mine: component .*NoKind.* needs an interface as its base"),
        (lambda: [SaysKind], "package mine: component .*SaysKind.* needs an interface as its base"),
        (lambda: [Heard], "component .*Heard.* is of kind 'loss', and not a distill_core.interfaces.Loss. Take that"),
        (lambda: [OtherKind], "component .*OtherKind.* changes the kind 'loss' of its base Loss"),
        (lambda: ["good"], "package mine: component 'good' needs an interface as its base"),
        (lambda: [Unfinished], "package mine: component .*Unfinished.* does not define forward"),
        (lambda: [LaxConfig], "package mine: component .*LaxConfig.* needs a `Config` that extends"),
    ],
)
def test_what_is_no_component_names_its_package(components: Callable[[], Any], message: str) -> None:
    """Would catch a traceback in the middle of a run for what is known when the plugin is found."""
    with pytest.raises(PluginError, match=message):
        Registry.of(plugin(components))


def test_commands_that_fail_name_their_package() -> None:
    """`distill --help` asks every plugin for its commands: would catch a traceback there."""
    plugins = Plugins()
    plugins.add("mine", SimpleNamespace(distill_commands=hookimpl(lambda: fails())), "their-package")
    named = r"plugin 'mine' \(package their-package\) fails to import its commands, at .*test_registry.py:"
    with pytest.raises(PluginError, match=named):
        plugins.commands()


def write_project(folder: Path, name: str, source: str, point: str = "") -> Path:
    """A package of one module, and its pyproject.toml with an entry point."""
    module = name.replace("-", "_")
    (folder / module).mkdir(parents=True)
    (folder / module / "__init__.py").write_text(source)
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "{name}"\nversion = "1"\n[project.entry-points.distill]\n{point or module} = "{module}"\n'
    )
    return folder


Install = Callable[[Path, Path], Path]


@pytest.mark.parametrize(
    ("source", "line", "error"),
    [
        ("import a_module_that_is_not_there\n", 1, "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("import json\n\nVALUE = json.loads(None)\n", 3, "TypeError: the JSON object must be str"),
        ("def f(:\n    pass\n", 1, "SyntaxError: invalid syntax"),
    ],
)
def test_an_entry_point_that_fails_to_import_names_its_package_and_its_line(
    source: str, line: int, error: str, tmp_path: Path, install_plugin: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch the line of the import machinery, or of another package that the plugin calls."""
    project = write_project(tmp_path / "project", "distill-broken-import", source)
    site = install_plugin(project, tmp_path / "site")
    monkeypatch.syspath_prepend(site)
    with pytest.raises(PluginError) as caught:
        Registry.discover()
    message = str(caught.value)
    assert message.startswith(
        "plugin 'distill_broken_import' (package distill-broken-import) fails to import 'distill_broken_import', at "
    )
    assert f"distill_broken_import/__init__.py:{line}: {error}" in message
    assert message.endswith(". Repair or uninstall distill-broken-import, or add --without distill_broken_import.")


def test_two_packages_that_register_one_plugin_are_both_named(
    tmp_path: Path, install_plugin: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    taker = write_project(tmp_path / "project", "distill-takes-cosmos", "", point="cosmos")
    monkeypatch.syspath_prepend(install_plugin(taker, tmp_path / "site"))
    with pytest.raises(PluginError) as caught:
        Registry.discover()
    for package in ("distill-takes-cosmos", project()):
        assert package in str(caught.value)


def test_built_in_methods_come_through_the_strangers_door(registry: Registry) -> None:
    """Would catch a component that is registered in any other way than by an entry point of the group."""
    ours = {point.name: point.value for point in entry_points(group="distill")}
    assert {"core", "vl", "cosmos", "clip", "emoji", "aim"} <= set(ours)
    for entry in registry.entries.values():
        module = ours[entry.plugin].split(".")[0]
        assert entry.cls.__module__.split(".")[0] == module, f"{entry.cls} was not brought by its own package"


def test_the_command_line_lists_every_component(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch a component, or its package, missing from the list."""
    main(["plugins"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for (_, name), entry in registry.entries.items():
        assert any(name in words and entry.package in words for words in lines), name
    main(["plugins", "--json"])
    listed = json.loads(capsys.readouterr().out)
    assert {(row["kind"], row["name"], row["package"]) for row in listed} == {
        (kind, name, entry.package) for (kind, name), entry in registry.entries.items()
    }


def test_one_component_prints_its_options(
    registry: Registry, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a missing option, type, default or docstring."""
    monkeypatch.setenv("COLUMNS", "200")
    main(["plugins", "cross_attention"])
    out = capsys.readouterr().out
    rows = {line.split()[0]: " ".join(line.split()) for line in out.splitlines() if line.strip()}
    assert out.startswith(f"cross_attention  (fusion, plugin cosmos of {project()})")
    assert "int 8 Attention heads" in rows["heads"]
    assert "bool true Attend to real tokens only." in rows["mask_padding"]
    assert '[str, str] ["image", "text"]' in rows["modalities"]
    main(["plugins", "multi_crop"])
    out = capsys.readouterr().out
    assert "[float, float, float, float] [0.4, 0.4, 0.2, 0.1]" in " ".join(out.split())
    assert "\nglobal " in out, "options go by the name that recipes use"
    assert "globals_" not in out
    main(["plugins", "state_dict"])
    assert "required" in capsys.readouterr().out


def test_an_unknown_component_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plugins", "cros_attention"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "no component named 'cros_attention', did you mean 'cross_attention'?\n"


def sections() -> Iterable[type[ComponentConfig]]:
    """The configs of a recipe's sections."""
    return [
        member
        for member in vars(recipe).values()
        if isinstance(member, type) and issubclass(member, ComponentConfig) and member is not ComponentConfig
    ]


def undocumented(config: type[BaseModel]) -> list[str]:
    """Options without a docstring, those of nested configs too."""
    bare = [row["name"] for row in catalogue.options(config) if not row["doc"]]
    inner = [nested for field in config.model_fields.values() for nested in reference.configs(field.annotation)]
    return bare + [f"{nested.__name__}.{name}" for nested in inner for name in undocumented(nested)]


def test_every_component_option_and_hook_is_documented(registry: Registry) -> None:
    """Docstrings are what `distill plugins` prints: one that is missing is a bug. Inherited ones do not count."""
    bare = []
    for entry in registry.entries.values():
        where = f"{entry.cls.kind} {entry.cls.name}"
        bare += [f"{where}: {cls.__name__}" for cls in (entry.cls, entry.cls.Config) if not vars(cls).get("__doc__")]
        bare += [f"{where}: {option}" for option in undocumented(entry.cls.Config)]
    for section in sections():
        bare += [] if vars(section).get("__doc__") else [section.__name__]
        bare += [f"{section.__name__}.{row['name']}" for row in catalogue.options(section) if not row["doc"]]
    hooks = [hook for name, hook in vars(hookspecs).items() if name.startswith("distill_")]
    assert hooks
    bare += [hook.__name__ for hook in hooks if not inspect.getdoc(hook)]
    for interface in registry.interfaces.values():
        own = [m for m in vars(interface).values() if inspect.isfunction(m) or isinstance(m, classmethod)]
        names = [m.__name__ for m in own if not m.__name__.startswith("_") and not m.__doc__]
        bare += [f"{interface.__name__}.{name}" for name in names]
    plugins = Plugins.discover()
    for hook in plugins.manager.hook.__dict__.values():
        for implementation in getattr(hook, "get_hookimpls", list)():
            bare += [] if implementation.function.__doc__ else [f"{implementation.plugin_name}: {hook.name}"]
    for name, command in [*walk(cli.commands.values()), *walk(plugins.commands())]:
        bare += [] if command.help else [f"command {name}"]
        bare += [f"{name} {p.name}" for p in command.params if isinstance(p, click.Option) and not p.help]
    assert bare == []


def walk(commands: Iterable[click.Command]) -> Iterator[tuple[str, click.Command]]:
    """(name, command), those of groups too."""
    for command in commands:
        yield str(command.name), command
        if isinstance(command, click.Group):
            yield from walk(command.commands.values())


def test_an_option_without_a_docstring_would_be_found() -> None:
    """Guards the test above: pydantic takes docstrings of fields only where the config asks for it."""

    class Config(ComponentConfig):
        """Two options."""

        bare: int = 1
        told: int = 2
        """What it is."""

    class Outer(ComponentConfig):
        """One that nests them."""

        inner: Config | None = None
        """Nested."""

    assert undocumented(Outer) == ["inner.bare", "Config.bare"]
    assert {row["name"]: row["doc"] for row in catalogue.options(Config)} == {"bare": "", "told": "What it is."}


HEAVY = ("torch", "torchvision", "webdataset", "aim", "pydantic", "numpy", "yaml", "rich")


def loaded_by(arguments: list[str], modules: Iterable[str]) -> list[str]:
    """Which of the modules are imported when `distill ARGUMENTS` is through."""
    code = (
        "import sys\nfrom distill_core.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        f"print('LOADED', *[name for name in {tuple(modules)!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=400)
    return done.stdout.splitlines()[-1].split()[1:]


def test_help_imports_nothing_heavy() -> None:
    """`distill --help` is to take less than 0.3 s; torch alone takes six times that. Would catch a plugin module (or
    the core) that imports it outside the hook."""
    assert loaded_by(["--help"], HEAVY) == []


@pytest.mark.slow
def test_listing_plugins_imports_torch_at_most() -> None:
    """Component modules import torch; torchvision, webdataset and aim are for inside functions (3.7 s against 1.8)."""
    assert loaded_by(["plugins"], ("torchvision", "torchdata", "webdataset", "aim", "matplotlib", "transformers")) == []


def test_the_installed_command_is_the_one_tested() -> None:
    (script,) = entry_points(group="console_scripts", name="distill")
    assert script.load() is main


def test_a_folder_that_hides_a_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project's own folder in the working directory is an empty module before the installed package: its components
    would be missing without a word."""
    (tmp_path / "hidden_plugin_xyz").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match=r"hidden_plugin_xyz is a folder without an __init__.py.*another folder"):
        Plugins().add("mine", importlib.import_module("hidden_plugin_xyz"), "mine")
