"""A transformer over spectrograms: Whisper's stem, CLIP's blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import gelu

from distill_core import (
    Backbone,
    BackboneSpec,
    Collator,
    ComponentConfig,
    Encoded,
    ModalityPlan,
    TowerInput,
    stack_views,
)
from distill_vl.transformer import Activation, Transformer

Positive = Annotated[int, Field(gt=0)]


class SpeechTransformerConfig(ComponentConfig):
    """Defaults are the size of ViT-S."""

    mels: Positive = 80
    """Bands of the spectrograms; as the augmentation's."""
    frames: Positive = 300
    """Frames of the spectrograms; as the augmentation's."""
    patch: Positive = 2
    """Frames that become one token; they divide `frames`."""
    width: Positive = 384
    """Width W of the tokens."""
    layers: Positive = 12
    """Transformer blocks."""
    heads: Positive = 6
    """Attention heads of each block; they divide `width`."""
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Hidden width of each block's MLP, in widths W."""
    dim: Positive = 512
    """Width D of the embedding."""
    activation: Activation = "gelu"
    """Of the blocks' MLPs."""

    @model_validator(mode="after")
    def _fits(self) -> SpeechTransformerConfig:
        if self.frames % self.patch:
            raise ValueError(f"frames {self.frames} is not a multiple of patch {self.patch}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class SpeechTransformer(Backbone):
    """Two convolutions over time, the second with a stride of `patch` frames, then blocks with learned positions:
    pooled = class token after the final LayerNorm, times `proj`; tokens = time steps after that LayerNorm.

    Silence after a short recording is seen as such, as in Whisper and AST: no token is padding.
    """

    name = "speech_transformer"
    Config = SpeechTransformerConfig
    after_units = ("ln_post", "proj")
    examples = ({"mels": 16, "frames": 50, "patch": 5, "width": 32, "layers": 2, "heads": 2, "dim": 24},)

    def __init__(self, config: SpeechTransformerConfig) -> None:
        super().__init__(config)
        width, scale = config.width, config.width**-0.5
        self.conv1 = nn.Conv1d(config.mels, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, config.patch, stride=config.patch)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(1 + config.frames // config.patch, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.layers, config.heads, config.mlp_ratio, config.activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, config.dim))

    @classmethod
    def spec(cls, config: SpeechTransformerConfig) -> BackboneSpec:
        """Widths of tokens and embedding."""
        return BackboneSpec(config.width, config.dim, class_tokens=1, layers=config.layers)

    @classmethod
    def view_problems(cls, config: SpeechTransformerConfig, views: ModalityPlan) -> Iterable[str]:
        """Spectrograms of another size."""
        for shape in dict.fromkeys(views.shapes or ()):
            if shape != (config.mels, config.frames):
                dims = " x ".join(map(str, shape))
                yield f"{cls.name!r} reads {config.mels} mels x {config.frames} frames; the views are {dims}"

    @classmethod
    def collator(cls, config: SpeechTransformerConfig) -> Collator:
        """Stacks spectrograms."""
        return stack_views

    def units(self) -> Sequence[nn.Module]:
        """The blocks."""
        return list(self.transformer.resblocks)

    def encode(self, x: Tensor, *, tokens: bool, token_mask: Tensor | None) -> Encoded:
        """x [N, mels, frames] -> pooled [N, D], tokens [N, L, W], class tokens [N, 1, W]."""
        return self.encode_together([TowerInput(x, tokens, token_mask)])[0]

    def encode_together(self, inputs: Sequence[TowerInput]) -> list[Encoded]:
        """One packed sequence. Raises ValueError for a `token_mask`."""
        if any(recordings.token_mask is not None for recordings in inputs):
            raise ValueError(f"{self.name} cannot hide tokens")
        sequences = [self._embed(recordings.x) for recordings in inputs]
        class_at = [
            None if recordings.tokens else recordings.x.new_zeros(len(recordings.x), 1, dtype=torch.long)
            for recordings in inputs
        ]
        layers_read = {layer for recordings in inputs for layer in recordings.layers}
        outs, layers = self.transformer.together(sequences, class_at, layers=layers_read)
        encoded = []
        for out, own, recordings in zip(outs, layers, inputs, strict=True):
            normed = self.ln_post(out)
            tokens = normed[:, 1:] if recordings.tokens else None
            of_layers = {layer: own[layer][:, 1:] for layer in recordings.layers}
            encoded.append(Encoded(normed[:, 0] @ self.proj, tokens, class_tokens=normed[:, :1], layers=of_layers))
        return encoded

    def _embed(self, x: Tensor) -> Tensor:
        """x [N, mels, frames] -> [N, 1 + L, W]."""
        steps = gelu(self.conv2(gelu(self.conv1(x)))).transpose(1, 2)
        start = self.class_embedding.to(steps.dtype).expand(len(x), 1, -1)
        embedded: Tensor = self.ln_pre(torch.cat([start, steps], 1) + self.positional_embedding)
        return embedded
