"""Public methods have docstrings where they are declared; an override inherits its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from import_graph import ROOT

SOURCES = ("distill_core", "plugins", "kernels/distill_kernels")
Classes = dict[str, list[tuple[Path, ast.ClassDef]]]


def classes() -> Classes:
    """Every class of the source by its name; modules may share a name."""
    found: Classes = {}
    for source in SOURCES:
        for path in sorted((ROOT / source).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    found.setdefault(node.name, []).append((path, node))
    return found


def base_names(node: ast.ClassDef) -> Iterator[str]:
    """`FusionHead` of `FusionHead`, `Module` of `nn.Module`, `Generic` of `Generic[T]`."""
    for base in node.bases:
        name = base.value if isinstance(base, ast.Subscript) else base
        yield name.attr if isinstance(name, ast.Attribute) else ast.unparse(name)


def inherits(node: ast.ClassDef, method: str, known: Classes) -> bool:
    """Whether a base documents the method; a base of another library may (`nn.Module.forward`)."""
    for name in base_names(node):
        if name not in known:
            return name not in ("ABC", "Generic", "Protocol", "object")
        for _, base in known[name]:
            if documents(base, method) or inherits(base, method, known):
                return True
    return False


def documents(node: ast.ClassDef, method: str) -> bool:
    return any(isinstance(f, ast.FunctionDef) and f.name == method and ast.get_docstring(f) for f in node.body)


def undocumented(known: Classes) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{method.lineno}: {node.name}.{method.name}"
        for entries in known.values()
        for path, node in entries
        if not node.name.startswith("_")
        for method in node.body
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
        if not ast.get_docstring(method) and not inherits(node, method.name, known)
    ]


def test_a_public_method_is_documented_where_it_is_declared() -> None:
    """Catches a method that nothing documents. Ruff's D102 would ask every override for a docstring as well."""
    assert undocumented(classes()) == []


def test_the_rule_finds_what_it_is_for() -> None:
    """A rule that is always met would say nothing: an override passes, a method of its own does not."""
    code = """
class Base(ABC):
    def forward(self): "Documented."
class Child(Base):
    def forward(self): ...
    def other(self): ...
class Foreign(nn.Module):
    def forward(self): ...
"""
    path = ROOT / "example.py"
    known = {node.name: [(path, node)] for node in ast.parse(code).body if isinstance(node, ast.ClassDef)}
    assert undocumented(known) == ["example.py:6: Child.other"]
