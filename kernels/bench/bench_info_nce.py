"""Multi-view InfoNCE and sigmoid losses, forward + backward: our backends against the loss written pair by pair.

    python kernels/bench/bench_info_nce.py                 # every shape: rows of kernels/bench/results.csv
    python kernels/bench/bench_info_nce.py --shapes 8x2x4096x512 --dtypes float32 --rounds 3
    python kernels/bench/bench_info_nce.py --losses sigmoid --shapes 2x8x16x128

Baselines: `pairs` makes a pair's logits once and takes F.cross_entropy of them and of their transpose;
`directions` makes them once a direction, as public multi-GPU code does. Losses and gradients are compared
before anything is timed. Va, Vb views, B rows, D embedding width.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.results import PATH, Result, measure, save
from distill_kernels.dispatch import Op, choose
from distill_kernels.pairwise.info_nce import OP as INFO_NCE
from distill_kernels.pairwise.info_nce import multi_view_info_nce
from distill_kernels.pairwise.pairs import Pairs
from distill_kernels.pairwise.sigmoid_loss import OP as SIGMOID
from distill_kernels.pairwise.sigmoid_loss import multi_view_sigmoid

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


# Of each loss: its op, the function, its baselines.
KINDS: dict[str, tuple[Op, Loss, dict[str, Loss]]] = {
    "info_nce": (INFO_NCE, multi_view_info_nce, {"pairs": pairs, "directions": directions}),
    "sigmoid": (SIGMOID, multi_view_sigmoid, {"pairs": sigmoid_pairs}),
}


def step(loss: Loss, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    out = loss(*inputs)
    return (out.detach(), *torch.autograd.grad(out.mean(), inputs))


def agree(got: tuple[Tensor, ...], true: tuple[Tensor, ...], name: str) -> None:
    for what, g, t in zip(("losses", "a", "b", "scale", "bias"), got, true, strict=False):
        error = (g.double() - t.double()).abs().max() / t.double().abs().max()
        limit = 4 * torch.finfo(g.dtype).eps if g.dtype.itemsize < 4 else 1e-4
        if not error <= limit:
            raise SystemExit(f"{name}: {what} differ from `pairs` by {error:.1e} of the largest")


def case(kind: str, shape: str, dtype: torch.dtype, device: torch.device, rounds: int) -> list[Result]:
    """A row for each implementation, after comparing it with `pairs`."""
    va, vb, n, d = map(int, shape.split("x"))
    a, b = (F.normalize(torch.randn(v, n, d, device=device), dim=-1).to(dtype).requires_grad_() for v in (va, vb))
    scale, bias = (torch.tensor(x, device=device, requires_grad=True) for x in (1 / 0.07, -10.0))
    inputs = (a, b, scale, bias) if kind == "sigmoid" else (a, b, scale)
    op, loss, baselines = KINDS[kind]
    compared = Pairs(a, b, inputs[2:])
    runnable = [backend.name for backend in op.backends if backend.why_not(compared) is None]
    losses = baselines | {name: functools.partial(loss, backend=name) for name in runnable}
    true = step(losses["pairs"], inputs)
    for name, loss in losses.items():
        if name != "pairs":
            agree(step(loss, inputs), true, name)
    del true
    calls = {name: functools.partial(step, loss, inputs) for name, loss in losses.items()}
    sizes = f"Va={va} Vb={vb} B={n} D={d}"
    auto = choose(op, "auto", compared).name
    return measure(op.name, sizes, dtype, calls, "pairs", device=device, rounds=rounds, auto=auto)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--losses", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="VaxVbxBxD")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=PATH)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    for kind, shape, dtype in itertools.product(arguments.losses, arguments.shapes, arguments.dtypes):
        save(case(kind, shape, getattr(torch, dtype), device, arguments.rounds), arguments.out)


if __name__ == "__main__":
    main()
