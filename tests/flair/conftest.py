"""Loads modules by their path: the tests run with --import-mode=importlib and are no package."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"flair_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def transcription() -> ModuleType:
    return load("transcription")


@pytest.fixture(scope="session")
def step() -> ModuleType:
    return load("distributed_step")
