"""The import graph of a package, read from its syntax trees, and the sizes that docs/architecture.md speaks of.

`python tests/support/import_graph.py` prints the sizes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORE = ROOT / "distill_core"
PAGE = ROOT / "docs" / "architecture.md"

STEP = "From `distill run` to a loss"

Graph = Mapping[str, set[str]]
"""Module -> the modules of the same package that it imports, by dotted names."""


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file of every module; a folder's `__init__` goes by the folder's name."""
    named = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def imported(tree: ast.AST, among: Mapping[str, Path]) -> set[str]:
    """The modules of `among` that a syntax tree imports: at its top, in functions, and for types alone."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "relative imports are not used"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= members
            if members - among.keys():
                names.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return names & among.keys()


def graph(package: Path) -> dict[str, set[str]]:
    """Every module's imports within the package. The package's own `__init__` and `tools` are left out: they are doors,
    which may lead to any module (lazily), while the package's modules take from them only what they define."""
    named = modules(package)
    trees = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in named.items()}
    return {
        module: imported(tree, named) - {module, package.name}
        for module, tree in trees.items()
        if module not in (package.name, f"{package.name}.tools")
    }


def floors(imports: Graph) -> dict[str, int]:
    """Module -> the length of the longest chain of imports below it, 0 for none.

    Raises graphlib.CycleError, whose second argument is the circle, where modules import one another.
    """
    floor: dict[str, int] = {}
    for module in TopologicalSorter(imports).static_order():
        floor[module] = 1 + max((floor[below] for below in imports[module]), default=-1)
    return floor


def reachable(imports: Graph, module: str) -> set[str]:
    """Everything that a module imports, directly or not."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        for below in imports[waiting.pop()] - seen:
            seen.add(below)
            waiting.append(below)
    return seen


def block(heading: str) -> list[str]:
    """The lines of the first code block below a heading of docs/architecture.md."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    match = re.search(r"```\n(.*?)```", section, re.DOTALL)
    assert match, f"no code block below {heading!r}"
    return match[1].splitlines()


def mapped() -> list[Path]:
    """The files and folders that the page's map names, in its order. A line is a name and what it holds; names stand
    below their folder, indented by two spaces."""
    paths: list[Path] = []
    folders: list[Path] = [ROOT]
    for line in filter(str.strip, block("The map")):
        depth = (len(line) - len(line.lstrip())) // 2
        path = folders[depth] / line.split()[0]
        paths.append(path)
        folders = [*folders[: depth + 1], path]
    return paths


def path_of_a_step() -> list[Path]:
    """The files that the page lists from `distill run` to a loss, in its order: a file a line, indented."""
    return [ROOT / line.split()[0] for line in block(STEP) if line.startswith(" ")]


def lines(paths: list[Path]) -> int:
    """How many lines the files have together."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def main() -> None:
    every, top = sorted(CORE.rglob("*.py")), sorted(CORE.glob("*.py"))
    print(f"distill_core: {lines(every):,} lines in {len(every)} files; top level: {lines(top):,} in {len(top)}")
    print(f"import floors: {1 + max(floors(graph(CORE)).values())}, no circle")
    print("from `distill run` to a loss, as docs/architecture.md lists it:")
    part = ""
    parts: dict[str, list[Path]] = {}
    for line in block(STEP):
        if line.startswith(" "):
            parts[part].append(ROOT / line.split()[0])
        else:
            part = line
            parts[part] = []
    for part, paths in parts.items():
        print(f"  {part}: {lines(paths):,} lines in {len(paths)} files")


if __name__ == "__main__":
    main()
