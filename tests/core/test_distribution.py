"""The package's name, which pyproject.toml says and all else reads or repeats."""

import re
import subprocess
import tomllib
from pathlib import Path

from distill_authoring.new_plugin import write
from distill_core.system import extras

ROOT = Path(__file__).parents[2]
NAME = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]


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
