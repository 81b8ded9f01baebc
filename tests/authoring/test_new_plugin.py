"""`distill new-plugin`: what it writes installs, passes its own tests and check-plugin, and trains."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from distill_core.cli import main
from distill_core.contracts.kinds import INTERFACES
from distill_core.registry import Registry

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The written package."""
    folder = tmp_path_factory.mktemp("new")
    main(["new-plugin", "stereo-waves", "--into", str(folder)])
    return folder / "stereo-waves"


@pytest.fixture(scope="module")
def site(project: Path, install_plugin: Callable[[Path, Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the package is installed in: by pip where it and the build backend are at hand."""
    into = tmp_path_factory.mktemp("site")
    if find_spec("hatchling") is None or find_spec("pip") is None:
        return install_plugin(project, into)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    copied = shutil.copytree(project, tmp_path_factory.mktemp("source") / project.name)
    subprocess.run([*pip, "--target", str(into), str(copied)], check=True, timeout=500)
    return into


@pytest.fixture(scope="module")
def run(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs `python -m ...` with the package installed."""
    # not in the project's folder, which `python -m` would import the package from
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    environment = os.environ | {"PYTHONPATH": str(site), "DISTILL_CACHE": str(tmp_path_factory.mktemp("cache"))}

    def call(*arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=550, check=False, cwd=elsewhere, env=environment | more
        )

    return call


def test_nothing_of_the_template_is_left(project: Path) -> None:
    """Would catch a name that was not replaced, in a file or in a path, and files left behind."""
    files = [path for path in project.rglob("*") if path.is_file()]
    assert {"pyproject.toml", "README.md", "recipe.yaml", "test_stereo_waves.py"} <= {path.name for path in files}
    for path in files:
        assert "my_plugin" not in str(path)
        assert not {"my_plugin", "my-plugin"} & {
            word for word in ("my_plugin", "my-plugin") if word in path.read_text()
        }
        assert len(path.read_text().splitlines()) <= 120, "small and readable"


def test_it_passes_its_own_tests_where_it_is_installed(run: Run, project: Path) -> None:
    """Among them: all components conform, the loss is its formula, the recipe trains."""
    done = run("pytest", "-q", "-p", "no:cacheprovider", project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "18 passed" in done.stdout


def test_it_brings_one_of_each_kind_and_passes_check_plugin(run: Run) -> None:
    done = run("distill_core.cli", "check-plugin", "stereo-waves", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout)
    assert {result["kind"] for result in results} == {"plugin", *INTERFACES}
    assert {result["status"] for result in results} == {"ok", "skipped"}


def test_a_mistake_in_it_fails_check_plugin(run: Run, site: Path, tmp_path: Path) -> None:
    """The control, and what an author sees: exit code 1, the check, what to fix; the plugin's own faults, too."""
    broken = tmp_path / "broken"
    shutil.copytree(site, broken)
    package = broken / "stereo_waves"
    fusion = package / "fusion.py"
    text = fusion.read_text()
    assert "normalize(x.float(), dim=-1)" in text
    fusion.write_text(text.replace("normalize(x.float(), dim=-1)", "x.float()"))
    start = package / "__init__.py"
    start.write_text(start.read_text().replace("distill_api = 2", "import torch"))
    done = run("distill_core.cli", "check-plugin", "stereo_waves", PYTHONPATH=str(broken))
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert "\x1b" not in done.stdout, "no colour in a pipe"
    failed = [line.split()[-2] for line in lines if line.endswith("FAILED")]
    assert failed == ["version", "light", "shapes"]
    assert any("to fix:" in line and "is not L2-normalised" in line for line in lines)
    assert any("to fix:" in line and "imports torch" in line for line in lines)
    assert lines[-1].endswith("3 failed")


def test_the_written_schema_knows_the_installed_plugin(run: Run) -> None:
    """An editor completes a stranger's components as well."""
    done = run("distill_core.cli", "schema")
    assert done.returncode == 0, done.stderr
    assert "loss.stereo_waves_match" in json.loads(done.stdout)["$defs"]


def test_its_recipe_has_the_package_s_name(project: Path) -> None:
    """Would catch a run that is called `recipe`."""
    assert "\nname: stereo-waves\n" in (project / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("9lives", "is no package name"),
        ("two words", "is no package name"),
        ("../up", "is no package name"),
        ("class", "a module or keyword of Python"),
        ("json", "a module or keyword of Python"),
        ("distill-core", "a module 'distill_core' is installed already"),
    ],
)
def test_names_that_cannot_be(name: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["new-plugin", name, "--into", str(tmp_path)])
    assert caught.value.code == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_overwritten(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as caught:
        main(["new-plugin", project.name, "--into", str(project.parent)])
    assert caught.value.code == 2
    assert "exists; choose another name" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in before}


def test_a_package_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["check-plugin", "cosmoss"])
    assert caught.value.code == 2
    assert "no plugin or package 'cosmoss', did you mean 'cosmos'?" in capsys.readouterr().err


def test_check_plugin_takes_a_built_in_plugin(capsys: pytest.CaptureFixture[str], registry: Registry) -> None:
    """By its entry point alone: not the whole package."""
    main(["check-plugin", "clip"])
    out = capsys.readouterr().out
    names = {name for (_, name), entry in registry.entries.items() if entry.plugin == "clip"}
    assert all(name in out for name in names)
    assert out.splitlines()[-1].startswith(f"{len(names)} component(s): ")
    assert out.splitlines()[-1].endswith("0 failed")


def test_the_template_is_in_the_wheel() -> None:
    """Would catch an installed distill that cannot write a plugin."""
    builders = pytest.importorskip("hatchling.builders.wheel")
    packed = {file.distribution_path for file in builders.WheelBuilder(str(ROOT)).recurse_included_files()}
    template = ROOT / "plugins" / "distill_authoring" / "template"
    files = [path for path in template.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len(files) >= 10
    assert {str(path.relative_to(ROOT / "plugins")) for path in files} <= packed
