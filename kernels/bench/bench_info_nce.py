"""Multi-view InfoNCE and sigmoid losses, forward + backward: our backends against the loss written pair by pair.

    python kernels/bench/bench_info_nce.py                 # every shape -> kernels/bench/info_nce-<device>.csv
    python kernels/bench/bench_info_nce.py --shapes 8x2x4096x512 --dtypes float32 --rounds 3
    python kernels/bench/bench_info_nce.py --losses sigmoid --shapes 2x8x16x128 --keep     # more rows

Baselines: `pairs` makes a pair's logits once and takes F.cross_entropy of them and of their transpose;
`directions` makes them once a direction, as public multi-GPU code does. Losses and gradients are compared
before anything is timed. Peak memory counts results and gradients, not inputs. `ratio` is process time (GPU:
wall time) of `pairs` over this row's: above 1 is faster.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distill_kernels.machine import device_name
from distill_kernels.measure import interleaved, peak_bytes
from distill_kernels.pairwise.info_nce import OP, InfoNCEInputs, multi_view_info_nce
from distill_kernels.pairwise.sigmoid_loss import OP as SIGMOID
from distill_kernels.pairwise.sigmoid_loss import SigmoidInputs, multi_view_sigmoid

# Va x Vb x B x D: the tiny default recipe, one GPU's share of a batch, the large case of the kernels issue.
SHAPES = ("2x8x16x128", "8x8x128x128", "8x2x128x128", "2x8x1024x512", "8x2x1024x512", "8x2x4096x512")

Loss = Callable[..., Tensor]  # a [Va, B, D], b [Vb, B, D], scale (, bias) -> [Va, Vb]


def pairs(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    target = torch.arange(a.shape[1], device=a.device)
    losses = []
    for u in a.float():
        for v in b.float():
            logits = scale * u @ v.T
            losses.append((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
    return torch.stack(losses).view(len(a), len(b))


def directions(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    target = torch.arange(a.shape[1], device=a.device)
    losses = []
    for u in a.float():
        for v in b.float():
            forth, back = F.cross_entropy(scale * u @ v.T, target), F.cross_entropy(scale * v @ u.T, target)
            losses.append((forth + back) / 2)
    return torch.stack(losses).view(len(a), len(b))


def sigmoid_pairs(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The equation: signs +1 on the diagonal and -1 elsewhere, and one logsigmoid a pair."""
    sign = 2 * torch.eye(a.shape[1], device=a.device) - 1
    losses = [-F.logsigmoid(sign * (scale * u @ v.T + bias)).sum(1).mean() for u in a.float() for v in b.float()]
    return torch.stack(losses).view(len(a), len(b))


def implementations(kind: str, inputs: tuple[Tensor, ...]) -> dict[str, Loss]:
    """Baselines first, then every backend that can run."""
    a, b, scale, *rest = inputs
    if kind == "sigmoid":
        losses: dict[str, Loss] = {"pairs": sigmoid_pairs}
        (bias,) = rest
        runnable = [x.name for x in SIGMOID.backends if x.why_not(SigmoidInputs(a, b, scale, bias, 0)) is None]
        return losses | {name: functools.partial(multi_view_sigmoid, backend=name) for name in runnable}
    losses = {"pairs": pairs, "directions": directions}
    runnable = [x.name for x in OP.backends if x.why_not(InfoNCEInputs(a, b, scale, None, None, 0)) is None]
    return losses | {name: functools.partial(multi_view_info_nce, backend=name) for name in runnable}


def step(loss: Loss, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    out = loss(*inputs)
    return (out.detach(), *torch.autograd.grad(out.mean(), inputs))


def agree(got: tuple[Tensor, ...], true: tuple[Tensor, ...], name: str) -> None:
    for what, g, t in zip(("losses", "a", "b", "scale", "bias"), got, true, strict=False):
        error = (g.double() - t.double()).abs().max() / t.double().abs().max()
        limit = 4 * torch.finfo(g.dtype).eps if g.dtype.itemsize < 4 else 1e-4
        if not error <= limit:
            raise SystemExit(f"{name}: {what} differ from `pairs` by {error:.1e} of the largest")


def measure(
    kind: str, shape: str, dtype: torch.dtype, device: torch.device, rounds: int
) -> Iterator[dict[str, str | int | float]]:
    """A row for each implementation, after comparing it with `pairs`."""
    va, vb, n, d = map(int, shape.split("x"))
    a, b = (F.normalize(torch.randn(v, n, d, device=device), dim=-1).to(dtype).requires_grad_() for v in (va, vb))
    scale, bias = (torch.tensor(x, device=device, requires_grad=True) for x in (1 / 0.07, -10.0))
    inputs = (a, b, scale, bias) if kind == "sigmoid" else (a, b, scale)
    losses = implementations(kind, inputs)
    true = step(losses["pairs"], inputs)
    for name, loss in losses.items():
        if name != "pairs":
            agree(step(loss, inputs), true, name)
    del true
    calls = {name: functools.partial(step, loss, inputs) for name, loss in losses.items()}
    seconds = interleaved(calls, rounds=rounds, device=device)
    of = {name: t.wall if device.type == "cuda" else t.process for name, t in seconds.items()}
    for name, taken in seconds.items():
        yield {
            "loss": kind,
            "name": name,
            "va": va,
            "vb": vb,
            "rows": n,
            "dim": d,
            "dtype": str(dtype).removeprefix("torch."),
            "wall_ms": round(1e3 * taken.wall, 1),
            "process_ms": round(1e3 * taken.process, 1),
            "peak_extra_mib": round(peak_bytes(calls[name], device) / 2**20, 1),
            "ratio": round(of["pairs"] / of[name], 2),
            "device": device_name(device),
            "torch": torch.__version__,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--losses", nargs="+", choices=("info_nce", "sigmoid"), default=["info_nce", "sigmoid"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="VaxVbxBxD")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="add rows to the CSV instead of starting it anew")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    path = arguments.out or Path(__file__).with_name(f"info_nce-{device.type}.csv")
    with path.open("a" if arguments.keep else "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for kind, shape, dtype in itertools.product(arguments.losses, arguments.shapes, arguments.dtypes):
            for row in measure(kind, shape, getattr(torch, dtype), device, arguments.rounds):
                if file.tell() == 0:
                    writer.writerow(row)
                writer.writerow(row.values())
                file.flush()  # the large shapes take minutes each
                print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
