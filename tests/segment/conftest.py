"""What the folder's tests share."""

from __future__ import annotations

from typing import Any

import pytest
from colours import SeesColours


@pytest.fixture
def sees_colours() -> Any:
    """A model whose findings can be worked out by hand."""
    return SeesColours()
