"""Several ranks on this machine, by torch's own launcher: what `torchrun --standalone` starts, without its banners."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from uuid import uuid4

import click

from distill_core.errors import OtherRankFailed, RecipeErrors, counted

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

SECONDS_TO_SAVE = 3600
"""After a signal: a rank that has not ended by then is killed."""


def are_to_start(count: int | None) -> bool:
    """Whether this process is to start `count` ranks (`--nproc`): it was asked to, and is none of them itself.

    Raises `RecipeErrors` in a rank of a launch that has another number of ranks on this machine.
    """
    if "WORLD_SIZE" not in os.environ:
        return count is not None and count > 1
    launched = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if count is not None and count != launched:
        raise RecipeErrors(
            [f"--nproc {count}: the launcher (WORLD_SIZE is set) started {launched} on this machine; leave --nproc out"]
        )
    return False


def require_devices(count: int, device: str) -> None:
    """Raise `RecipeErrors` where `train.device: DEVICE` has not a GPU for each of the ranks; no GPU is touched."""
    import torch

    kind, _, index = device.partition(":")
    gpus = torch.cuda.device_count()
    if kind == "cpu" or (kind == "auto" and not gpus):
        return
    if index or gpus < count:
        there = f"train.device: {device} is one GPU" if index else f"this machine has {counted(gpus, 'GPU')}"
        raise RecipeErrors([f"--nproc {count}: {there}, and each rank needs its own"])


def start_ranks(count: int, arguments: Sequence[str]) -> int:
    """Run `distill ARGUMENTS` as `count` ranks, to the end; returns the exit code of what they did together.

    A signal goes to all of them, and the code is 128 + its number; a second one ends them at once.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # the ranks say themselves what went wrong
    launcher_log = logging.getLogger("torch.distributed.elastic")
    launcher_log.propagate = False
    launcher_log.addHandler(logging.NullHandler())
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    if not hasattr(LaunchConfig, "shutdown_timeout"):
        _let_ranks_save()
    handled = [name for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if not _is_ignored(name)]
    with TemporaryDirectory(prefix="distill-ranks-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=str(uuid4()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            signals_to_handle=",".join(handled),
        )
        # -P: the folder that this was started in must not hide an installed package; torch replaces ${local_rank}
        command = ["-P", "-m", "distill_core.cli", *(argument.replace("$", "$$") for argument in arguments)]
        try:
            elastic_launch(config, sys.executable)(*command)
        except SignalException as end:
            return 128 + end.sigval
        except ChildFailedError as error:
            return _exit_code(error.failures.values())
    return 0


def _let_ranks_save() -> None:
    """Up to torch 2.11 the launcher kills ranks 30 s after it has passed a signal on, and has no option for that."""
    from torch.distributed.elastic.multiprocessing import PContext, SignalException

    close = PContext.close

    def patient(self: PContext, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        signalled = isinstance(sys.exception(), SignalException)  # else one of them has failed
        close(self, death_sig, int(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) if signalled else timeout)

    PContext.close = patient  # type: ignore[method-assign]


def _is_ignored(name: str) -> bool:
    """As SIGHUP is under `nohup`; and where the system has no such signal."""
    number = getattr(signal, name, None)
    return number is None or signal.getsignal(number) == signal.SIG_IGN


def _exit_code(failures: Iterable[ProcessFailure]) -> int:
    """That of the rank with an error of its own; else that of ranks which named another one's end.

    Where none came to say it, the rank that a signal has killed is named here.
    """
    failures = sorted(failures, key=lambda failure: failure.timestamp)
    codes = [failure.exitcode for failure in failures]
    if own := [code for code in codes if 0 < code < OtherRankFailed.exit_code]:
        return own[0]
    if OtherRankFailed.exit_code in codes:
        return OtherRankFailed.exit_code
    killed = [failure for failure in failures if failure.exitcode < 0]
    if not killed:
        return codes[0]
    first = killed[0]
    click.echo(f"rank {first.local_rank} (pid {first.pid}) was killed by {first.signal_name()}", err=True)
    return 128 - first.exitcode
