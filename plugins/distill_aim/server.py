"""`aim up` in a session of its own, which ends with all it has started: `python -m distill_aim.server PARENT ...`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

PATIENCE = 5.0
"""Seconds for the server to end by itself."""


class _Stopped(Exception):
    pass


def serve(arguments: Sequence[str]) -> int:
    """Run `aim ARGUMENTS` until it ends or a signal comes; the exit code. Nothing of it is left afterwards.

    Aim starts its web server as another process, which a signal to Aim alone would leave behind, and the port taken.
    """
    caught = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal caught
        caught = caught or number
        raise _Stopped

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    command = [sys.executable, "-m", "distill_aim.server", str(os.getpid()), *arguments]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait()
    except _Stopped:
        code = 128 + caught
        with suppress(_Stopped, subprocess.TimeoutExpired):  # a second signal ends the wait
            os.killpg(process.pid, signal.SIGINT)
            process.wait(PATIENCE)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return code


def _end_with(parent: int) -> None:
    """End this session once the process that started it is gone, killed perhaps."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Aim's own command line, in a session that ends with the process whose number is the first argument."""
    from aim.cli.cli import cli_entry_point

    threading.Thread(target=_end_with, args=(int(sys.argv.pop(1)),), daemon=True).start()
    cli_entry_point()


if __name__ == "__main__":
    main()
