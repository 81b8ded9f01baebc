"""Shards that fail are tried again at once."""

import pytest


@pytest.fixture(autouse=True)
def no_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_core.data.shards.BACK_OFF", 0.001)
