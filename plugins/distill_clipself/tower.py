"""The student of CLIPSelf: a ViT whose tokens are its dense embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from pydantic import model_validator
from torch import Tensor

from distill_clipself.views import REGION
from distill_core import BackboneSpec, Encoded, Features, TowerInput, Views
from distill_vl.transformer import Sequences
from distill_vl.vit import VisionTransformer, VisionTransformerConfig


class DenseVitConfig(VisionTransformerConfig):
    """Those of `vit`, of which it takes any checkpoint."""

    @model_validator(mode="after")
    def _has_class_token(self) -> DenseVitConfig:
        if self.pooling != "class_token":
            raise ValueError("pooling: the regions learn from class tokens; it must be class_token")
        return self


class DenseVit(VisionTransformer):
    """`vit` whose tokens are its dense embeddings (`attention: value`; MaskCLIP): in the last block a patch keeps its
    own value, and its output goes through LayerNorm and `proj`. Parameters are named as in `vit`.

    Views of the role `region` are the teacher's: it makes zeros of them, and computes nothing.
    """

    name = "dense_vit"
    Config = DenseVitConfig
    examples = (  # type: ignore[assignment]
        {"image_size": 16, "patch": 4, "width": 32, "layers": 2, "heads": 2, "dim": 24},
    )

    @classmethod
    def spec(cls, config: VisionTransformerConfig) -> BackboneSpec:
        """Tokens of width D; neither class tokens nor layers."""
        return replace(super().spec(config), width=config.dim, class_tokens=0, layers=0, can_drop=False)

    def forward(
        self,
        views: Views,
        *,
        tokens_of: Sequence[int] = (),
        masked: bool = False,
        layers_of: Mapping[int, Sequence[int]] | None = None,
        attention_of: Sequence[int] = (),
    ) -> Features:
        """See `Backbone`; `pooled` of regions is zero."""
        regions = sum(len(group.x) for group in views.groups if group.role == REGION)
        own = Views([group for group in views.groups if group.role != REGION])
        features = super().forward(
            own, tokens_of=tokens_of, masked=masked, layers_of=layers_of, attention_of=attention_of
        )
        if regions:
            none = features.pooled.new_zeros(regions, *features.pooled.shape[1:])
            features.pooled = torch.cat([features.pooled, none])  # roles stand together, regions last
        return features

    def encode_together(self, inputs: Sequence[TowerInput]) -> list[Encoded]:
        """Crops of each size by themselves."""
        return [self._encode(crops) for crops in inputs]

    def _encode(self, crops: TowerInput) -> Encoded:
        sequence = self._embed(crops.x, crops.token_mask)
        plain = Sequences.of((sequence.shape[0], sequence.shape[1]))
        body = self.transformer.body(sequence.flatten(0, 1), plain)
        out = self.transformer.last(body, plain, [self._class_index(crops.x)])
        pooled = self._classes(out.view(len(sequence), self.leading, sequence.shape[-1]))[:, 0] @ self.proj
        return Encoded(pooled, self._patches(body, plain, sequence) if crops.tokens else None)

    def _patches(self, body: Tensor, plain: Sequences, sequence: Tensor) -> Tensor:
        """[N, L, D]."""
        out = self.transformer.last(body, replace(plain, attention="value")).view(sequence.shape)
        patches: Tensor = self.ln_post(out[:, self.leading :]) @ self.proj
        return patches
