"""Who may import whom, and that the core knows no method and no modality. Read from the syntax tree, nothing is run."""

import ast
import functools
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    path.parent.name: path.parent
    for place in (ROOT, ROOT / "plugins", ROOT / "kernels")
    for path in place.glob("distill_*/__init__.py")
}
SHARED = {"distill_core", "distill_kernels", "distill_vl", "distill_tasks", "distill_drawn", "distill_layouts"}
MAY_IMPORT = {
    "distill_core": {"distill_core"},
    "distill_kernels": {"distill_kernels"},
    "distill_vl": {"distill_core", "distill_kernels", "distill_vl"},
    "distill_tasks": {"distill_core", "distill_tasks"},
    "distill_drawn": {"distill_core", "distill_drawn"},
    "distill_layouts": {"distill_core", "distill_tasks", "distill_layouts"},
    "distill_cosmos_variants": SHARED | {"distill_cosmos", "distill_cosmos_variants"},
}
INSIDE_FUNCTIONS = {
    "torchvision",
    "timm",
    "webdataset",
    "torchdata",
    "aim",
    "matplotlib",
    "transformers",
    "ftfy",
    "submitit",
}
"""Too slow to import for a component module: every command would pay for it."""


def called(node: ast.Call) -> str:
    """`f` of `f()` and of `module.f()`."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


@functools.cache
def parse(source: str) -> ast.Module:
    """Each file is asked several questions."""
    return ast.parse(source)


@functools.cache
def imports_of(source: str) -> list[tuple[int, str, bool]]:
    return list(imports(parse(source)))


def imports(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """(line, top-level package, whether it is imported with the module) of every import, of strings too."""
    inside = {
        id(below)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for below in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "" if node.level == 0 else "."]
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        for name in names:
            yield node.lineno, name.split(".")[0], id(node) not in inside


def files(package: str) -> list[Path]:
    found = sorted(PACKAGES[package].rglob("*.py"))
    assert found
    return found


def forbidden_imports(source: str, package: str) -> list[tuple[int, str]]:
    may = MAY_IMPORT.get(package, SHARED | {package})
    return [
        (line, name)
        for line, name, _ in imports_of(source)
        if (name.startswith("distill_") and name not in may) or name in ("plugins", "kernels", "tests")
    ]


def test_all_packages_are_found() -> None:
    """Guards the tests below against an empty list."""
    assert set(PACKAGES) >= SHARED | {"distill_cosmos", "distill_clip", "distill_emoji", "distill_aim"}


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_who_may_import_whom(package: str) -> None:
    """Core and kernels import no local package; a plugin core, kernels, what is shared, and itself; never another
    method (but for the variants of COSMOS)."""
    wrong = {
        f"{path.relative_to(ROOT)}:{line}": name
        for path in files(package)
        for line, name in forbidden_imports(path.read_text(), package)
    }
    assert wrong == {}


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_slow_packages_are_imported_inside_functions(package: str) -> None:
    wrong = {
        f"{path.relative_to(ROOT)}:{line}": name
        for path in files(package)
        for line, name, at_once in imports_of(path.read_text())
        if at_once and name in INSIDE_FUNCTIONS
    }
    assert wrong == {}


def test_the_import_check_finds_what_it_should() -> None:
    """Guards the tests above."""
    source = (
        "import distill_core.outputs\nfrom distill_clip.components import Clip\n"
        "def f():\n    import distill_emoji, torchvision\n    importlib.import_module('distill_aim.tracker')\n"
        "from plugins.distill_vl import vit\nimport aim.sdk\n"
    )
    assert sorted(forbidden_imports(source, "distill_cosmos")) == [
        (2, "distill_clip"),
        (4, "distill_emoji"),
        (5, "distill_aim"),
        (6, "plugins"),
    ]
    assert [name for _, name, at_once in imports_of(source) if at_once and name in INSIDE_FUNCTIONS] == ["aim"]


TOOLS = {
    "distill_aim",
    "distill_authoring",
    "distill_composition",
    "distill_data",
    "distill_explore",
    "distill_scale",
    "distill_segment",
    "distill_study",
    "distill_tasks",
    "distill_weights",
}
"""Commands, studies, authors' tools, tasks, export: these may import `distill_core.tools` beside the public surface."""
TOOL_MODULES = {"bench.py", "choices.py", "commands.py", "site_hook.py"}
"""Files elsewhere that are tools."""
OURS = sorted([*(ROOT / "plugins").rglob("*.py"), *(ROOT / "docs").rglob("*.py")])


def behind_the_surface(source: str, *, tool: bool) -> list[tuple[int, str]]:
    """(line, module) of each import of core that is neither `distill_core` nor, of a tool, `distill_core.tools`."""
    found = []
    for node in ast.walk(parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = ["distill_core.tools"] if "distill_core.tools" in whole else [node.module or ""]
        elif isinstance(node, ast.Call) and called(node) == "import_module":
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        allowed = {"distill_core", "distill_core.tools"} if tool else {"distill_core"}
        found += [(node.lineno, name) for name in names if name.split(".")[0] == "distill_core" and name not in allowed]
    return found


def is_tool(path: Path) -> bool:
    """The template's components are a method's, though the package that holds it is a tool; its tests run commands."""
    inside = path.relative_to(ROOT).parts
    if "template" in inside:
        return "tests" in inside
    return path.name in TOOL_MODULES or bool(TOOLS & set(inside))


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_plugins_import_the_public_surface_alone(path: Path) -> None:
    """A built-in uses nothing that a stranger's plugin cannot rely on."""
    assert behind_the_surface(path.read_text(encoding="utf-8"), tool=is_tool(path)) == []


def test_the_surface_check_finds_what_it_should() -> None:
    """Guards the test above."""
    source = (
        "from distill_core import Loss\nfrom distill_core.outputs import Rows\nimport distill_core.train\n"
        "def f():\n    from distill_core.tools import main\n    from distill_core import tools\n"
        "    import_module('distill_core.objective')\n"
    )
    assert sorted(behind_the_surface(source, tool=True)) == [
        (2, "distill_core.outputs"),
        (3, "distill_core.train"),
        (7, "distill_core.objective"),
    ]
    assert {line for line, _ in behind_the_surface(source, tool=False)} == {2, 3, 5, 6, 7}


@pytest.mark.parametrize("module", ["distill_core", "distill_core.tools"])
def test_types_and_table_of_the_surface_are_one(module: str) -> None:
    """mypy reads the block for types, Python the table: would catch a name in one alone, or of another module."""
    surface = importlib.import_module(module)
    tree = ast.parse(Path(str(surface.__file__)).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert typed == surface.HOMES
    assert [name for name in surface.HOMES if getattr(surface, name, None) is None] == []
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        surface.nothing  # noqa: B018


@pytest.mark.parametrize("module", ["distill_core", "distill_core.tools"])
def test_every_public_name_is_documented(module: str) -> None:
    """docs/plugins.md lists each by the module that defines it."""
    page = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    section = page.split("## The public surface")[1].split("\n## ")[0]
    listed = dict.fromkeys(re.findall(r"`(\w+)`", section))
    assert [name for name in importlib.import_module(module).HOMES if name not in listed] == []


def test_the_surface_is_loaded_lazily() -> None:
    """`distill --help` loads every plugin, and so this: it would take seconds with torch."""
    code = "import sys, distill_core, distill_core.tools; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


METHODS = {
    "cosmos",
    "clip",
    "openclip",
    "siglip",
    "slip",
    "silc",
    "flair",
    "flava",
    "dino",
    "dinov2",
    "ibot",
    "tips",
    "byol",
    "simclr",
    "moco",
    "vit",
    "bert",
}
MODALITIES = {
    "image",
    "images",
    "text",
    "texts",
    "caption",
    "captions",
    "audio",
    "video",
    "pixel",
    "pixels",
    "sentence",
    "sentences",
    "language",
    "vision",
    "visual",
}
THEIRS = {"clip_grad", "clip_grads_with_norm_", "ImageDraw", "ImageFont", "TextColumn", "rich.text"}
"""Gradient clipping by torch's own names, Pillow's, with which sheets for trackers are drawn, and rich's."""


def parts(identifier: str) -> set[str]:
    """The words of a snake_case or CamelCase name."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+\d*|[A-Z]+(?![a-z])", identifier)}


def words_of_methods(source: str) -> list[tuple[int, str]]:
    """Names and strings (docstrings too) that speak of a method, and names and keys that speak of a modality.

    A modality's word is looked for in strings without spaces (`image`, `student.text`: keys) and in compound names
    (`image_size`, `text_width`). Alone, `text` is what a file holds, and `image` is a Tracker's method for pictures.
    """
    tree = parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    tracker = {
        id(node.args[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and node.args and ast.unparse(node.func).endswith("tracker.call")
    }
    found = []
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "arg", "asname", "module"):
            identifier = getattr(node, field, None)
            if not isinstance(identifier, str) or identifier in THEIRS:
                continue
            words = parts(identifier)
            compound = len(words) > 1 and not identifier.endswith(("read_text", "write_text"))
            if words & METHODS or (compound and words & MODALITIES):
                found.append((node.lineno, identifier))
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = set(re.findall(r"[a-z]+\d*", node.value.lower().replace("clip_grad", "")))
            key = not re.search(r"\s", node.value) and id(node) not in prose and id(node) not in tracker
            if words & METHODS or (key and words & MODALITIES):
                found.append((node.lineno, node.value))
    return found


@pytest.mark.slow
def test_extras_that_are_asked_for_exist() -> None:
    """As pip names them: one spelt with an underscore is unknown to pip 23, which Python 3.11 brings."""
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    assert {extra for extra in extras if not re.fullmatch(r"[a-z0-9-]+", extra)} == set()
    asked = {
        node.args[1].value
        for package in PACKAGES
        for path in files(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and called(node) == "require_extra" and isinstance(node.args[1], ast.Constant)
    }
    assert {"open-clip", "hf", "onnx"} <= asked <= extras


@pytest.mark.parametrize("path", files("distill_core"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_names_no_method_and_no_modality(path: Path) -> None:
    """Would catch an `if modality == "image"`, an option `image_size`, or a rule for one method, in the core."""
    assert words_of_methods(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        'x = views["image"]',
        'key = "student.text"',
        'y = f"teacher.{m}.image"',
        "def image_width(): ...",
        "self.text_tower = 1",
        "def f(caption_length=3): ...",
        "class CosmosLoss: ...",
        "clip_loss = 1",
        '"""As in SigLIP."""',
        "raise ValueError('CLIP needs pairs')",
    ],
)
def test_the_word_check_finds_what_it_should(line: str) -> None:
    """Guards the test above."""
    assert words_of_methods(line)


@pytest.mark.parametrize(
    "line",
    [
        "text = path.read_text()",
        "config.clip_grad = 1.0",
        'tracker.call("image", step)',
        '"""Factors by path, as {backbone.text: 0.1}."""',
        "from rich.progress import TextColumn",
    ],
)
def test_the_word_check_passes_what_it_should(line: str) -> None:
    assert words_of_methods(line) == []
