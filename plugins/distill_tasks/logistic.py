"""Multinomial logistic regression with an L2 penalty, by L-BFGS."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

LOG_SMALLEST = -69.0
"""Log of the smallest probability that is not treated as 0, about 1e-30, so that products stay above fp32's subnormal
numbers (1e-38)."""


def fit(x: Tensor, y: Tensor, c: float, iterations: int = 300, start: Tensor | None = None) -> Tensor:
    """Weights [D + 1, C], the last row the bias, of features x [N, D] and classes y [N], from zero or from `start`.

    Minimises |W|^2 / 2 + c * (sum of cross-entropies), the bias without penalty: scikit-learn's `LogisticRegression`.
    """
    x = torch.cat([x.float(), x.new_ones(len(x), 1).float()], 1)
    classes, rows = int(y.max()) + 1, torch.arange(len(y), device=y.device)
    weights = x.new_zeros(x.shape[1], classes) if start is None else start.clone()
    solver = torch.optim.LBFGS(
        [weights],
        max_iter=iterations,
        tolerance_grad=1e-7,
        tolerance_change=1e-10,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    penalty = 1 / (c * len(x))

    def loss() -> Tensor:
        """Divided by c * N, so that tolerances mean the same for any; sets the gradient."""
        log_p = (x @ weights).log_softmax(1)
        # without softmax's subnormal numbers, with which some processors are a hundred times slower
        residual = torch.where(log_p > LOG_SMALLEST, log_p.exp(), 0)
        residual[rows, y] -= 1
        weights.grad = torch.addmm(weights, x.T, residual, beta=penalty, alpha=1 / len(x))
        weights.grad[-1] -= penalty * weights[-1]
        return weights[:-1].square().sum() * (penalty / 2) - log_p[rows, y].mean()

    with torch.no_grad():
        solver.step(loss)  # type: ignore[no-untyped-call]
    return weights


def logits(x: Tensor, weights: Tensor) -> Tensor:
    """[N, C] of features [N, D]."""
    return x.float() @ weights[:-1] + weights[-1]


def choose_c(
    x: Tensor,
    y: Tensor,
    held_out: Tensor,
    cs: Sequence[float],
    iterations: int,
    watch: Callable[[Sequence[float]], Iterable[float]] = iter,
) -> float:
    """The c with the best accuracy on the `held_out` [N] rows after a fit on the others; the smallest of equals.

    The middle one if no row is held out. Each fit starts from the weights of the next smaller c.
    `watch` sees the cs as they are fitted.
    """
    order = sorted(cs)
    if not held_out.any() or len(order) == 1:
        return order[len(order) // 2]
    best, best_accuracy, weights = order[0], -1.0, None
    for c in watch(order):
        weights = fit(x[~held_out], y[~held_out], c, iterations, weights)
        if (accuracy := (logits(x[held_out], weights).argmax(1) == y[held_out]).float().mean().item()) > best_accuracy:
            best, best_accuracy = c, accuracy
    return best
