"""SimCLR's loss (arXiv 2002.05709, equation 1) after SLIP's MLP head (arXiv 2112.12750, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from distill_core import Loss, LossConfig, Needs, Outputs, Plan, Scheduled, wide
from distill_vl.heads import ProjectionHead

Positive = Annotated[int, Field(gt=0)]


class SimClrConfig(LossConfig):
    """Defaults are SLIP's: a head of 3 layers, 4096 wide, temperature 0.1."""

    modality: str = "image"
    """The modality whose two views are compared."""
    role: str = "simclr"
    """The role of the views; the first two of them are taken."""
    source: Literal["class_tokens", "pooled"] = "class_tokens"
    """What the head reads: the first class token, before the projection (SLIP), or the projected embedding."""
    hidden: Positive = 4096
    """Width of the head's two hidden layers."""
    dim: Positive = 256
    """Width of what is compared."""
    temperature: Scheduled[Annotated[float, Field(gt=0)]] = Scheduled(0.1)
    """Cosines are divided by it; it is not learned. Also a schedule."""


class SimClr(Loss):
    """NT-Xent: each of the 2B embeddings against the 2M - 1 others of all ranks, the other view of its sample right.

    An embedding is not compared with itself.
    """

    name = "simclr"
    partial = True
    Config = SimClrConfig
    examples = ({"hidden": 32, "dim": 16}, {"hidden": 32, "dim": 16, "source": "pooled"})

    def __init__(self, config: SimClrConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        modality = plan.modalities[config.modality]
        self.views = list(modality.views(config.role)[:2])
        width = modality.spec.width if config.source == "class_tokens" else modality.spec.dim
        self.head = ProjectionHead(width, config.hidden, config.dim)

    @classmethod
    def needs(cls, config: SimClrConfig, plan: Plan) -> Needs:
        """Two views of the role."""
        m = config.modality
        return Needs(student=(m,), views={m: {config.role: 2}}, embeddings=(m,) if config.source == "pooled" else ())

    @classmethod
    def problems(cls, config: SimClrConfig, plan: Plan) -> Iterable[str]:
        """A class token, where it is read."""
        if config.source == "class_tokens" and plan.modalities[config.modality].spec.class_tokens == 0:
            yield (
                f"{cls.name!r} reads the class tokens of {config.modality!r}, whose backbone gives none; "
                f"set its option source: pooled"
            )

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One term, and the share of embeddings whose nearest is the right one."""
        embedding = self.head(self._read(outputs), outputs.weight)
        with torch.autocast(embedding.device.type, enabled=False):
            own = normalize(wide(embedding), dim=-1)
            compared = outputs.rows(own)
            every = compared.gathered
            (_, batch, _), rows = own.shape, every.shape[1]
            temperature = self.config.temperature.value(outputs.progress)
            logits = own.flatten(0, 1) @ every.flatten(0, 1).T / temperature  # [2B, 2M]
            itself = compared.offset + torch.arange(batch, device=own.device)
            first, second = itself, itself + rows
            logits = logits.scatter(1, torch.cat([first, second])[:, None], float("-inf"))
            positives = torch.cat([second, first])
            loss = cross_entropy(logits, positives)
        accuracy = (logits.detach().argmax(1) == positives).to(loss.dtype).mean()
        return {"simclr": loss}, {"accuracy": accuracy}

    def _read(self, outputs: Outputs) -> Tensor:
        """[2, B, W or D]."""
        features = outputs.student[self.config.modality]
        if self.config.source == "pooled":
            return features.pooled[self.views]
        assert features.class_tokens is not None
        return features.class_tokens[self.views, :, 0]
