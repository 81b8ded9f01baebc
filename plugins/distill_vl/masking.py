"""Hiding patches from the student: what is drawn in the loader's workers, and what hidden patches are predicted as."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor

from distill_core import GLOBAL, ComponentConfig, ModalityPlan, did_you_mean

Share = Annotated[float, Field(ge=0, le=1)]
MASKED = "masked"
"""The usual role of a view that is there only to be masked."""
MASK_OPTION = "masking: {roles: []}"
"""`BackboneSpec.mask_option` of towers with the option `masking`."""
LOG_ASPECT = math.log(0.3)
"""Blocks have aspects of 0.3 to 1 / 0.3, log-uniform (BEiT)."""
ATTEMPTS = 10


class MaskingConfig(ComponentConfig):
    """Defaults are iBOT's: half of the views whole, the others with 10 to 50 % of their patches hidden, in blocks."""

    roles: tuple[str, ...] = (GLOBAL,)
    """Views of these roles are masked, for the student only; none where the recipe's `masker` says what is hidden."""
    targets: Literal["pixels"] | None = None
    """What is to be predicted: `pixels`, normalised by patch (MAE); null where a loss makes its own (iBOT)."""
    ratio: tuple[Share, Share] = (0.1, 0.5)
    """Share of a masked view's patches that is hidden, uniform between the two; blocks may come short of it."""
    share: Share = 0.5
    """Probability that a view is masked at all."""
    block: bool = True
    """Hide blocks (BEiT) rather than patches drawn one by one."""

    @model_validator(mode="after")
    def _fits(self) -> MaskingConfig:
        if self.ratio[0] > self.ratio[1]:
            raise ValueError(f"ratio {list(self.ratio)} does not go from low to high")
        return self


def role_problems(roles: Sequence[str], views: ModalityPlan) -> Iterable[str]:
    """Roles to be masked that no view has."""
    have = sorted(set(views.roles))
    for role in roles:
        if role not in have:
            yield f"masking.roles: no view has the role {role!r}{did_you_mean(role, have)}"
    if views.mask is not None and views.mask.role in roles:
        yield f"masking.roles: {views.mask.role} views have a masker in this recipe; leave their role out here"


def draw_mask(rows: int, columns: int, config: MaskingConfig, rng: np.random.Generator) -> Tensor:
    """[rows * columns] bool, True where a patch is hidden; all False for a view that is left whole."""
    masked, ratio = rng.random() < config.share, rng.uniform(*config.ratio)
    count = max(1, round(ratio * rows * columns)) if masked and config.ratio[1] > 0 else 0
    if config.block:
        hidden = blocks(rows, columns, count, rng)
    else:
        hidden = np.zeros(rows * columns, dtype=bool)
        hidden[rng.permutation(rows * columns)[:count]] = True
    return torch.from_numpy(hidden.reshape(-1))


def blocks(rows: int, columns: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """[rows, columns] bool: rectangles one over the other until `count` patches are hidden, never more.

    BEiT's algorithm 1 with iBOT's least area, a third of the shorter side squared. It ends short of `count` when ten
    rectangles in a row do not fit.
    """
    hidden = np.zeros((rows, columns), dtype=bool)
    least = (min(rows, columns) // 3) ** 2
    while (left := count - int(hidden.sum())) > 0:
        for _ in range(ATTEMPTS):
            area = rng.uniform(min(least, left), left)
            aspect = math.exp(rng.uniform(LOG_ASPECT, -LOG_ASPECT))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, first = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
            block = hidden[top : top + height, first : first + width]
            if 0 < block.size - int(block.sum()) <= left:
                block[:] = True
                break
        else:
            break
    return hidden


def tokens_at(x: Tensor, places: Tensor) -> Tensor:
    """x [B, L, ...] at places [N] of its B * L tokens (`Group.places`): [N, ...]."""
    return x.flatten(0, 1).index_select(0, places)


def patch_pixels(x: Tensor, patch: int) -> Tensor:
    """Pictures [..., 3, S, S] -> [..., L, 3 * p * p]: each patch's pixels (channels first), less their mean, by their
    standard deviation (MAE, section 3; eps 1e-6 on the variance)."""  # fmt: skip
    pixels = rearrange(x, "... c (i p) (j q) -> ... (i j) (c p q)", p=patch, q=patch)
    variance, mean = torch.var_mean(pixels, -1, keepdim=True)
    return (pixels - mean) / (variance + 1e-6).sqrt()
