"""A plugin that is broken, too old or unwanted is named, and `--without` goes on without it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distill_core.cli import main
from distill_core.registry import WITHOUT

BROKEN = "raise RuntimeError('built for another torch')\n"
OLD = "distill_api = 0\n"
TAKES = """
from distill_core import hookimpl
distill_api = 2

@hookimpl
def distill_components():
    from distill_core.interfaces import Loss

    class Mine(Loss):
        "A second loss of this name."
        name = "clip"
        def forward(self, outputs): ...
    return [Mine]
"""


@pytest.fixture
def install(tmp_path: Path, install_plugin: Callable[[Path, Path], Path], monkeypatch: pytest.MonkeyPatch):
    """`install(source)`: a package distill-other with the plugin `other`, on this process's path."""

    def write(source: str) -> Path:
        project = tmp_path / "project"
        (project / "distill_other").mkdir(parents=True)
        (project / "distill_other" / "__init__.py").write_text(source)
        (project / "pyproject.toml").write_text(
            '[project]\nname = "distill-other"\nversion = "1"\n'
            '[project.entry-points.distill]\nother = "distill_other"\n'
        )
        site = install_plugin(project, tmp_path / "site")
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, "distill_other", raising=False)
        return site

    return write


@pytest.mark.parametrize(
    ("source", "says"),
    [(BROKEN, "built for another torch"), (OLD, "asks for hooks of version 0"), (TAKES, "two packages claim the loss")],
    ids=["broken", "old", "conflict"],
)
@pytest.mark.parametrize("name", ["other", "distill-other"])
def test_the_plugin_is_named_and_left_out(
    source: str,
    says: str,
    name: str,
    install: Callable[[str], Path],
    tiny_recipe: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By its entry point's name or its package's. Would catch an error that does not say how to go on."""
    install(source)
    with pytest.raises(SystemExit) as caught:
        main(["validate", str(tiny_recipe)])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert "distill-other" in error
    assert "--without" in error
    for command in (["validate", str(tiny_recipe)], ["show", str(tiny_recipe)], ["plugins"], ["schema"]):
        main([*command, "--without", name])
        assert "distill-other" not in capsys.readouterr().out
    assert WITHOUT not in os.environ, "the option holds for its own command"


@pytest.mark.slow
def test_a_run_goes_on_without_it(install: Callable[[str], Path], tiny_recipe: Path, tmp_path: Path) -> None:
    """In a process of its own, with a loader's worker: whatever that starts must leave out the same plugin."""
    site = install(BROKEN)
    arguments = [
        "run",
        tiny_recipe,
        "--runs",
        tmp_path / "runs",
        "--quiet",
        "--set",
        "data.workers=1",
        "--without",
        "other",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "distill_core.cli", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs" / "tiny" / "report.json").read_text())["steps"] == 4


def test_before_a_plugins_own_command(install: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """`distill --help` and the commands of plugins load every plugin: there, the option stands before the command."""
    install(BROKEN)
    with pytest.raises(SystemExit):
        main(["kernels", "--help"])
    assert "--without other" in capsys.readouterr().err
    main(["--without", "other", "kernels", "--help"])
    assert "Usage: " in capsys.readouterr().out


def test_what_is_left_out_is_said_where_a_recipe_misses_it(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Would catch a did-you-mean that sends the reader to look for a mistake in the recipe."""
    with pytest.raises(SystemExit):
        main(["validate", str(tiny_recipe), "--without", "cosmos"])
    error = capsys.readouterr().err
    assert "no fusion named 'cross_attention'" in error
    assert "plugins left out: cosmos" in error


def test_an_unknown_name_is_refused(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch a misspelt name that leaves the broken plugin in."""
    with pytest.raises(SystemExit) as caught:
        main(["validate", str(tiny_recipe), "--without", "cosmoss"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "--without cosmoss: no such plugin or package, did you mean 'cosmos'?\n"
