"""Which form of cross_attention_pool `auto` takes: on the measured grid, at the recipes, and by its inequality."""

import csv
from pathlib import Path

import pytest
import torch

from distill_kernels.attention.cross_attention_pool import BALANCE, absorbed_is_cheaper


def test_cost_model_on_the_measured_grid() -> None:
    """The form that `auto` takes is never more than 10 % slower than the better one at any measured size."""
    path = Path(__file__).resolve().parents[3] / "kernels" / "bench" / "cross_attention_crossover.csv"
    losses, forms = [], set()
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            views, heads, tokens, width, batch = (
                int(row[name]) for name in ("views", "heads", "tokens", "width", "batch")
            )
            absorbed = absorbed_is_cheaper(views, heads, tokens, width, batch, getattr(torch, row["dtype"]).itemsize)
            milliseconds = {name: float(row[f"{name}_ms"]) for name in ("projected", "absorbed")}
            form = "absorbed" if absorbed else "projected"
            losses.append(milliseconds[form] / min(milliseconds.values()))
            forms.add(form)
    assert len(losses) > 300
    assert forms == {"projected", "absorbed"}
    assert max(losses) < 1.1
    assert sum(losses) / len(losses) < 1.003


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("tokens", [77, 196])
def test_cost_model_at_the_recipes(tokens: int, itemsize: int) -> None:
    assert absorbed_is_cheaper(8, 8, tokens, 512, 32, itemsize)
    assert not absorbed_is_cheaper(64, 8, tokens, 512, 32, itemsize)
    assert not absorbed_is_cheaper(8, 8, 1, 512, 32, itemsize)  # one token: nothing to share
    assert not absorbed_is_cheaper(8, 8, 0, 512, 0, itemsize)  # nothing at all


def test_cost_model_without_memory_is_the_stated_inequality(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BALANCE, 4, BALANCE[4]._replace(multiplications=0))
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        v, h, n, k = (int(torch.randint(1, high, (), generator=g)) for high in (100, 20, 300, 100))
        d = h * k
        margin = v * (7 * h / 6 - 1) / d + 7 * v / (6 * n) - 1
        if abs(margin) > 1e-9:
            assert absorbed_is_cheaper(v, h, n, d, 1, 4) is (margin < 0)
