"""Decoders of text: heads that write captions of what an image tower sees.

N samples, L ids, S ids of the vocabulary, P tokens that are read, W widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import linear

from distill_core import ComponentConfig, Decoder, Encoded, Plan, wide
from distill_kernels import cross_attention
from distill_vl.transformer import MLP, Attention, Block, Sequences

Positive = Annotated[int, Field(gt=0)]


class DecoderConfig(ComponentConfig):
    """What is read and written, and the size of the decoder."""

    image: str = "image"
    """The modality whose tokens are read."""
    text: str = "text"
    """The modality that is written."""
    width: Positive = 512
    """Width W of the decoder."""
    layers: Positive = 6
    """Blocks."""
    heads: Positive = 8
    """Attention heads of each block; they divide `width`."""
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Hidden width of each block's MLP, in widths W."""

    @model_validator(mode="after")
    def _fits(self) -> DecoderConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.image == self.text:
            raise ValueError(f"image and text are both {self.text!r}: it reads one and writes the other")
        return self


class CaptionDecoderConfig(DecoderConfig):
    """Options of `caption_decoder`."""

    parallel: bool = False
    """Whether it can also predict a whole caption at once (`Captioning`'s option of that name): it has a mask token."""


class CrossAttention(nn.Module):
    """Each of x's tokens reads those of another sequence, of another width."""

    def __init__(self, width: int, heads: int, width_read: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width_read, 2 * width)
        self.out = nn.Linear(width, width)
        for part in (self.q, self.kv, self.out):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [N, L, W] reads tokens [N, P, W'], those of mask [N, P] -> [N, L, W]."""
        q = rearrange(self.q(x), "n l (h k) -> n h l k", h=self.heads)
        k, v = rearrange(self.kv(tokens), "n p (j h k) -> j n h p k", j=2, h=self.heads).unbind()
        out: Tensor = self.out(rearrange(cross_attention(q, k, v, mask=mask), "n h l k -> n l (h k)"))
        return out


class DecoderBlock(nn.Module):
    """x + self-attention(LN(x)), then + cross-attention(LN(x), tokens), then + MLP(LN(x))."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, width_read: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.ln_2, self.cross = nn.LayerNorm(width), CrossAttention(width, heads, width_read)
        self.ln_3, self.mlp = nn.LayerNorm(width), MLP(width, mlp_ratio)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None = None, causal: bool = True) -> Tensor:
        """x [N, L, W], tokens [N, P, W'], mask [N, P] -> [N, L, W]."""
        n, length, _ = x.shape
        own = self.attn(x.flatten(0, 1), Sequences.of((n, length), causal=causal), norm=self.ln_1)
        x = x + own.view(x.shape)
        x = x + self.cross(self.ln_2(x), tokens, mask)
        return x + self.mlp(self.ln_3(x))  # type: ignore[no-any-return]


class Readout(nn.Module):
    """LayerNorm, then a linear map to the ids. It is computed in fp32 under autocast, too: in bf16, logits of some ten
    are good to a sixteenth."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.ids = nn.Parameter(width**-0.5 * torch.randn(size, width))

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """x [N, L, W] -> [N, L, S], or at `rows` [R] of N * L alone [R, S]; fp32 or wider."""
        if rows is not None:
            x = x.flatten(0, 1).index_select(0, rows)
        x = self.norm(x)
        with torch.autocast(x.device.type, enabled=False):
            return linear(wide(x), wide(self.ids))


class TextDecoder(Decoder):
    """Base: one modality's tokens are read, and text is written with ids of its backbone's vocabulary."""

    Config: ClassVar[type[ComponentConfig]] = DecoderConfig

    @classmethod
    def writes(cls, config: Any) -> str:
        """The option `text`."""
        name: str = config.text
        return name

    @classmethod
    def reads(cls, config: Any) -> tuple[str, ...]:
        """The option `image`."""
        return (config.image,)

    def units(self) -> Sequence[nn.Module]:
        """The blocks."""
        return list(self.blocks)

    blocks: nn.ModuleList


class CaptionDecoder(TextDecoder):
    """A transformer with ids of its own: causal over the text, each block reads the image's tokens by cross-attention
    (CapPa, arXiv 2306.07915; LocCa, arXiv 2403.19596)."""

    name = "caption_decoder"
    Config = CaptionDecoderConfig
    examples = ({"width": 32, "layers": 2, "heads": 2},)

    def __init__(self, config: CaptionDecoderConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        vocabulary = plan.modalities[config.text].spec.vocabulary
        assert vocabulary is not None  # or `problems` says so
        width, width_read = config.width, plan.modalities[config.image].spec.width
        self.token_embedding = nn.Embedding(vocabulary.size, width)
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(vocabulary.longest, width))
        if config.parallel:
            self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.blocks = nn.ModuleList(
            [DecoderBlock(width, config.heads, config.mlp_ratio, width_read) for _ in range(config.layers)]
        )
        self.readout = Readout(width, vocabulary.size)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(
        self, encoded: Mapping[str, Encoded], ids: Tensor, rows: Tensor | None = None, *, parallel: bool = False
    ) -> Tensor:
        """As `Decoder.forward`; `parallel` shows a mask token in each id's place and lets every place look at all
        others, so that the caption is made of the image alone (CapPa's parallel prediction)."""
        image = encoded[self.config.image]
        assert image.tokens is not None
        x = self.mask_token.expand(*ids.shape, -1) if parallel else self.token_embedding(ids)
        x = x + self.positional_embedding[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, image.tokens, image.mask, not parallel)
        logits: Tensor = self.readout(x, rows)
        return logits


class PrefixDecoder(TextDecoder):
    """Prefix language modelling: the image's tokens, which look at one another, and then the text, each of whose tokens
    looks at them and at those before it, in one sequence (SimVLM, arXiv 2108.10904; GIT, arXiv 2205.14100)."""

    name = "prefix_decoder"
    examples = ({"width": 32, "layers": 2, "heads": 2},)

    def __init__(self, config: DecoderConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        vocabulary = plan.modalities[config.text].spec.vocabulary
        assert vocabulary is not None  # or `problems` says so
        width = config.width
        self.image_map = nn.Linear(plan.modalities[config.image].spec.width, width)
        self.token_embedding = nn.Embedding(vocabulary.size, width)
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(vocabulary.longest, width))
        self.blocks = nn.ModuleList([Block(width, config.heads, config.mlp_ratio) for _ in range(config.layers)])
        self.readout = Readout(width, vocabulary.size)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, encoded: Mapping[str, Encoded], ids: Tensor, rows: Tensor | None = None) -> Tensor:
        """As `Decoder.forward`."""
        image = encoded[self.config.image]
        assert image.tokens is not None
        text = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        x = torch.cat([self.image_map(image.tokens), text.to(image.tokens.dtype)], 1)
        (n, length, _), prefix = x.shape, image.tokens.shape[1]
        place = torch.arange(length, device=x.device)
        sees = (place <= place[:, None]) | (place < prefix)  # [query, key]
        allowed = sees.expand(n, 1, -1, -1)
        if image.mask is not None:
            allowed = allowed & torch.cat([image.mask, image.mask.new_ones(ids.shape)], 1)[:, None, None]
        sequences = Sequences(shapes=((n, length),), mask=allowed)
        x = x.flatten(0, 1)
        for block in self.blocks:
            x = block(x, sequences)
        logits: Tensor = self.readout(x.view(n, length, -1)[:, prefix:], rows)
        return logits
