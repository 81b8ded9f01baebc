"""CLIP's causal text transformer (Radford et al. 2021)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import embedding, pad

from distill_core import (
    GLOBAL,
    LOCAL,
    Backbone,
    BackboneSpec,
    Collator,
    ComponentConfig,
    Encoded,
    Features,
    Group,
    Plan,
    View,
    Views,
)
from distill_vl.tokenizer import VOCABULARY, ClipTokenizer
from distill_vl.transformer import Activation, Block, Sequences, Transformer

Positive = Annotated[int, Field(gt=0)]


class ClipTextConfig(ComponentConfig):
    """Defaults are CLIP's 12-layer text tower of width 512."""

    context: Annotated[int, Field(ge=3)] = 77
    """Longest sequence, start and end tokens included; longer texts are cut."""
    vocabulary: Positive = VOCABULARY
    """Rows of the token embedding; CLIP's tokenizer has 49408 ids."""
    width: Positive = 512
    """Width W of the tokens."""
    layers: Positive = 12
    """Transformer blocks."""
    heads: Positive = 8
    """Attention heads of each block; they divide `width`."""
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Hidden width of each block's MLP, in widths W."""
    dim: Positive = 512
    """Width D of the embedding."""
    activation: Activation = "gelu"
    """Of the blocks' MLPs; OpenAI's CLIP has `quick_gelu`."""
    padding: Literal["context", "longest"] = "context"
    """Tokens that are handed on reach to the whole context (as the public code's do) or to the batch's longest text.

    The embedding itself never depends on it: attention is causal.
    """

    @model_validator(mode="after")
    def _fits(self) -> ClipTextConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class ClipText(Backbone):
    """Causal transformer: pooled = end-of-text token after the final LayerNorm, times `text_projection`;
    tokens = all positions after that LayerNorm, with a mask of those up to end-of-text."""  # fmt: skip

    name = "clip_text"
    Config = ClipTextConfig
    examples = (
        {"context": 16, "width": 32, "layers": 2, "heads": 2, "dim": 24},
        {"context": 16, "width": 32, "layers": 2, "heads": 2, "dim": 24, "padding": "longest"},
    )

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__(config)
        width, layers = config.width, config.layers
        self.token_embedding = nn.Embedding(config.vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context, width))
        self.transformer = Transformer(width, layers, config.heads, config.mlp_ratio, config.activation)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, config.dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer.resblocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    @classmethod
    def spec(cls, config: ClipTextConfig) -> BackboneSpec:
        """Widths of tokens and embedding."""
        return BackboneSpec(config.width, config.dim, class_tokens=1)

    @classmethod
    def problems(cls, config: ClipTextConfig, plan: Plan) -> Iterable[str]:
        """Room for every id of the tokenizer."""
        if config.vocabulary < VOCABULARY:
            yield f"vocabulary {config.vocabulary} is too small: CLIP's tokenizer has {VOCABULARY} ids"

    @classmethod
    def collator(cls, config: ClipTextConfig) -> Collator:
        """Tokenises; ids [V, B, L] by role, cut to the longest text of the group."""
        return TextCollator(config.context)

    @classmethod
    def example_views(cls, config: ClipTextConfig, rng: np.random.Generator) -> list[View]:
        """Global and local texts."""
        return example_texts(rng)

    def forward(self, views: Views, *, tokens_of: Sequence[int] = (), masked: bool = False) -> Features:
        """As the base does, but all texts are one packed sequence.

        Attention is causal: what stands behind end-of-text is dead for the embedding, and is not computed for texts
        whose tokens nobody needs.
        """
        if masked and any(group.token_mask is not None for group in views.groups):
            raise ValueError("clip_text cannot hide tokens; use a text view whose words are masked")
        texts = [(start + i, x) for start, group in views.numbered() for i, x in enumerate(group.x)]
        read = [(view, self._padded(x)) for view, x in texts if view in tokens_of]
        rest = [(view, x) for view, x in texts if view not in tokens_of]
        ends, out = self._packed([x for _, x in read], [x for _, x in rest])
        by_view = dict(zip([view for view, _ in read + rest], ends, strict=True))
        classes = torch.stack([by_view[view] for view, _ in texts])
        features = Features(classes @ self.text_projection, class_tokens=classes[:, :, None])
        for (view, x), tokens in zip(read, torch.split(out, [x.numel() for _, x in read]) if read else [], strict=True):
            features.tokens[view] = tokens.view(*x.shape, tokens.shape[-1])
            features.masks[view] = torch.arange(x.shape[1], device=x.device) <= x.argmax(1, keepdim=True)
        return features

    def _packed(self, read: Sequence[Tensor], rest: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """ids [B, L], those of `read` whole -> end-of-text's tokens [B, W] of all, and all tokens [T, W] of `read`."""
        ids = [*read, *rest]
        device, sizes = ids[0].device, [len(x) for x in ids]
        # Read on the host once: where everything stands is worked out there.
        ends = torch.cat([x.argmax(1) for x in ids]).cpu()
        widths = torch.tensor([x.shape[1] for x in ids]).repeat_interleave(torch.tensor(sizes))
        whole, number = sum(x.numel() for x in read), sum(len(x) for x in read)
        lengths = torch.where(torch.arange(len(ends)) < number, widths, ends + 1)
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        place = torch.arange(int(starts[-1])) - starts[:-1].repeat_interleave(lengths)
        padded = (widths.cumsum(0) - widths).repeat_interleave(lengths) + place
        rows = torch.cat([torch.arange(whole), starts[number + 1 :] - 1])
        at_end = torch.cat([starts[:number] + ends[:number], torch.arange(whole, len(rows))])
        padded, place, rows, at_end = (x.to(device, non_blocking=True) for x in (padded, place, rows, at_end))
        flat = torch.cat([x.flatten() for x in ids])[padded]
        sequence = self.token_embedding(flat) + embedding(place, self.positional_embedding)
        out = self.ln_final(self.transformer(sequence, Sequences(starts.int(), causal=True), rows))
        return list(torch.split(out.index_select(0, at_end), sizes)), out[:whole]

    def _padded(self, x: Tensor) -> Tensor:
        """ids [N, L] -> [N, context], where tokens are handed on padded to it."""
        return pad(x, (0, self.config.context - x.shape[1])) if self.config.padding == "context" else x

    def encode(self, x: Tensor, *, tokens: bool, token_mask: Tensor | None) -> Encoded:
        """ids x [N, L] -> pooled [N, D], tokens [N, context or L, W] and their mask, class tokens [N, 1, W]."""
        if token_mask is not None:
            raise ValueError("clip_text cannot hide tokens; use a text view whose words are masked")
        end = x.argmax(1)
        if tokens:
            x = self._padded(x)
        sequence = self.token_embedding(x) + self.positional_embedding[: x.shape[1]]
        if not tokens:
            (read,) = self.transformer.together([sequence], [end[:, None]], causal=True)
            classes = self.ln_final(read)
            return Encoded(classes[:, 0] @ self.text_projection, class_tokens=classes)
        (sequence,) = self.transformer.together([sequence], [None], causal=True)
        sequence = self.ln_final(sequence)
        classes = sequence[torch.arange(x.shape[0], device=x.device), end]
        mask = torch.arange(x.shape[1], device=x.device) <= end[:, None]
        return Encoded(classes @ self.text_projection, sequence, mask, classes[:, None])

    def token_layout(self, view: View) -> list[str]:
        """The words and pieces of words."""
        return ClipTokenizer(self.config.context).pieces(view.data)

    def class_attention(self, x: Tensor) -> Tensor:
        """ids [N, L] -> weights of end-of-text over all positions in the last block, [N, H, context or L]."""
        end, x = x.argmax(1), self._padded(x)
        sequence = self.token_embedding(x) + self.positional_embedding[: x.shape[1]]
        return self.transformer.weights(sequence, end, causal=True)


def example_texts(rng: np.random.Generator) -> list[View]:
    """Two global texts of three to eight words, and a local one of two."""
    counts = ((GLOBAL, int(rng.integers(3, 9))), (GLOBAL, int(rng.integers(3, 9))), (LOCAL, 2))
    words = ["a", "red", "old", "bird", "boat", "by", "the", "sea"]
    return [View(" ".join(rng.choice(words, n)), role, i) for i, (role, n) in enumerate(counts)]


class RoleCollator(ABC):
    """The views of B samples -> groups of ids [V, B, L] by role; L is the longest text of the group."""

    @abstractmethod
    def padded(self, texts: list[str]) -> Tensor:
        """Ids [N, L] of N texts, padded to the longest."""

    def __call__(self, samples: list[list[View]], seeds: Sequence[int] = ()) -> Views:
        """View i of every sample has the same role."""
        groups: dict[str, list[int]] = {}
        for i, view in enumerate(samples[0]):
            groups.setdefault(view.role, []).append(i)
        result = []
        for role, members in groups.items():
            ids = self.padded([sample[i].data for i in members for sample in samples])
            source = torch.tensor([[sample[i].source for sample in samples] for i in members])
            result.append(Group(ids.reshape(len(members), len(samples), ids.shape[1]), role, source))
        return Views(result)


class TextCollator(RoleCollator):
    """With CLIP's ids, up to end-of-text."""

    def __init__(self, context: int) -> None:
        self.tokenize = ClipTokenizer(context)

    def padded(self, texts: list[str]) -> Tensor:
        """Ids [N, L]; padding is 0."""
        ids = self.tokenize(texts)
        longest = int(ids.argmax(1).max()) + 1  # end-of-text is the largest id; 0 is padding, and also "!"
        return ids[:, :longest]
