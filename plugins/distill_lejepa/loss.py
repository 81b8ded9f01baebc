"""LeJEPA's loss (Balestriero & LeCun 2025, algorithm 2), of one modality or across several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core import GLOBAL, Loss, LossConfig, Needs, Outputs, Plan, Scheduled, same_dim, wide, world_size
from distill_lejepa.sigreg import SigReg, directions_of
from distill_vl.heads import ProjectionHead

Positive = Annotated[int, Field(gt=0)]


class LeJepaConfig(LossConfig):
    """Defaults are the paper's, without a head."""

    modalities: Annotated[tuple[str, ...], Field(min_length=1)] = ("image",)
    """Those whose views predict one mean: [image] as in the paper; [image, text] aligns both."""
    sigreg: Scheduled[Annotated[float, Field(ge=0, le=1)]] = Scheduled(0.05)
    """Share of SIGReg (lambda), 1 - lambda that of the prediction; also a schedule."""
    directions: Positive = 1024
    """Random directions along which rows are tested, others in each step."""
    knots: Annotated[int, Field(ge=3)] = 17
    """Points of the integral, an odd number."""
    reach: Annotated[float, Field(gt=0)] = 5.0
    """The integral's bounds; the public code has taken 3 since."""
    hidden: Positive | None = None
    """Hidden width of a head on the embedding, of three layers with batch norm, for each modality (public code: 2048);
    null: what is predicted and regularised is the embedding itself."""
    dim: Positive = 128
    """Width of what the head gives."""


class LeJepa(Loss):
    """(1 - lambda) prediction + lambda SIGReg, of embeddings that are not normalised.

    prediction  mean over modalities, views, samples and features of (centre - view)^2; the centre of a sample is the
                mean over modalities of the mean of its global views
    sigreg      mean over modalities and views of Epps and Pulley's statistic, of the rows of all ranks

    No teacher, and no gradient is stopped. Of one modality it is the paper's; across several each counts alike,
    whatever its number of views, and two of one view each are drawn together by a quarter of their squared distance.
    """

    name = "lejepa"
    Config = LeJepaConfig
    partial = True
    examples = (
        {"directions": 32},
        {"directions": 16, "hidden": 24, "dim": 12, "knots": 9, "reach": 3.0},
        {"directions": 32, "modalities": ("image", "text")},
    )

    def __init__(self, config: LeJepaConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.globals = {m: list(plan.modalities[m].views(GLOBAL)) for m in config.modalities}
        dims = {m: plan.modalities[m].spec.dim for m in config.modalities}
        heads = {m: ProjectionHead(dim, config.hidden, config.dim) for m, dim in dims.items()} if config.hidden else {}
        self.heads = nn.ModuleDict(heads)
        self.test = SigReg(config.knots, config.reach)

    @classmethod
    def needs(cls, config: LeJepaConfig, plan: Plan) -> Needs:
        """A global view of each modality."""
        return Needs(student=config.modalities, views={m: {GLOBAL: 1} for m in config.modalities})

    @classmethod
    def problems(cls, config: LeJepaConfig, plan: Plan) -> Iterable[str]:
        """Two views; without a head, one width D."""
        views = sum(len(plan.modalities[m].roles) for m in config.modalities)
        if views < 2:
            yield f"{cls.name!r} needs two views, of {' and '.join(config.modalities)}; there is {views}"
        if config.hidden is None:
            yield from same_dim(cls.name, config.modalities, plan)
        if config.knots % 2 == 0:
            yield f"{cls.name!r}: knots: {config.knots} is even; the integral is symmetric about its middle point"

    def units(self) -> Sequence[nn.Module]:
        """All but the directions, which are drawn on the host."""
        return [*self.heads.values(), self.test]

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Terms `prediction` and `sigreg`; their values before they are weighed are metrics."""
        z = {m: self._read(outputs, m) for m in self.config.modalities}  # [V, B, K] each
        share = self.config.sigreg.value(outputs.progress)
        first = next(iter(z.values()))
        with torch.autocast(first.device.type, enabled=False):
            center = _mean([x[self.globals[m]].mean(0) for m, x in z.items()])  # [B, K]
            prediction = _mean([(x - center).square().mean() for x in z.values()])
            directions = directions_of(outputs.progress.step, first.shape[-1], self.config.directions, first)
            present = outputs.present
            rows = present.samples if present is not None else first.shape[1] * world_size()
            sigreg = _mean([self.test(x, directions, outputs.weight).mean() for x in z.values()]) * rows
        terms = {"prediction": (1 - share) * prediction, "sigreg": share * sigreg}
        return terms, {"distance": prediction.detach(), "statistic": sigreg.detach()}

    def _read(self, outputs: Outputs, modality: str) -> Tensor:
        """[V, B, K], at least fp32."""
        x = outputs.student[modality].pooled
        return wide(self.heads[modality](x, outputs.weight) if modality in self.heads else x)


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).mean(0)
