"""Colour jitter, grey, blur and solarising of crops, by draws that were made before.

A worker does it for the crops of one sample, the training device for those of a batch, with the same arithmetic on
floats that is rounded to 8 bits once, at the end. The operations are torchvision's, in the drawn order, with a clip to
0..255 after each; only the hue is another, and saturation and hue that follow one another have one clip after both.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence
from functools import cache
from itertools import permutations
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

Strength = Annotated[float, Field(ge=0)]
Jitter = tuple[Strength, Strength, Strength, Annotated[float, Field(ge=0, le=0.5)]]
"""Strengths of brightness, contrast, saturation and hue."""

LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in grey (ITU-R 601-2), as PIL's and torchvision's."""
STAGES = 5
"""At most: brightness, contrast, saturation and hue in any order, then grey."""
ORDERS = tuple(permutations(range(4)))
TAILS = 3
"""Standard deviations of a blur's Gaussian to either side; what lies further out is left away."""

_YIQ = np.array([LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)])
_GREY = np.tile(LUMA, (3, 1))
_QUARTER_TURN = np.linalg.inv(_YIQ) @ np.array([[0.0, 0, 0], [0, 0, 1], [0, -1, 0]]) @ _YIQ
BASIS = np.stack([_GREY, np.eye(3) - _GREY, _QUARTER_TURN]).astype(np.float32)
"""[3, 3, 3]: matrices that make a pixel's grey, its color (the rest), and that color turned by a quarter of the circle
in the plane of YIQ's I and Q. Brightness, contrast, saturation, hue and grey are sums of these, and commute."""

_BASIS = tuple(tuple(tuple(row) for row in matrix) for matrix in BASIS.tolist())

Constant = tuple[float, ...] | tuple["Constant", ...]


def constant(values: Constant, like: Tensor) -> Tensor:
    """fp32 values on the device of `like`; kept there if it is a GPU, since the host would wait for each copy."""
    if like.device.type == "cpu" or type(like) is not Tensor:  # a tensor without values (FakeTensor) is of its mode
        return torch.tensor(values, dtype=torch.float32, device=like.device)
    return _kept(values, like.device)


@cache
def _kept(values: Constant, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


class Recolouring:
    """What is drawn for the colours of one crop: stages, then a blur, then solarising.

    A stage scales each pixel's grey by p, scales and turns its color by a complex z, adds c times the mean grey of the
    crop as it enters the stage, and clips to 0..255. Operations share a stage as long as no clip between them would
    change anything: factors up to 1 keep 0..255. Saturation and hue share one always.
    """

    __slots__ = ("_clips", "_linear", "_stages", "blur", "solarise")

    def __init__(self) -> None:
        self._stages: list[tuple[float, complex, float]] = []
        self.blur = 0.0
        """Standard deviation of the Gaussian in pixels; 0 for none."""
        self.solarise = False
        """Whether values from 128 on are inverted, x -> 255 - x."""
        self._clips = self._linear = False  # of the last stage: may it leave 0..255, does it end with saturation or hue

    def jitter(self, strengths: Sequence[float], rng: np.random.Generator) -> None:
        """Brightness, contrast, saturation (factors uniform in 1 -+ strength) and hue (a turn of at most `strength` of
        the color circle to either side), in random order."""
        operations = (self.brightness, self.contrast, self.saturation, self.hue)
        for step in ORDERS[int(len(ORDERS) * rng.random())]:
            strength = strengths[step]
            if strength:
                low, high = (-strength, strength) if step == 3 else (max(0.0, 1 - strength), 1 + strength)
                operations[step](low + (high - low) * rng.random())

    def brightness(self, factor: float) -> None:
        """All values times the factor."""
        p, z, c = self._stage(clips=factor > 1)
        self._stages.append((p * factor, z * factor, c * factor))

    def contrast(self, factor: float) -> None:
        """Each value's distance from the crop's mean grey times the factor."""
        p, z, c = self._stage(clips=factor > 1)
        self._stages.append((p * factor, z * factor, c * factor + (1 - factor) * (p + c)))

    def saturation(self, factor: float) -> None:
        """Each pixel's distance from its own grey times the factor."""
        p, z, c = self._stage(clips=factor > 1, linear=True)
        self._stages.append((p, z * factor, c))

    def hue(self, turn: float) -> None:
        """Colours turned by `turn` of the circle at equal luma, a rotation in YIQ.

        torchvision turns HSV's hue at equal value and saturation, which no matrix can.
        """
        p, z, c = self._stage(clips=True, linear=True)
        self._stages.append((p, z * cmath.rect(1, 2 * math.pi * turn), c))

    def grey(self) -> None:
        """Grey in all three channels."""
        p, _, c = self._stage(clips=False)
        self._stages.append((p, 0j, c))

    def _stage(self, *, clips: bool, linear: bool = False) -> tuple[float, complex, float]:
        """Takes off the stage that the next operation joins: the last one, or one that changes nothing."""
        new = not self._stages or (self._clips and not (linear and self._linear))
        self._clips, self._linear = clips or (self._clips and not new), linear
        return (1.0, 1 + 0j, 0.0) if new else self._stages.pop()

    @property
    def stages(self) -> list[tuple[float, float, float, float]]:
        """Of each the factors of `BASIS`, and c."""
        return [(p, z.real, z.imag, c) for p, z, c in self._stages]

    @property
    def changes(self) -> bool:
        """Whether it does anything."""
        return bool(self._stages or self.blur or self.solarise)

    def arrays(self) -> dict[str, Any]:
        """For `recolour`: `stages` [5, 4], those left over changing nothing; `blur` and `solarise` []."""
        stages = np.array(self.stages + [(1.0, 1.0, 0.0, 0.0)] * (STAGES - len(self.stages)), np.float32)
        return {"stages": stages, "blur": np.float32(self.blur), "solarise": self.solarise}

    def __call__(self, crop: Tensor) -> Tensor:
        """A crop [3, H, W] of uint8, recoloured as `recolour` would, by the operations alone that were drawn."""
        if not self.changes:
            return crop
        x = crop.to(torch.float32).flatten(1)
        for p, u, v, c in self.stages:
            added = c * sum(share * mean for share, mean in zip(LUMA, x.mean(1).tolist(), strict=True)) if c else 0.0
            if u == p and v == 0:
                x.mul_(p)
                x = x.add_(added) if added else x
            else:
                matrix = torch.from_numpy(p * BASIS[0] + u * BASIS[1] + v * BASIS[2])
                x = torch.addmm(torch.full((3, 1), added), matrix, x) if added else matrix @ x
            x.clamp_(0, 255)
        x = x.view(crop.shape)
        if self.blur:
            x = blurred(x, gaussian(self.blur))
        pixels = x.round_().to(torch.int16).to(torch.uint8)  # straight to uint8 takes three times as long
        return _solarised(pixels) if self.solarise else pixels


def radius_of(sigma: float) -> int:
    """Pixels to either side that a blur reads."""
    return round(TAILS * sigma)


def recolour(x: Tensor, stages: Tensor, blur: Tensor, solarise: Tensor, *, radius: int) -> Tensor:
    """Crops [N, 3, H, W] (float32, 0..255) recoloured, rounded to whole numbers.

    Each by its own stages [T, 4], standard deviation `blur` and bool `solarise`, with N before the other dimensions.
    `radius` is that of the widest blur that can be drawn.
    """
    for stage in stages.unbind(1):
        x = _through(x, stage)
    if radius:
        x = blurred(x, [weight[:, None, None, None] for weight in _gaussians(blur, radius).unbind(1)])
    x = x.round()
    return torch.where(solarise[:, None, None, None], _solarised(x), x)


def _through(x: Tensor, stage: Tensor) -> Tensor:
    """[N, 3, H, W] through a stage [N, 4] each."""
    basis, luma = constant(_BASIS, x), constant(LUMA, x)
    matrix = (stage[:, :3, None, None] * basis).sum(1)
    added = stage[:, 3] * (x.mean((-2, -1)) * luma).sum(-1)
    # no matrix product: on a GPU that may round to TF32's 10 bits, which 8 bits of a pixel would show
    result = added[:, None, None, None] + matrix[:, :, :1, None] * x[:, :1]
    for channel in (1, 2):
        result.addcmul_(matrix[:, :, channel, None, None], x[:, channel, None])
    return result.clamp_(0, 255)


def gaussian(sigma: float) -> list[float]:
    """Weights of the pixel itself and of those at each distance up to `radius_of`."""
    weights = [math.exp(-0.5 * (step / sigma) ** 2) for step in range(radius_of(sigma) + 1)]
    total = 2 * sum(weights) - weights[0]
    return [weight / total for weight in weights]


def _gaussians(sigma: Tensor, radius: int) -> Tensor:
    """`gaussian` of standard deviations [N] (0: no blur), [N, radius + 1]."""
    steps, sigma = torch.arange(radius + 1, device=sigma.device), sigma[:, None]
    weights = torch.exp(-0.5 * (steps / sigma.clamp_min(1e-3)) ** 2) * (steps <= (TAILS * sigma).round())
    return weights / (2 * weights.sum(1, keepdim=True) - weights[:, :1])


def blurred(x: Tensor, weights: Sequence[float] | Sequence[Tensor]) -> Tensor:
    """[..., H, W] by a symmetrical kernel in both directions; weights by distance, numbers or tensors that broadcast.
    The edges are repeated."""
    radius = len(weights) - 1
    for dim in (-1, -2):
        size = x.shape[dim]
        wide = pad(x, (radius, radius, 0, 0) if dim == -1 else (0, 0, radius, radius), mode="replicate")
        x = wide.narrow(dim, radius, size) * weights[0]
        for j in range(1, radius + 1):
            both, weight = wide.narrow(dim, radius - j, size) + wide.narrow(dim, radius + j, size), weights[j]
            x = x.addcmul_(both, weight) if isinstance(weight, Tensor) else x.add_(both, alpha=weight)
    return x


def _solarised(x: Tensor) -> Tensor:
    return torch.where(x >= 128, 255 - x, x)
