"""docs/architecture.md is true of the tree: what it names exists, what it must name is there, and imports go down."""

from __future__ import annotations

import ast
import graphlib
import sys
import threading
from pathlib import Path
from types import FrameType

import pytest
from import_graph import CORE, ROOT, floors, graph, imported, mapped, modules, path_of_a_step, reachable

from distill_core.cli import main

FLOORS = 17
"""What the longest chain of imports may count, typing and imports in functions included. Lower it when it shrinks."""


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """Core's import graph."""
    return graph(CORE)


def test_what_the_map_names_exists_and_all_that_matters_is_named() -> None:
    """Would catch a page with a file that has moved, and a new plugin, folder or top-level file that is on no map."""
    named = mapped()
    assert [path for path in named if not path.exists()] == []
    expected = {path for path in CORE.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    expected |= {path.parent for path in (ROOT / "plugins").glob("distill_*/__init__.py")}
    expected |= {path for path in (ROOT / "kernels" / "distill_kernels").iterdir() if any(path.glob("*.py"))}
    assert expected - set(named) == set()


def test_no_module_of_core_imports_in_a_circle(imports: dict[str, set[str]]) -> None:
    """Types and imports in functions count: a circle there means that neither file can be read first."""
    try:
        height = 1 + max(floors(imports).values())
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")
    assert height <= FLOORS, f"the longest chain of imports has {height} modules"


def test_top_level_files_import_only_what_the_map_has_below_them(imports: dict[str, set[str]]) -> None:
    """Read top to bottom, the map goes from the command to the plain data: nothing imports upwards, through folders
    neither."""
    order = [f"distill_core.{path.stem}" for path in mapped() if path.parent == CORE and path.suffix == ".py"]
    order = [module for module in order if module not in ("distill_core.__init__", "distill_core.tools")]
    upwards = {
        (module, above)
        for place, module in enumerate(order)
        for above in order[:place]
        if above in reachable(imports, module)
    }
    assert upwards == set()


def test_core_takes_from_its_front_door_only_what_is_defined_there() -> None:
    """The front door re-exports from all over core: a module that imported such a name from it would be in a circle."""
    front = ast.parse((CORE / "__init__.py").read_text(encoding="utf-8"))
    own = {target.id for node in front.body if isinstance(node, ast.Assign) for target in node.targets}  # type: ignore[attr-defined]
    own |= {path.stem for path in CORE.iterdir()}
    taken = {
        (module, alias.name)
        for module, path in modules(CORE).items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "distill_core"
        for alias in node.names
    }
    assert ("distill_core.cli", "__version__") in taken
    assert {pair for pair in taken if pair[1] not in own} == set()


def test_the_graph_sees_every_kind_of_import(tmp_path: Path) -> None:
    """Guards the tests above, on a package with an import at the top, in a function, for types, and a circle."""
    package = tmp_path / "some"
    (package / "folder").mkdir(parents=True)
    files = {
        "__init__": "from some.top import f",
        "bottom": "x = 1",
        "typed": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from some import bottom",
        "folder/__init__": "",
        "folder/inner": "def f():\n    import some.typed",
        "top": "from some.folder import inner\nimportlib.import_module('some.bottom')",
    }
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    imports = graph(package)
    assert imports == {
        "some.bottom": set(),
        "some.typed": {"some.bottom"},
        "some.folder": set(),
        "some.folder.inner": {"some.typed"},
        "some.top": {"some.folder.inner", "some.bottom"},
    }
    assert floors(imports)["some.top"] == 3
    assert reachable(imports, "some.top") == {"some.bottom", "some.typed", "some.folder.inner"}
    assert imported(ast.parse("from some.bottom import x"), modules(package)) == {"some.bottom"}
    (package / "bottom.py").write_text("import some.top")
    with pytest.raises(graphlib.CycleError):
        floors(graph(package))


def in_words(paths: set[Path]) -> str:
    """A path a line, from the repository's root."""
    return "\n".join(sorted(str(path.relative_to(ROOT)) for path in paths))


@pytest.mark.slow
def test_the_path_of_a_step_is_listed(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs COSMOS and notes the files whose functions are called. Would catch a file that a step passes through and the
    page does not list, and one that it lists and no run passes through."""
    losses = ROOT / "plugins" / "distill_cosmos" / "losses.py"
    before: set[Path] = set()  # up to the first loss
    steps: set[Path] = set()  # from there to the last loss, whole steps
    pending: set[Path] = set()  # since the latest loss: what follows the last one is the run's end

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or code.co_name.startswith("<") or not code.co_filename.startswith(str(ROOT)):
            return
        path = Path(code.co_filename)
        pending.add(path)
        if path == losses and code.co_name == "forward":
            (steps if losses in before else before).update(pending)
            pending.clear()

    monkeypatch.chdir(tmp_path)
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        main(["run", str(tiny_recipe), "--set", "evaluate=null"])
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    listed = path_of_a_step()
    assert listed[0] == CORE / "cli.py"
    assert losses in listed
    ours = {path for path in steps if path.is_relative_to(CORE) or path.is_relative_to(ROOT / "plugins")}
    assert len(ours) > 15
    unlisted, not_run = ours - set(listed), set(listed) - before - steps
    assert not unlisted, f"a step passes through these, and the page does not list them:\n{in_words(unlisted)}"
    assert not not_run, f"the page lists these, and the run did not pass through them:\n{in_words(not_run)}"


def test_the_plugin_that_the_docs_show_is_the_example() -> None:
    """docs/example_plugin is installed and trained with in test_example.py: a page that showed something else would not
    be tested."""
    page = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    project = ROOT / "docs" / "example_plugin"
    for path in ("pyproject.toml", "example_plugin/__init__.py", "example_plugin/components.py"):
        assert (project / path).read_text(encoding="utf-8").strip() in page, f"docs/plugins.md has another {path}"
