"""Loads the transcription by its path: the tests run with --import-mode=importlib and are no package."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def transcription() -> ModuleType:
    path = Path(__file__).with_name("transcription.py")
    spec = importlib.util.spec_from_file_location("cosmos_transcription", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
