"""Multinomial logistic regression with an L2 penalty, by L-BFGS."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def fit(x: Tensor, y: Tensor, c: float, iterations: int = 300, start: Tensor | None = None) -> Tensor:
    """Weights [D + 1, C], the last row the bias, of features x [N, D] and classes y [N], from zero or from `start`.

    Minimises |W|^2 / 2 + c * (sum of cross-entropies), the bias without penalty: scikit-learn's `LogisticRegression`.
    """
    x = torch.cat([x.float(), x.new_ones(len(x), 1).float()], 1)
    classes = int(y.max()) + 1
    weights = x.new_zeros(x.shape[1], classes) if start is None else start.clone()
    weights.requires_grad_()
    solver = torch.optim.LBFGS(
        [weights],
        max_iter=iterations,
        tolerance_grad=1e-7,
        tolerance_change=1e-10,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        # divided by c * N, so that tolerances mean the same for any
        value = cross_entropy(x @ weights, y) + weights[:-1].square().sum() / (2 * c * len(x))
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        solver.step(loss)  # type: ignore[no-untyped-call]
    return weights.detach()


def logits(x: Tensor, weights: Tensor) -> Tensor:
    """[N, C] of features [N, D]."""
    return x.float() @ weights[:-1] + weights[-1]


def choose_c(x: Tensor, y: Tensor, held: Tensor, cs: Sequence[float], iterations: int) -> float:
    """The c of best accuracy on the `held` [N] rows after a fit on the others; the smallest of equals.

    The middle one where none are held. Each fit starts where the one of the next smaller c has ended.
    """
    order = sorted(cs)
    if not held.any() or len(order) == 1:
        return order[len(order) // 2]
    best, right, weights = order[0], -1.0, None
    for c in order:
        weights = fit(x[~held], y[~held], c, iterations, weights)
        if (accuracy := (logits(x[held], weights).argmax(1) == y[held]).float().mean().item()) > right:
            best, right = c, accuracy
    return best
