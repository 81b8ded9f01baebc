"""A run of several ranks that fails names the first error and its rank in one line, and all ranks end."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import torch.distributed as dist

from distill_core.errors import OtherRankFailed, UserError
from distill_core.system import distributed


@contextmanager
def failures_named() -> Iterator[None]:
    """Around all that ranks do together.

    An error of this rank is made known to the others. One that only follows from another rank's end becomes
    `OtherRankFailed`, which names that rank and its error; the first rank that comes so far says it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt:
        if (peers := distributed.peers()) is not None:
            peers.fail("it was interrupted by a second signal")
        raise
    except Exception as error:
        if (peers := distributed.peers()) is None:
            raise
        first = peers.culprit() if is_consequence(error) else None
        if first is None or first.ranks == (peers.rank,):
            line = one_line(error)
            peers.fail(line)
            if not isinstance(error, UserError):  # a bug: its traceback follows
                click.echo(f"rank {peers.rank}: {line}", err=True)
            _end_without_waiting(error)
            raise
        line = f"{first}. All ranks end; what was saved last can be resumed"
        consequence = OtherRankFailed(line, speaks=peers.is_first("to name the error"))
        _end_without_waiting(consequence)
        raise consequence from None


def _terminate(number: int, frame: object) -> None:
    """By SIGTERM torchrun ends all ranks once one has failed: one that ends of that already is left to say so."""
    error = sys.exception()
    if not (isinstance(error, Exception) and is_consequence(error)):
        raise SystemExit(128 + number)


def _end_without_waiting(error: Exception) -> None:
    """Once it has been printed: threads of torch end with their collectives, which other ranks may never reach."""

    def end(code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(end, error.exit_code if isinstance(error, UserError) else 1)


def is_consequence(error: Exception) -> bool:
    """Whether an error says no more than that other ranks have ended, or do not answer."""
    if isinstance(error, OtherRankFailed | distributed.RanksApart | dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)  # which raises no class of its own


def one_line(error: Exception) -> str:
    """What it is, and of a bug where it was raised."""
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, UserError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {text}{place}"
