"""An Aim repository that is whole from the first moment, and that never keeps a process from ending."""

from __future__ import annotations

import atexit
import fcntl
import itertools
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import click

EXIT_LIMIT = 10.0
"""Seconds that Aim may take to close what is open when the process ends."""


def prepare(folder: Path) -> None:
    """Have a whole repository `folder/.aim`; one that a killed run left half made is set aside, with a line.

    Aim itself makes one in some seconds, in its place, where it stops every run that meets it unfinished.
    """
    repository = folder / ".aim"
    if _whole(repository):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".aim.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _whole(repository):  # made by another run in the meantime
            return
        if repository.exists():
            aside = next(path for i in itertools.count(1) if not (path := folder / f".aim-incomplete-{i}").exists())
            repository.rename(aside)
            click.echo(
                f"warning: {repository}: only half made, by a run that was killed; set aside as {aside}", err=True
            )
        for left in folder.glob(".aim-new-*"):
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(prefix=".aim-new-", dir=folder) as new:
            from aim.sdk.repo import Repo

            created = Repo(new, init=True)
            assert created.structured_db is not None
            created.structured_db.engine.dispose()
            os.rename(Path(new) / ".aim", repository)


def _whole(repository: Path) -> bool:
    """Whether Aim came to the end of making it: VERSION is what it writes last."""
    try:
        return bool((repository / "VERSION").read_text().strip())
    except (FileNotFoundError, NotADirectoryError):
        return False


def limit_exit() -> None:
    """Put a limit on Aim's work at the end of the process.

    Its own waits for ever where closing a run fails, or where a thread that writes has died, as on a full disk.
    """
    from aim.ext.cleanup import AutoClean

    atexit.unregister(AutoClean.cleanup)
    atexit.unregister(_close_all)
    AutoClean._registered_with_atexit = True  # or the next run would register it again
    atexit.register(_close_all)


def _close_all() -> None:
    from aim.ext.cleanup import AutoClean

    open_things: dict[Any, tuple[int, Any]] = AutoClean._finalizers  # type: ignore[misc]
    errors: list[Exception] = []

    def close() -> None:
        # as Aim does: runs, then their files, then repositories; of each the last one first
        by_priority = sorted(open_things.values(), key=lambda entry: entry[0])
        for _, finalizer in by_priority[::-1]:
            try:
                finalizer()
            except Exception as error:
                errors.append(error)

    thread = threading.Thread(target=close, name="aim-close", daemon=True)
    thread.start()
    thread.join(EXIT_LIMIT)
    if thread.is_alive():
        for _, finalizer in list(open_things.values()):
            finalizer.detach()  # or the garbage collector would call it, and wait
        click.echo(f"warning: Aim did not close its runs within {EXIT_LIMIT:.0f} s; left as they are", err=True)
    elif errors:
        click.echo(f"warning: Aim could not close its runs ({type(errors[0]).__name__}: {errors[0]})", err=True)
