"""What is loaded once for the folder's tests."""

from types import ModuleType

import pytest
from beside import load_beside


@pytest.fixture(scope="session")
def transcription() -> ModuleType:
    return load_beside(__file__, "transcription")


@pytest.fixture(scope="session")
def steps() -> ModuleType:
    return load_beside(__file__, "steps")
