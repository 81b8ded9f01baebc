"""How many samples each shard has, which a run must know before it starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from distill_core.data.opening import is_local
from distill_core.data.shard import Patience, Shard, check, retry
from distill_core.errors import DataError

THREADS = 8
"""Shards that are opened at once."""


@dataclass(frozen=True)
class Lengths:
    """Samples of each shard. Of those that could not be opened, with the reason: the mean of the others is assumed, so
    that they can come back while the run goes on."""

    samples: list[int]
    unopened: dict[int, str] = field(default_factory=dict)


def measure(
    shards: Sequence[Shard], patience: Patience, *, resuming: bool = False, progress: Callable[[], object] | None = None
) -> Lengths:
    """Open every shard. Raises `DataError` for one of this machine that cannot be read, unless a run is resumed, which
    continues without what has gone since; and where none can be read. `progress` is called after each."""
    if not resuming or all(shard.problem() for shard in shards):
        check(shards)

    def length(shard: Shard) -> int | DataError:
        try:
            return retry(lambda: _prepared_length(shard, patience), shard, patience)
        except DataError as error:
            if is_local(shard.name) and not resuming:
                raise
            return error
        finally:
            if progress is not None:
                progress()

    with ThreadPoolExecutor(min(THREADS, len(shards))) as threads:
        lengths = list(threads.map(length, shards))
    opened = [length for length in lengths if isinstance(length, int)]
    unopened = {i: str(length) for i, length in enumerate(lengths) if isinstance(length, DataError)}
    if not opened:
        reason = next(iter(unopened.values()))
        raise DataError(f"no shard can be read: {len(unopened)} of {len(shards)} failed, the first of them {reason}")
    assumed = max(1, round(sum(opened) / len(opened)))
    return Lengths([length if isinstance(length, int) else assumed for length in lengths], unopened)


def _prepared_length(shard: Shard, patience: Patience) -> int:
    shard.prepare(patience)
    return len(shard)
