"""Multi-view InfoNCE, forward + backward: our backends against the loss written pair by pair.

    python kernels/bench/bench_info_nce.py                 # every shape -> kernels/bench/info_nce-<device>.csv
    python kernels/bench/bench_info_nce.py --shapes 8x2x4096x512 --dtypes float32 --rounds 3

Baselines: `pairs` makes a pair's logits once and takes F.cross_entropy of them and of their transpose;
`directions` makes them once a direction, as public multi-GPU code does. Losses and gradients are compared
before anything is timed. Peak memory counts results and gradients, not inputs. `ratio` is process time (GPU:
wall time) of `pairs` over this row's: above 1 is faster.
"""

from __future__ import annotations

import argparse
import csv
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distill_kernels.backends import device_name
from distill_kernels.info_nce import OP, InfoNCEInputs, multi_view_info_nce
from distill_kernels.measure import interleaved, peak_bytes

# Va x Vb x B x D: the tiny default recipe, one GPU's share of a batch, the large case of the kernels issue.
SHAPES = ("2x8x16x128", "8x8x128x128", "8x2x128x128", "2x8x1024x512", "8x2x1024x512", "8x2x4096x512")

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


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


def step(loss: Loss, a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    out = loss(a, b, scale)
    return (out.detach(), *torch.autograd.grad(out.mean(), (a, b, scale)))


def agree(got: tuple[Tensor, ...], true: tuple[Tensor, ...], name: str) -> None:
    for what, g, t in zip(("losses", "a", "b", "scale"), got, true, strict=True):
        error = (g.double() - t.double()).abs().max() / t.double().abs().max()
        limit = 4 * torch.finfo(g.dtype).eps if g.dtype.itemsize < 4 else 1e-4
        if not error <= limit:
            raise SystemExit(f"{name}: {what} differ from `pairs` by {error:.1e} of the largest")


def measure(
    shape: str, dtype: torch.dtype, device: torch.device, rounds: int
) -> Iterator[dict[str, str | int | float]]:
    """A row for each implementation, after comparing it with `pairs`."""
    va, vb, n, d = map(int, shape.split("x"))
    a, b = (F.normalize(torch.randn(v, n, d, device=device), dim=-1).to(dtype).requires_grad_() for v in (va, vb))
    scale = torch.tensor(1 / 0.07, device=device, requires_grad=True)
    losses: dict[str, Loss] = {"pairs": pairs, "directions": directions}
    for backend in OP.backends:
        if backend.why_not(InfoNCEInputs(a, b, scale, None, None, 0)) is None:
            losses[backend.name] = functools.partial(multi_view_info_nce, backend=backend.name)
    true = step(pairs, a, b, scale)
    for name, loss in losses.items():
        agree(step(loss, a, b, scale), true, name)
    del true
    calls = {name: functools.partial(step, loss, a, b, scale) for name, loss in losses.items()}
    seconds = interleaved(calls, rounds=rounds, device=device)
    of = {name: t.wall if device.type == "cuda" else t.process for name, t in seconds.items()}
    for name, taken in seconds.items():
        yield {
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
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="VaxVbxBxD")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    path = arguments.out or Path(__file__).with_name(f"info_nce-{device.type}.csv")
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for shape in arguments.shapes:
            for dtype in arguments.dtypes:
                for row in measure(shape, getattr(torch, dtype), device, arguments.rounds):
                    if file.tell() == 0:
                        writer.writerow(row)
                    writer.writerow(row.values())
                    file.flush()  # the large shapes take minutes each
                    print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
