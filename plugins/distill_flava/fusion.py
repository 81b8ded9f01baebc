"""FLAVA's multimodal encoder (section 3.1): a transformer over a class token and the tokens of all modalities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core import GLOBAL, ComponentConfig, Features, Fused, FusionHead, Needs, Plan
from distill_vl.token_fusion import head_problems, pair_problems, unit
from distill_vl.transformer import Sequences, Transformer


class MultimodalEncoderConfig(ComponentConfig):
    """Defaults are the paper's: 6 layers of 12 heads."""

    modalities: tuple[str, str] = ("image", "text")
    """The two modalities, in the order of their tokens."""
    role: str = GLOBAL
    """The first view of this role of each modality is fused; FLAVA's is `masked`."""
    layers: Annotated[int, Field(gt=0)] = 6
    """Transformer blocks."""
    heads: Annotated[int, Field(gt=0)] = 12
    """Attention heads of each block; they divide the embedding width D."""
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Hidden width of each block's MLP, in widths D."""


class MultimodalEncoder(FusionHead):
    """LN(transformer([class token; map(tokens of a); map(tokens of b)])); no token attends to padding.

    `pooled[m]` [1, B, D] is the normalised class token, the same for both modalities; `tokens[m]` [B, L, D] the
    outputs at m's tokens, zeros at padding.
    """

    name = "multimodal_encoder"
    Config = MultimodalEncoderConfig
    examples = ({"layers": 2, "heads": 2}, {"layers": 1, "heads": 2, "role": "masked"})

    def __init__(self, config: MultimodalEncoderConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        plans = {m: plan.modalities[m] for m in config.modalities}
        dim = plans[config.modalities[0]].spec.dim
        self.view = {m: p.views(config.role)[0] for m, p in plans.items()}
        self.token_map = nn.ModuleDict({m: nn.Linear(p.spec.width, dim) for m, p in plans.items()})
        self.class_token = nn.Parameter(0.02 * torch.randn(dim))
        self.transformer = Transformer(dim, config.layers, config.heads, config.mlp_ratio)
        self.ln_post = nn.LayerNorm(dim)

    @classmethod
    def needs(cls, config: MultimodalEncoderConfig, plan: Plan) -> Needs:
        """Tokens of one view of both modalities."""
        tokens = {m: plan.modalities[m].views(config.role)[:1] for m in config.modalities}
        return Needs(student=config.modalities, tokens=tokens, views={m: {config.role: 1} for m in tokens})

    @classmethod
    def problems(cls, config: MultimodalEncoderConfig, plan: Plan) -> Iterable[str]:
        """One width D on both sides, divisible by the heads."""
        yield from pair_problems(cls.name, config.modalities, plan)
        yield from head_problems(cls.name, config.modalities, config.heads, plan)

    def forward(self, features: Mapping[str, Features]) -> dict[str, Fused]:
        """The chosen view of both modalities, pair by pair."""
        first, second = self.config.modalities
        tokens = {m: features[m].tokens[self.view[m]] for m in (first, second)}
        real = {m: _real(x, features[m].masks.get(self.view[m])) for m, x in tokens.items()}
        mapped = {m: self.token_map[m](x) for m, x in tokens.items()}
        start = self.class_token.expand(len(mapped[first]), 1, -1)
        always = real[first].new_ones(len(start), 1)
        sequence = self._encode(
            torch.cat([start, mapped[first], mapped[second]], 1), torch.cat([always, real[first], real[second]], 1)
        )
        middle = 1 + tokens[first].shape[1]
        pooled = unit(sequence[:, 0])[None]
        return {first: Fused(pooled, sequence[:, 1:middle]), second: Fused(pooled, sequence[:, middle:])}

    def _encode(self, sequence: Tensor, real: Tensor) -> Tensor:
        """sequence [N, S, D], real [N, S] -> [N, S, D]; zeros where it is not real, which no token sees."""
        n, length, _ = sequence.shape
        sequences = Sequences(shapes=((n, length),), mask=real)
        out: Tensor = self.ln_post(self.transformer(sequence.flatten(0, 1), sequences))
        return out.view(sequence.shape).masked_fill(~real[..., None], 0.0)


def _real(tokens: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask
