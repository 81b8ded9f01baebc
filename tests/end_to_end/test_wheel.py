"""What pip installs: the wheel, beside the installed dependencies, in a folder that knows nothing of the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from emoji_packages import missing

pytestmark = pytest.mark.slow

pytest.importorskip("hatchling", reason="needs hatchling to build the wheel")

ROOT = Path(__file__).parents[2]
LIMIT = 600
"""Seconds for a command that takes less than a minute."""

Distill = Callable[..., str]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=LIMIT, capture_output=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def distill(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Distill:
    """Runs the installed command line in an empty folder; returns what it printed."""
    site = tmp_path_factory.mktemp("site")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(pip, check=True, timeout=LIMIT)
    folder = tmp_path_factory.mktemp("empty")

    def run(*arguments: str) -> str:
        # first on the path, so that an editable install of the repository is not what runs
        environment = {**os.environ, "PYTHONPATH": str(site)}
        start = "import sys, distill_core.cli; print(distill_core.__file__, file=sys.stderr); distill_core.cli.main()"
        done = subprocess.run(
            [sys.executable, "-c", start, *arguments],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[0] == str(site / "distill_core/__init__.py")
        return done.stdout.replace(str(site), "SITE").replace(str(folder), "HERE")

    return run


def test_the_wheel_has_its_name_and_every_recipe(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert wheel.name.startswith(f"{project['name'].replace('-', '_')}-{project['version']}-")
    files = {path.relative_to(ROOT / "recipes").as_posix() for path in (ROOT / "recipes").rglob("*.yaml")}
    head = "distill_recipes/recipes/"
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        assert {name.removeprefix(head) for name in names if name.startswith(head)} == files
        assert not [name for name in names if name.startswith(("recipes/", "tests/", "docs/"))]
        assert packed.read(f"{head}cosmos_tiny.yaml") == (ROOT / "recipes/cosmos_tiny.yaml").read_bytes()


def test_an_editable_install_has_no_copy_of_the_recipes(tmp_path: Path) -> None:
    """Would catch recipes that are as old as the installation, whatever is changed in the repository."""
    script = "from hatchling.build import build_editable; import sys; print(build_editable(sys.argv[1]))"
    command = [sys.executable, "-c", script, str(tmp_path)]
    pytest.importorskip("editables", reason="needs editables to build an editable wheel")
    done = subprocess.run(command, cwd=ROOT, check=True, timeout=LIMIT, capture_output=True, text=True)
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as packed:
        assert [name for name in packed.namelist() if name.endswith(".yaml")] == []
        assert any(str(ROOT / "plugins") in packed.read(n).decode() for n in packed.namelist() if n.endswith(".pth"))


def test_its_recipes_are_its_own(distill: Distill) -> None:
    rows = {row["name"]: row for row in json.loads(distill("recipes", "--json"))}
    assert rows["cosmos_tiny"]["path"] == "SITE/distill_recipes/recipes/cosmos_tiny.yaml"
    assert rows["cosmos_tiny"]["package"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
    assert len(rows) == len(list((ROOT / "recipes").rglob("*.yaml")))


@pytest.mark.skipif(bool(missing()), reason=f"needs the extra [emoji]: {', '.join(missing())}")
def test_three_steps_of_the_quickstart_from_an_empty_folder(distill: Distill) -> None:
    """Would catch a wheel that lacks a module, a template, data or a recipe."""
    changes = ("train.steps=3", "data.batch_size=8", "tracking=null", "evaluate.every=null")
    sets = [word for change in changes for word in ("--set", change)]
    printed = distill("run", "cosmos_tiny", "--quiet", *sets)
    assert "3 steps, 24 samples" in " ".join(printed.split())
    assert "retrieval" in printed
