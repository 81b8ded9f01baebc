"""The process: its device, threads, signals and random numbers."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch

from distill_core.errors import UserError

SAME_SIGNAL = 5.0
"""A scheduler sends SIGTERM to all processes of a job, and a launcher among them passes it on: that is one signal."""


class Interrupt:
    """SIGINT, SIGTERM and SIGHUP set `signal`; the loop saves and stops. A second one stops at once, unless `busy`
    says that a checkpoint is being written, or it is SIGTERM again within `SAME_SIGNAL` seconds.

    `doing` is shown at the first one.
    """

    def __init__(self, say: Callable[[str], None], doing: str = "saving after this step ...") -> None:
        self.say = say
        self.doing = doing
        self.signal: int | None = None
        self.reason: str | None = None
        """Why, where it was no signal."""
        self._since = 0.0
        self.busy: Callable[[], bool] = lambda: False

    def stop(self, reason: str) -> None:
        """As a first SIGTERM, from the program itself."""
        if self.signal is None:
            self.signal, self.reason, self._since = signal.SIGTERM, reason, time.monotonic()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals inside this context; only in the main thread, which receives them."""
        handlers = {}
        try:
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # not every system has SIGHUP
                if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                    continue  # ignored: started by nohup, to outlive the terminal
                handlers[number] = signal.signal(number, self._handle)
        except ValueError:
            handlers = {}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        name = signal.Signals(number).name
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
            self.say(f"{name}: {self.doing}")
        elif number == self.signal == signal.SIGTERM and time.monotonic() - self._since < SAME_SIGNAL:
            return
        elif self.busy():
            self.say(f"{name}: a checkpoint is being written; the run ends after it")
        else:
            raise KeyboardInterrupt


def end_with_parent(parent: int, number: int) -> None:
    """Have the system send this process the signal `number` when its `parent` ends, however that ends (on Linux)."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it had ended before
        os._exit(128 + number)


def resolve_device(name: str, option: str = "train.device") -> torch.device:
    """`auto` or a torch device name. Raises `UserError`, which names the `option`, for one that is not available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{option}: {name!r} is not available here: {str(error).splitlines()[0]}") from error
    return device


def set_matmul_precision(precision: Literal["high", "highest"]) -> None:
    """Set the precision of fp32 matrix products on CUDA (`train.matmul_precision`); a CPU's are unaffected."""
    # by the older of torch's two interfaces: after the newer one, reading the older is an error
    torch.backends.cuda.matmul.allow_tf32 = precision == "high"


def arithmetic(precision: str, matmul_precision: str, device: torch.device) -> str:
    """The arithmetic of a step on `device`, for the log: "bf16 on cuda:0, fp32 products in TF32"."""
    products = {"high": ", fp32 products in TF32", "highest": ", fp32 products in fp32"}[matmul_precision]
    return f"{precision} on {device}{products if device.type == 'cuda' else ''}"


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reading_threads(device: torch.device) -> int:
    """Threads that read items for a model on `device`: none on a CPU, whose cores all compute."""
    return 0 if device.type == "cpu" else min(16, max(1, cores() // _ranks_here()))


def _ranks_here() -> int:
    """The ranks that share this machine's cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def set_threads(threads: int | None, workers: int, device: torch.device) -> None:
    """Set torch's CPU threads. None: on a CPU this rank's share of the cores, less those that its loader's workers
    take; elsewhere torch's default."""
    if threads is not None:
        torch.set_num_threads(threads)
    elif device.type == "cpu":
        torch.set_num_threads(max(1, cores() // _ranks_here() - workers))


def keep_freed_memory() -> None:
    """Have the C library keep large blocks that are freed, where it is glibc.

    It hands them back to the system otherwise, and each step's tensors are faulted in page by page again (measured:
    dev/LOG.md). What a step has needed at most stays with the process.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large one
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


COLLECT_EVERY = 100
"""Steps between collections of garbage in training."""


class Garbage:
    """Python's cyclic garbage while `garbage_at_fixed_steps` is entered."""

    def collect(self, step: int) -> None:
        """Call after each step: collects it where that is due."""
        if step % COLLECT_EVERY == 0:
            gc.collect()

    @contextmanager
    def automatic(self) -> Iterator[None]:
        """Python collects by itself, inside: in a validation, where ranks do not step together and much may be made."""
        gc.enable()
        try:
            yield
        finally:
            gc.disable()


@contextmanager
def garbage_at_fixed_steps() -> Iterator[Garbage]:
    """Python's cyclic garbage is collected only where what this yields is called with a step, and that every 100.

    So all ranks pause at the same steps, not each of them at its own while the others wait. What is alive already is
    not looked through again.
    """
    collects = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield Garbage()
    finally:
        gc.unfreeze()
        if collects:
            gc.enable()


def seed_all(seed: int) -> None:
    """Seed torch, Python and numpy: components may draw from any of them."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def get_random(device: torch.device) -> dict[str, Any]:
    """The state of the generators of the CPU and of `device`, as plain data and tensors that
    `torch.load(weights_only=True)` takes."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random(state: Mapping[str, Any], device: torch.device) -> None:
    """The inverse of `get_random`."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
