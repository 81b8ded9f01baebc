"""A rank that stalls, in its loader, in a component or in a collective, is named, and its stack is written down."""

from __future__ import annotations

import faulthandler
import json
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from distill_core.system import distributed, transfer
from distill_core.system.files import cannot_write
from distill_core.system.peers import Peers

LOOKS, APART = 4, 0.1
"""At where the rank is, and seconds between them: one that is in a collective for a moment only does not wait there."""
SECONDS_TO_ANSWER = 4.0
"""For the other ranks, to say where they are."""
WAITING = (str(Path(dist.__file__).parent), distributed.__file__, transfer.__file__)
"""Code in which a rank waits for others, or for its device, which may wait for others."""
TORCH, STANDARD, INSTALLED = (
    str(Path(torch.__file__).parent),
    sysconfig.get_path("stdlib"),
    sysconfig.get_path("purelib"),
)


class StallWatch:
    """Watches the training thread from another one, while `running`.

    Of several ranks those that are stuck in a collective wait for one that is not: that one is named. Where all wait
    for one another, or one does not answer, that is said instead, once.
    """

    def __init__(self, run: Path, seconds: float, warn: Callable[[str], None], more: Callable[[], str]) -> None:
        """`more` is asked for further stacks, those of the loader's workers."""
        self.folder, self.seconds, self.warn, self.more = run / "stalls", seconds, warn, more
        self._step, self._since, self._after = 0, time.monotonic(), seconds
        self._closed = threading.Event()

    def step(self, step: int) -> None:
        """Call where `step` steps are done."""
        self._step, self._since, self._after = step, time.monotonic(), self.seconds

    @contextmanager
    def running(self) -> Iterator[None]:
        """Call in the thread that trains."""
        trainer = threading.get_ident()
        thread = threading.Thread(target=self._watch, args=(trainer,), name="stalls", daemon=True)
        self._since = time.monotonic()
        thread.start()
        try:
            yield
        finally:
            self._closed.set()
            thread.join()

    def _watch(self, trainer: int) -> None:
        while not self._closed.wait(min(1.0, self.seconds / 4)):
            step, seconds = self._step, self._after
            if time.monotonic() - self._since >= seconds:
                self._after = 2 * seconds
                try:
                    self._report(trainer, step, seconds)
                except dist.DistError:  # the launch's store is gone, of which all ranks end
                    return

    def _report(self, trainer: int, step: int, seconds: float) -> None:
        place, waits = _place(trainer)
        path = self._write(step, seconds)
        peers = distributed.peers()
        who = "" if peers is None else f"{peers.place(peers.rank)}: "
        line = f"no step for {seconds:g} s after step {step}"
        if peers is not None:
            key = f"stall/{step}/{seconds:g}"
            peers.publish(key, json.dumps([place, waits]))
            if waits:
                self._judge(peers, key, line)
                return
        self.warn(f"{who}{line}: it is {place}. Its stack: {path}")

    def _judge(self, peers: Peers, key: str, line: str) -> None:
        """By the first of the ranks that wait: whether another one has said that it does not."""
        if not peers.is_first(key) or self._closed.wait(SECONDS_TO_ANSWER):
            return
        answers = {rank: json.loads(answer) if answer else None for rank, answer in peers.published(key).items()}
        silent = [peers.place(rank) for rank, answer in answers.items() if answer is None]
        if silent:
            who = ", ".join(silent)
            self.warn(f"{line}: no answer from {who}, for which the others wait. Their stacks: {self.folder}")
        elif all(answer is not None and answer[1] for answer in answers.values()):
            places = "; ".join(f"rank {rank} is {answer[0]}" for rank, answer in answers.items() if answer is not None)
            self.warn(f"{line}: all ranks wait for one another: {places}. Their stacks: {self.folder}")

    def _write(self, step: int, seconds: float) -> Path:
        """The stacks of all threads, the most recent call first."""
        path = self.folder / f"rank-{distributed.rank()}.txt"
        try:
            self.folder.mkdir(exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%F %T')}: {seconds:g} s after step {step}\n\n")
                file.flush()
                faulthandler.dump_traceback(file)
                file.write(f"{self.more()}\n")
        except OSError as error:
            self.warn(cannot_write(path, error))
        return path


def _place(thread: int) -> tuple[str, bool]:
    """Where a thread is, of our code or a plugin's, and whether it waits there for other ranks."""
    waits = 0
    for look in range(LOOKS):
        if look:
            time.sleep(APART)
        frames = list(_stack(sys._current_frames().get(thread)))
        waits += any(frame.f_code.co_filename.startswith(WAITING) for frame in frames[:6])
    own = next((frame for frame in frames if not _is_library(frame.f_code.co_filename)), None)
    if own is None:
        return "at an unknown place", waits == LOOKS
    code = own.f_code
    return f"in {code.co_qualname} ({code.co_filename}:{own.f_lineno})", waits == LOOKS


def _is_library(file: str) -> bool:
    """Torch's or Python's own, where the reason of a stall is seldom to be seen."""
    return file.startswith((TORCH, "<")) or (file.startswith(STANDARD) and not file.startswith(INSTALLED))


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    """The innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back
