"""A step's outputs -> terms."""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import cross_entropy

from distill_core import Loss, LossConfig, Needs, same_dim


class MatchConfig(LossConfig):
    """Options of `my_plugin_match`; `weight` comes with every loss."""

    modalities: tuple[str, str] = ("left", "right")
    """The two modalities that are matched."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """The learned scale starts at 1 / temperature."""


class Match(Loss):
    """Mean cross-entropy of scale * fused view @ the teacher's first views of the other modality, over the batch."""

    name = "my_plugin_match"
    Config = MatchConfig
    partial = True  # it compares rows by `Rows` alone, and so works with the samples that have both modalities

    def __init__(self, config, plan):
        super().__init__(config, plan)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))

    @classmethod
    def needs(cls, config, plan):
        """A recipe without a teacher or a fusion is refused, with this loss's name."""
        return Needs(teacher={"default": dict.fromkeys(config.modalities, ())}, fused=config.modalities)

    @classmethod
    def problems(cls, config, plan):
        """One width D on both sides, and the teacher's."""
        return same_dim(cls.name, config.modalities, plan, "default")

    def gathers(self, outputs):
        """What is read of all ranks below: gathered together with what other losses read."""
        return [outputs.teacher["default"][modality].rows[:1] for modality in self.config.modalities]

    def forward(self, outputs):
        """One term; the framework multiplies it by `weight`. M samples of all ranks."""
        a, b = self.config.modalities
        terms = []
        for modality, other in ((a, b), (b, a)):
            queries = outputs.fused[modality].embedding  # [V, B, D]
            rows = outputs.teacher["default"][other].rows[:1]
            keys = rows.gathered[0]  # [M, D]
            with torch.autocast(queries.device.type, enabled=False):
                logits = self.log_scale.exp() * queries @ keys.T  # [V, B, M]
            labels = rows.offset + torch.arange(queries.shape[1], device=queries.device)
            terms.append(cross_entropy(logits.flatten(0, 1), labels.repeat(len(queries))))
        return {"match": torch.stack(terms).mean()}, {"scale": self.log_scale.detach().exp()}

    @torch.no_grad()
    def after_step(self, outputs, progress):
        """Keep the scale between 1 and 100."""
        self.log_scale.clamp_(0.0, math.log(100.0))
