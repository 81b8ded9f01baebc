"""CoCa's multimodal decoder (section 3.2): it continues the unimodal text layers, and reads what a pooler makes of the
image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core import ComponentConfig, Encoded, Plan
from distill_vl.decoders import CrossAttention, DecoderBlock, Readout, TextDecoder

Positive = Annotated[int, Field(gt=0)]


class CocaDecoderConfig(ComponentConfig):
    """Defaults are CoCa-Base's; the width is that of the text tower."""

    image: str = "image"
    """The modality whose tokens are read."""
    text: str = "text"
    """The modality that is written; its tower's layers are the unimodal ones."""
    layers: Positive = 12
    """Multimodal blocks."""
    heads: Positive = 12
    """Attention heads of each block and of the pooler; they divide the text tower's width."""
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Hidden width of each block's MLP, in widths."""
    queries: Positive = 256
    """Learned queries of the pooler: so many tokens of the image are read."""


class AttentionalPooler(nn.Module):
    """LN(attention(queries, LN(tokens))): a fixed number of tokens of any number."""

    def __init__(self, width: int, heads: int, queries: int, width_read: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(width**-0.5 * torch.randn(queries, width))
        self.norm_read, self.norm = nn.LayerNorm(width_read), nn.LayerNorm(width)
        self.attention = CrossAttention(width, heads, width_read)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """tokens [N, P, W'], mask [N, P] -> [N, queries, W]."""
        queries = self.queries.expand(tokens.shape[0], -1, -1)
        pooled: Tensor = self.norm(self.attention(queries, self.norm_read(tokens), mask))
        return pooled


class CocaDecoder(TextDecoder):
    """Causal blocks over what the text tower makes of the text, each with cross-attention to the pooled image."""

    name = "coca_decoder"
    Config = CocaDecoderConfig
    examples = ({"layers": 2, "heads": 4, "queries": 5},)

    def __init__(self, config: CocaDecoderConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        text, image = plan.modalities[config.text].spec, plan.modalities[config.image].spec
        assert text.vocabulary is not None  # or `problems` says so
        self.pooler = AttentionalPooler(text.width, config.heads, config.queries, image.width)
        self.blocks = nn.ModuleList(
            [DecoderBlock(text.width, config.heads, config.mlp_ratio, text.width) for _ in range(config.layers)]
        )
        self.readout = Readout(text.width, text.vocabulary.size)

    @classmethod
    def reads(cls, config: CocaDecoderConfig) -> tuple[str, ...]:
        """Both."""
        return (config.image, config.text)

    @classmethod
    def problems(cls, config: CocaDecoderConfig, plan: Plan) -> Iterable[str]:
        """A width that the heads divide."""
        yield from super().problems(config, plan)
        width = plan.modalities[config.text].spec.width
        if width % config.heads:
            yield f"{cls.name!r} has {config.heads} heads, which do not divide the width {width} of {config.text!r}"

    def forward(self, encoded: Mapping[str, Encoded], ids: Tensor, rows: Tensor | None = None) -> Tensor:
        """As `Decoder.forward`; of the ids the text tower has made the tokens."""
        image, text = encoded[self.config.image], encoded[self.config.text]
        assert image.tokens is not None
        assert text.tokens is not None
        read = self.pooler(image.tokens, image.mask)
        x = text.tokens[:, : ids.shape[1]]
        for block in self.blocks:
            x = block(x, read)
        logits: Tensor = self.readout(x, rows)
        return logits
