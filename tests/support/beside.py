"""Modules that lie beside a test: tests run with --import-mode=importlib and are no package."""

import importlib.util
from pathlib import Path
from types import ModuleType


def load_beside(file: str, name: str) -> ModuleType:
    """The module `name`.py in the folder of `file`."""
    path = Path(file).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
