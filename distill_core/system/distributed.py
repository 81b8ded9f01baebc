"""The process group: who is in it, the differentiable gather, gradient averaging, and what the hosts tell one another.
All of it is a no-op in one process."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from distill_core.errors import OtherRankFailed, UserError
from distill_core.system.peers import Peers
from distill_core.system.sharded import is_spread

if TYPE_CHECKING:
    from numpy.typing import NDArray

T = TypeVar("T")
_PATIENCE = timedelta(hours=6)
"""How long ranks wait for one another: the first may be writing a checkpoint."""
_control_group: dist.ProcessGroup | None = None
"""For `highest`, so that a rank that calls it out of turn is never paired with another collective."""
_saving_group: dist.ProcessGroup | None = None
"""For the threads that write checkpoints while the ranks train."""
_peers: Peers | None = None
_alone = False


class RanksApart(UserError):
    """Another rank has ended, or did not reach the collective that this one waits in."""


def rank() -> int:
    """This process's rank, 0 in one process."""
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is one without others: a step that is only looked at reaches no collective."""
    global _alone
    _alone, before = True, _alone
    try:
        yield
    finally:
        _alone = before


def start(device: torch.device) -> torch.device:
    """Join the process group that `torchrun` describes in the environment, if it does; returns this rank's device."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if device.type == "cuda":
        if device.index is None:  # some launchers show each rank one GPU
            number = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
            device = torch.device("cuda", number if ranks > 1 else torch.cuda.current_device())
        torch.cuda.set_device(device)
    if ranks > 1 and not dist.is_initialized():
        # gloo beside nccl: flags and objects stay on the CPU. Others wait while the first rank writes checkpoints.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, rank, _ = next(rendezvous("env://"))
        # a restarted launch may share its store with the attempt before, whose addresses and counts are stale
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        attempt_store = dist.PrefixStore(f"attempt-{attempt}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=attempt_store, rank=rank, world_size=ranks, timeout=_PATIENCE)
        global _control_group, _saving_group, _peers
        _control_group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        _saving_group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        connection = attempt_store.clone()  # type: ignore[attr-defined]
        _peers = Peers(connection, rank, ranks, OtherRankFailed.exit_code)
    return device


def peers() -> Peers | None:
    """The other ranks, beside collectives; None in one process."""
    return _peers


def launch() -> str | None:
    """An id that the processes of one `torchrun` share, restarted ones included; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    # "none" is every launch without --rdzv-id: the agent that started this process tells them apart
    return f"{socket.gethostname()}:{os.getppid()}" if name == "none" else name


def restarted() -> bool:
    """Whether `torchrun --max-restarts` has started this process in place of one that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def stop() -> None:
    """Leave the process group."""
    global _control_group, _saving_group, _peers
    if dist.is_initialized():
        if _peers is not None:
            _peers.close()
        _control_group = _saving_group = _peers = None
        dist.destroy_process_group()


# torch 2.13 renames both, and warns of the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _AllGather(torch.autograd.Function):
    """Concatenates each tensor along `dim`; the gradient of a rank's part is summed over the ranks that used it."""

    @staticmethod
    def forward(ctx: Any, dim: int, wire: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dim, ctx.wire, ctx.tensors = dim, wire, [(x.shape, x.dtype) for x in tensors]
        flat = torch.cat([x.to(wire).flatten() for x in tensors])
        buffer = flat.new_empty(world_size() * len(flat))
        _all_gather(buffer, flat)
        parts = torch.split(buffer.view(world_size(), -1), [x.numel() for x in tensors], 1)
        gathered = []
        for x, part in zip(tensors, parts, strict=True):
            joined = part.reshape(world_size(), *x.shape).movedim(0, dim).flatten(dim, dim + 1).to(x.dtype).contiguous()
            if wire != x.dtype:  # no need to round a rank's own rows, among them all positives
                joined.narrow(dim, rank() * x.shape[dim], x.shape[dim]).copy_(x)
            gathered.append(joined)
        learns = ctx.needs_input_grad[2:]
        ctx.mark_non_differentiable(*(x for x, learn in zip(gathered, learns, strict=True) if not learn))
        return tuple(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dim, learns = ctx.dim, ctx.needs_input_grad[2:]
        shares = [
            torch.stack(gradient.to(ctx.wire).chunk(world_size(), dim)).flatten(1)  # [ranks, numel]
            for gradient, learn in zip(gradients, learns, strict=True)
            if learn
        ]
        joined = torch.cat(shares, 1)
        own = joined.new_empty(joined.shape[1])
        _reduce_scatter(own, joined.flatten())
        parts = iter(torch.split(own, [share.shape[1] for share in shares]))
        return (
            None,
            None,
            *(
                next(parts).view(shape).to(dtype) if learn else None
                for (shape, dtype), learn in zip(ctx.tensors, learns, strict=True)
            ),
        )


def all_gather_together(tensors: Sequence[Tensor], dim: int = 0, wire: torch.dtype | None = None) -> list[Tensor]:
    """`all_gather` of several tensors: one collective forward, and one backward for those that have a gradient.

    They travel in `wire`, forward and backward; None is the widest of their dtypes. A rank's own part is not rounded.
    """
    if world_size() == 1 or not tensors:
        return list(tensors)
    if wire is None:
        wire = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    return list(_AllGather.apply(dim, wire, *tensors))  # type: ignore[no-untyped-call]


def all_gather(x: Tensor, dim: int = 0) -> Tensor:
    """`x` of all ranks (same shape on each), concatenated along `dim`, with true gradients.

    Each rank's loss is a mean over its own rows; the sum over ranks that the backward pass takes here and the mean
    over ranks of `average_gradients` make the gradient that of the mean over all rows.
    """
    return all_gather_together([x], dim)[0]


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over ranks, in one collective a dtype. Those of parameters that are spread over
    ranks are left alone: the backward pass has averaged them.

    A parameter that no rank has used keeps no gradient, as in one process: the optimiser leaves it alone.
    """
    if world_size() == 1:
        return
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad and not is_spread(parameter):
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for group in by_dtype.values():
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in group]
        unused = [i for i, p in enumerate(group) if p.grad is None]
        users = torch.ones(len(group), dtype=group[0].dtype, device=group[0].device)
        if unused:
            users[unused] = 0
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), users])
        dist.all_reduce(flat)
        *means, users = torch.split(flat / world_size(), [*(g.numel() for g in gradients), len(group)])
        for parameter, part in zip(group, means, strict=True):
            parameter.grad = part.view_as(parameter)
        if unused:  # what this rank has used, all know of: only here need the host wait for the device
            for i, share in enumerate(users.tolist()):
                if share == 0:
                    group[i].grad = None


@torch.no_grad()
def broadcast(module: nn.Module) -> None:
    """Copy rank 0's tensors to every rank."""
    if world_size() > 1:
        for value in module.state_dict().values():
            dist.broadcast(value, 0)


def any_rank(flag: bool) -> bool:
    """True on every rank if it is true on one."""
    if world_size() == 1:
        return flag
    value = torch.tensor(int(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def any_rank_on_device(flags: Tensor) -> Tensor:
    """Each of these bools, on this rank's device, or that of any other rank; the host does not wait for them."""
    if world_size() == 1:
        return flags
    value = flags.to(torch.uint8)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.bool()


def highest(number: int, seconds: float | None = None) -> int:
    """The highest of the numbers that the ranks pass.

    Raises `RanksApart` where another rank has ended, or has not called this within `seconds`.
    """
    if world_size() == 1:
        return number
    value = torch.tensor(number)
    work = dist.all_reduce(value, op=dist.ReduceOp.MAX, group=_control_group, async_op=True)
    assert work is not None
    try:
        work.wait(_PATIENCE if seconds is None else timedelta(seconds=seconds))
    except RuntimeError as error:
        raise RanksApart(f"another rank has ended or does not answer ({str(error).splitlines()[0][:200]})") from error
    return int(value.item())


def mean(values: Sequence[float]) -> list[float]:
    """The mean over ranks of each value; every rank must pass the same number of values."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / world_size()).tolist()


def gather_array(x: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[R, ...]: `x` of all ranks (same shape on each); on the host, beside the device's collectives."""
    if world_size() == 1:
        return x[None]
    value = torch.from_numpy(x.astype(np.uint8))
    every = value.new_empty((world_size(), *value.shape))
    _all_gather(every.view(-1), value.view(-1))
    return every.numpy().astype(bool)


def gather_objects(value: Any, *, saving: bool = False) -> list[Any]:
    """Picklable values of all ranks, on every rank. `saving`: among the threads that write checkpoints."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_saving_group if saving else None)
    return values


def raise_on_all_ranks(make: Callable[[], T]) -> T:
    """What `make` returns on this rank, once it has returned on all. Every rank must call this, and reach every
    collective inside `make`.

    Raises `UserError` on every rank if one rank's `make` raised it, with each different message: a rank that fails
    before a collective (a file that it cannot read) must not leave the others waiting in it.
    """
    if world_size() == 1:
        return make()
    results, problem = [], None
    try:
        results.append(make())
    except UserError as error:
        problem = str(error)
    if problems := [line for line in gather_objects(problem) if line is not None]:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return results[0]


def on_first_rank(make: Callable[[], T]) -> T:
    """What `make`, which the first rank alone calls, returns (picklable), on every rank; all must call this.

    Raises `UserError` on every rank where it does.
    """
    results: list[Any] = gather_objects(raise_on_all_ranks(lambda: make() if rank() == 0 else None))
    result: T = results[0]
    return result


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()
