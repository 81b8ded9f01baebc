"""Reference pages: generated from docstrings, complete, and a site that builds."""

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import distill_core
from distill_core import Component, ComponentConfig
from distill_core.cli import main
from distill_core.commands import catalogue
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    main(["docs", str(folder)])
    return folder


def test_each_component_has_a_page_with_its_options(out: Path, registry: Registry) -> None:
    """Would catch a component, option, type or default that is not on its page."""
    assert registry.entries
    for (kind, name), entry in registry.entries.items():
        text = (out / kind / f"{name}.md").read_text()
        assert text.startswith(f"# {name}\n")
        assert catalogue.summary(entry.cls)[:40] in " ".join(text.split())
        rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| `")}
        for option in catalogue.options(entry.cls.Config):
            row = rows[f"`{option['name']}`"]
            assert option["doc"][:30].replace("|", "\\|") in row
            assert ("required" in row) or not option["required"]


def test_tables_have_as_many_cells_as_columns(out: Path) -> None:
    """Would catch a type like `int | null` that breaks its table."""
    for page in out.rglob("*.md"):
        width = 0
        for line in page.read_text().splitlines():
            if not line.startswith("|"):
                width = 0
                continue
            cells = len(re.findall(r"(?<!\\)\|", line))
            assert width in (0, cells), f"{page.name}: {line}"
            width = cells


def test_links_lead_to_pages(out: Path) -> None:
    for page in out.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).is_file(), f"{page.name} -> {target}"


def test_sections_interfaces_and_commands(out: Path, registry: Registry) -> None:
    recipe, interfaces, commands = ((out / f"{name}.md").read_text() for name in ("recipe", "interfaces", "commands"))
    assert all(f"| `{field}` |" in recipe for field in (f.alias or name for name, f in Recipe.model_fields.items()))
    assert "| `train.checkpoint.every` |" in recipe
    assert "caption_reader" in registry.interfaces, "a plugin's kind is on the page too"
    for kind, interface in registry.interfaces.items():
        assert f"\n## {kind}\n" in interfaces
        assert interface.__name__ in interfaces
    for name in ("distill run", "distill check-plugin", "distill bench step", "distill bench data"):
        assert f"\n## {name}\n" in commands


def test_data_types_are_described_with_their_fields(out: Path) -> None:
    """What a component's author looks up: would catch a public class or function without an entry, and a field without
    the docstring below it."""
    page = (out / "data_types.md").read_text()
    sections = {text.partition("\n")[0]: text for text in page.split("\n## ")}
    for name in distill_core.HOMES:
        thing = getattr(distill_core, name)
        if inspect.isfunction(thing):
            assert f"\n- `{name}(" in sections["Functions"]
        elif isinstance(thing, type) and not issubclass(thing, Component | ComponentConfig):
            assert name in sections
    assert {"Mask", "Scheduled", "Group", "Needs", "BadSample"} <= sections.keys()
    assert "| `mask` | `MaskPlan \\| None` | What its masker does" in sections["ModalityPlan"]
    assert "| `weight` | `float` | Of this rank's mean" in sections["Outputs"]
    assert "- `dropped(tokens)`: Which of its L tokens" in sections["Group"]
    assert "```text\nkeep   [L'] int64" in sections["Mask"], "columns stay aligned"
    assert not re.search(r" at 0x[0-9a-f]+", page)


def test_one_plugins_pages_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a plugin's author puts into the package's own documentation."""
    main(["docs", str(tmp_path), "--plugin", "clip"])
    assert {path.stem for path in tmp_path.rglob("*.md")} == {"index", "clip"}
    with pytest.raises(SystemExit) as caught:
        main(["docs", str(tmp_path), "--plugin", "clipp"])
    assert caught.value.code == 2
    assert "did you mean 'clip'?" in capsys.readouterr().err


def test_nothing_generated_is_committed() -> None:
    assert not (ROOT / "docs" / "reference").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="needs the extra [docs]")
def test_the_site_builds(tmp_path: Path) -> None:
    """Would catch a hook that mkdocs refuses, and pages that do not reach the site."""
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    for page in (
        "index",
        "log/index",
        "recipes/index",
        "reference/fusion/cross_attention/index",
        "reference/commands/index",
    ):
        assert (tmp_path / f"{page}.html").is_file(), page
    assert "Attention heads" in (tmp_path / "reference/fusion/cross_attention/index.html").read_text()
