"""Shards that fail are tried again at once; a server whose requests fail."""

from collections.abc import Iterator

import pytest
from faulty_server import Server


@pytest.fixture(autouse=True)
def no_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_core.data.shard.BACK_OFF", 0.001)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    one = Server()
    yield one
    one.close()
