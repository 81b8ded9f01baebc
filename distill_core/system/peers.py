"""What ranks know of one another beside their collectives: who lives, who failed first, who stalls.

By the launch's store and a thread of each rank, so that it works while ranks are stuck in a collective.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click
import torch.distributed as dist

BEAT = 0.5
"""Seconds between a rank's signs of life."""
SILENT = 4.0
"""A rank without one for so long has ended, where a collective has failed."""
LOST = 120.0
"""The same where nothing else says that it has: something may keep its thread from running."""
GRACE = 20.0
"""Seconds for a rank to end by itself once another one has failed; then it is ended, whatever it waits for."""


@dataclass(frozen=True)
class FirstError:
    """What ended a run: `line` is what the failed rank said of it, None where it ended without a word.

    `places`: rank -> host and pid. No rank: the store itself is gone.
    """

    ranks: tuple[int, ...]
    line: str | None
    places: Mapping[int, str]

    def __str__(self) -> str:
        if not self.ranks:
            return self.line or ""
        who = " and ".join(f"rank {rank} ({self.places.get(rank, 'not started')})" for rank in self.ranks)
        if self.line is not None:
            return f"{who} failed first: {self.line}"
        ended = "has ended" if len(self.ranks) == 1 else "have ended"
        return f"{who} {ended} without a word: killed, most likely because memory ran out, or crashed"


def _store_gone(problem: Exception) -> FirstError:
    why = str(problem).splitlines()[0][:100]
    return FirstError((), f"the launch's store does not answer: rank 0, or torchrun, has ended ({why})", {})


class Peers:
    """This rank's view of the others."""

    def __init__(self, store: Any, rank: int, world: int, exit_code: int) -> None:
        """`store` is torch's, with a connection of its own: no thread that waits in it may hold up this one's.

        A rank that does not end by itself once another one has failed ends with `exit_code`.
        """
        self.exit_code = exit_code
        self.store = dist.PrefixStore("peers", store)  # type: ignore[attr-defined]
        self.rank, self.world = rank, world
        self._closed = threading.Event()
        self.store.set(f"place/{rank}", f"{socket.gethostname()}, pid {os.getpid()}")
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()
        atexit.register(self._end_thread)  # Python would end it in the middle of a call of the store's, and abort

    def fail(self, line: str) -> None:
        """This rank ends of an error. Only the first of the launch is remembered."""
        self._record((self.rank,), line)

    def first_error(self) -> FirstError | None:
        """That of the launch so far, of whichever rank."""
        if not self.store.check(["error"]):
            return None
        ranks, line = json.loads(self.store.get("error"))
        return FirstError(tuple(ranks), line, {rank: self._place(rank) for rank in ranks})

    def culprit(self) -> FirstError | None:
        """Call where a collective has failed: the rank that failed first, or has ended. None where all others live.

        Takes up to `SILENT` seconds.
        """
        try:
            beats, end = self._beats(), time.monotonic() + SILENT
            while time.monotonic() < end:
                if (error := self.first_error()) is not None:
                    return error
                time.sleep(0.1)
            silent = [rank for rank, beat in self._beats().items() if beat == beats[rank] and not self._has_left(rank)]
            if silent:
                self._record(tuple(silent), None)
            return self.first_error()
        except dist.DistError as problem:
            return _store_gone(problem)

    def is_first(self, of: str) -> bool:
        """True on the first rank that asks, so that one alone says it."""
        try:
            return bool(self.store.add(f"first/{of}", 1) == 1)
        except dist.DistError:  # rank 0, which held the store, has ended
            return self.rank == 1

    def publish(self, key: str, value: str) -> None:
        """For `published` on any rank."""
        self.store.set(f"{key}/{self.rank}", value)

    def published(self, key: str) -> dict[int, str | None]:
        """What each rank has published under this key; None of one that has not."""
        return {rank: self._get(f"{key}/{rank}") for rank in range(self.world)}

    def place(self, rank: int) -> str:
        """`rank 1 (host, pid 4711)`."""
        return f"rank {rank} ({self._place(rank)})"

    def close(self) -> None:
        """This rank leaves in good order."""
        if self._closed.is_set():
            return
        self._end_thread()
        try:
            self.store.set(f"left/{self.rank}", "")
        except dist.DistError:  # rank 0, which held the store, has left before
            return

    def _end_thread(self) -> None:
        self._closed.set()
        self._thread.join(10 * BEAT)

    def _get(self, key: str) -> str | None:
        return self.store.get(key).decode() if self.store.check([key]) else None

    def _place(self, rank: int) -> str:
        return self._get(f"place/{rank}") or "not started"

    def _has_left(self, rank: int) -> bool:
        return bool(self.store.check([f"left/{rank}"]))

    def _beats(self) -> dict[int, int]:
        """Of the others."""
        return {rank: self.store.add(f"beat/{rank}", 0) for rank in range(self.world) if rank != self.rank}

    def _record(self, ranks: tuple[int, ...], line: str | None) -> None:
        self.store.compare_set("error", "", json.dumps([ranks, line]))

    def _watch(self) -> None:
        """Give signs of life; look at those of the next rank, so that a launch's ranks ask for as many as they are."""
        after = (self.rank + 1) % self.world
        last, since, failed_at = -1, time.monotonic(), None
        while not self._closed.wait(BEAT):
            try:
                self.store.add(f"beat/{self.rank}", 1)
                beat = self.store.add(f"beat/{after}", 0)
                if beat != last:
                    last, since = beat, time.monotonic()
                elif time.monotonic() - since > LOST and not self._has_left(after):
                    self._record((after,), None)
                error = self.first_error()
                said = error is not None and failed_at is not None and self._is_late(failed_at)
                speaks = said and self.is_first("to name the error")
            except dist.DistError as problem:
                error, speaks = _store_gone(problem), self.rank == 1
            if error is None or error.ranks == (self.rank,) or self._closed.is_set():
                continue
            failed_at = failed_at or time.monotonic()
            if self._is_late(failed_at):
                if speaks:
                    click.echo(f"rank {self.rank}: {error}; this rank did not end by itself", err=True)
                os._exit(self.exit_code)

    @staticmethod
    def _is_late(failed_at: float) -> bool:
        return time.monotonic() - failed_at > GRACE
