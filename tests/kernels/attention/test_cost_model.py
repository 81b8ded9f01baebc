"""Which form of cross_attention_pool `auto` takes on a CPU: on the measured grid, at the recipes, and by its
inequality."""

import csv
from pathlib import Path

import pytest
import torch

from distill_kernels.attention.cross_attention_pool import OP, PoolInputs, _Attention, _Keys, cheapest
from distill_kernels.dispatch import order_of


def inputs(v: int, h: int, n: int, d: int, b: int, dtype: torch.dtype) -> PoolInputs:
    """Of these sizes; nothing of them is stored."""
    none, weights = torch.empty(()), _Attention(*4 * [torch.empty(0)])
    return PoolInputs(none.expand(v, b, d), _Keys(none.expand(b, n, d), None, None, 1e-5), weights, h, dtype, "auto")


def absorbed_is_cheaper(*sizes: int, dtype: torch.dtype) -> bool:
    """V, H, L, D, B."""
    return order_of(OP, inputs(*sizes, dtype)).names[0] == "absorbed"


def test_cost_model_on_the_measured_grid() -> None:
    """The form that `auto` takes is never more than 10 % slower than the better one at any measured size."""
    path = Path(__file__).resolve().parents[3] / "kernels" / "bench" / "results.csv"
    losses, forms = [], set()
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["op"] == OP.name and row["baseline"] == "projected":
                size = {name: int(n) for name, n in (part.split("=") for part in row["shape"].split())}
                sizes = (size[name] for name in "VHLDB")
                form = "absorbed" if absorbed_is_cheaper(*sizes, dtype=getattr(torch, row["dtype"])) else "projected"
                milliseconds = {"absorbed": float(row["ours_ms"]), "projected": float(row["baseline_ms"])}
                losses.append(milliseconds[form] / min(milliseconds.values()))
                forms.add(form)
    assert len(losses) > 300
    assert forms == {"projected", "absorbed"}
    assert max(losses) < 1.1
    assert sum(losses) / len(losses) < 1.003


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [77, 196])
def test_cost_model_at_the_recipes(tokens: int, dtype: torch.dtype) -> None:
    assert absorbed_is_cheaper(8, 8, tokens, 512, 32, dtype=dtype)
    assert not absorbed_is_cheaper(64, 8, tokens, 512, 32, dtype=dtype)
    assert not absorbed_is_cheaper(8, 8, 1, 512, 32, dtype=dtype)  # one token: nothing to share
    assert not absorbed_is_cheaper(8, 8, 0, 512, 0, dtype=dtype)  # nothing at all


def test_cost_model_without_memory_is_the_stated_inequality() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        v, h, n, k = (int(torch.randint(1, high, (), generator=g)) for high in (100, 20, 300, 100))
        d = h * k
        margin = v * (7 * h / 6 - 1) / d + 7 * v / (6 * n) - 1
        if abs(margin) > 1e-9:
            sizes = inputs(v, h, n, d, 1, torch.float32)
            order = cheapest(sizes, multiplications=0, moved=9, weights=2)
            assert (order[0] == "absorbed") is (margin < 0)
