"""A tower for images and texts as one sequence, as a stranger's package could bring it: by the public surface alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill_core import (
    GLOBAL,
    BackboneSpec,
    ConformanceCase,
    Encoded,
    JointTower,
    JointTowerConfig,
    Loss,
    LossConfig,
    Needs,
    Outputs,
    Plan,
    TowerInput,
    View,
    hookimpl,
)

WIDTH, DIM, PATCH, IDS = 16, 16, 8, 49408

distill_api = 2


class OneTower(JointTower):
    """Patches of the first modality, then ids of the second: a class token, attention, a projection."""

    name = "one_tower"
    Config = JointTowerConfig
    examples = ({},)

    def __init__(self, config: JointTowerConfig) -> None:
        super().__init__(config)
        self.patches = nn.Linear(3 * PATCH * PATCH, WIDTH)
        self.words = nn.EmbeddingBag(IDS, WIDTH, mode="sum")
        self.start = nn.Parameter(torch.randn(WIDTH))
        self.asks = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Parameter(torch.randn(WIDTH, DIM) * WIDTH**-0.5)

    @classmethod
    def spec(cls, config: Any) -> BackboneSpec:
        return BackboneSpec(WIDTH, DIM, class_tokens=1)

    def encode_together(self, inputs: Sequence[TowerInput]) -> list[Encoded]:
        return [self._one(x) for x in inputs]

    def _one(self, one: TowerInput) -> Encoded:
        image, text = one.parts.values()
        n, side = len(image.x), image.x.shape[-1] // PATCH
        cut = image.x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [N, 3, side, side, P, P]
        patches = self.patches(cut.permute(0, 2, 3, 1, 4, 5).reshape(n, side * side, 3 * PATCH * PATCH))
        words = self.words(text.x.reshape(-1, 1)).view(*text.x.shape, WIDTH)
        real = torch.cat([patches.new_ones(n, 1 + side * side, dtype=torch.bool), text.x != 0], 1)
        sequence = torch.cat([self.start.expand(n, 1, -1), patches, words], 1)
        q, k, v = self.asks(sequence).chunk(3, -1)
        weights = (q @ k.mT * WIDTH**-0.5).masked_fill(~real[:, None], -1e4).softmax(-1)
        out = sequence + weights @ v
        return Encoded(
            out[:, 0] @ self.proj,
            out[:, 1:] if one.tokens else None,
            real[:, 1:] if one.tokens else None,
            class_tokens=out[:, :1],
        )


class TogetherConfig(LossConfig):
    joint: str = "image+text"


class Together(Loss):
    """1 - cosine of the joint embedding and the text's, and the size of the first view's tokens, without padding."""

    name = "together"
    Config = TogetherConfig
    partial = True

    @classmethod
    def needs(cls, config: TogetherConfig, plan: Plan) -> Needs:
        return Needs(student=("text",), tokens={config.joint: (0,)})

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        joint, text = outputs.student[self.config.joint], outputs.student["text"]
        near = (1 - (joint.embedding[0] * text.embedding[0]).sum(-1)).mean()
        tokens = joint.tokens[0] * joint.masks[0][..., None]
        return {"near": near, "size": tokens.square().sum((1, 2)).mean() / 100}, {
            "rows": torch.tensor(float(len(joint.pooled[0])))
        }


def views(config: JointTowerConfig, rng: np.random.Generator) -> list[View]:
    """Two of noise."""

    def one() -> View:
        image = torch.from_numpy(rng.standard_normal((3, 16, 16), dtype=np.float32))
        return View({"image": image, "text": torch.from_numpy(rng.integers(1, 99, 5))}, GLOBAL)

    return [one(), one()]


CASES = [ConformanceCase(OneTower, views=views)]


@hookimpl
def distill_components() -> list[type]:
    """The tower, and a loss that reads it."""
    return [OneTower, Together]
