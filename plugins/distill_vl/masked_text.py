"""A text transformer that looks both ways and can hide words (BERT, Devlin et al. 2019), on CLIP's tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from distill_core import (
    GLOBAL,
    Backbone,
    BackboneSpec,
    Collator,
    ComponentConfig,
    Encoded,
    ModalityPlan,
    Plan,
    TowerInput,
    View,
    Views,
)
from distill_vl.clip_text import Positive, TextCollator, clip_vocabulary, lengths_of, to_device
from distill_vl.masking import MASK_OPTION, role_problems
from distill_vl.tokenizer import VOCABULARY, ClipTokenizer
from distill_vl.transformer import LayerOutputs, Sequences, Transformer


class TokenMaskingConfig(ComponentConfig):
    """Which tokens are hidden; never start and end of a text."""

    roles: Annotated[tuple[str, ...], Field(min_length=1)] = (GLOBAL,)
    """Views of these roles are masked, for the student only."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.15
    """Share of a text's tokens that is hidden, at least one; all of them by the mask token."""


class BertTextConfig(ComponentConfig):
    """Defaults are FLAVA's: 12 layers of width 768."""

    context: Annotated[int, Field(ge=3)] = 77
    """Longest sequence, start and end tokens included; longer texts are cut."""
    vocabulary: Positive = VOCABULARY
    """Rows of the token embedding; CLIP's tokenizer has 49408 ids."""
    width: Positive = 768
    """Width W of the tokens."""
    layers: Positive = 12
    """Transformer blocks."""
    heads: Positive = 12
    """Attention heads of each block; they divide `width`."""
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Hidden width of each block's MLP, in widths W."""
    dim: Positive = 768
    """Width D of the embedding."""
    masking: TokenMaskingConfig | None = None
    """Tokens that are hidden from the student, as {share: 0.15}; null for none."""

    @model_validator(mode="after")
    def _fits(self) -> BertTextConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class BertText(Backbone):
    """Pre-norm transformer, not causal: pooled = start token after the final LayerNorm, times `text_projection`;
    tokens = all positions after that LayerNorm, zeros at padding, which is never computed.

    With `masking`, a hidden token's embedding is the learned `mask_token`, before positions are added.
    """  # fmt: skip

    name = "bert_text"
    Config = BertTextConfig
    examples = (
        {"context": 16, "width": 32, "layers": 2, "heads": 2, "dim": 24},
        {"context": 16, "width": 32, "layers": 2, "heads": 2, "dim": 24, "masking": {"share": 0.3}},
    )

    def __init__(self, config: BertTextConfig) -> None:
        super().__init__(config)
        width = config.width
        self.token_embedding = nn.Embedding(config.vocabulary, width)
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(config.context, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.layers, config.heads, config.mlp_ratio)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, config.dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        if config.masking is not None:
            self.mask_token = nn.Parameter(0.02 * torch.randn(width))

    @classmethod
    def spec(cls, config: BertTextConfig) -> BackboneSpec:
        """Widths of tokens and embedding."""
        return BackboneSpec(
            config.width,
            config.dim,
            can_mask=config.masking is not None,
            mask_option=MASK_OPTION,
            class_tokens=1,
            layers=config.layers,
            vocabulary=clip_vocabulary(config.vocabulary, config.context),
        )

    @classmethod
    def problems(cls, config: BertTextConfig, plan: Plan) -> Iterable[str]:
        """Room for every id of the tokenizer."""
        if config.vocabulary < VOCABULARY:
            yield f"vocabulary {config.vocabulary} is too small: CLIP's tokenizer has {VOCABULARY} ids"

    @classmethod
    def view_problems(cls, config: BertTextConfig, views: ModalityPlan) -> Iterable[str]:
        """Roles to be masked that no view has."""
        return role_problems(config.masking.roles, views) if config.masking is not None else ()

    @classmethod
    def collator(cls, config: BertTextConfig) -> Collator:
        """Tokenises; ids [V, B, L] by role, cut to the longest text of the group; draws masks."""
        return MaskedTextCollator(config.context, config.masking)

    def units(self) -> Sequence[nn.Module]:
        """The blocks."""
        return list(self.transformer.resblocks)

    def encode_together(self, inputs: Sequence[TowerInput]) -> list[Encoded]:
        """As `encode`, one after the other; which tokens are real is worked out on the host, from the lengths."""
        return [self._encode(text) for text in inputs]

    def encode(self, x: Tensor, *, tokens: bool, token_mask: Tensor | None) -> Encoded:
        """ids x [N, L] -> pooled [N, D], tokens [N, L, W] and their mask, class tokens [N, 1, W].

        Raises ValueError for a `token_mask` [N, L] without the option `masking`.
        """
        return self._encode(TowerInput(x, tokens, token_mask))

    def _encode(self, text: TowerInput) -> Encoded:
        sequence, real, starts, rows, first = self._embed(text)
        seen = LayerOutputs(text.layers)
        packed = sequence.flatten(0, 1).index_select(0, rows)
        packed = self.transformer(packed, starts, None if text.tokens else first, seen)
        packed = self.ln_final(packed)
        classes = packed.index_select(0, first) if text.tokens else packed
        encoded = Encoded(classes @ self.text_projection, class_tokens=classes[:, None])
        if text.tokens:
            encoded.tokens, encoded.mask = _padded(packed, rows, text.x), real
            encoded.layers = {layer: _padded(x, rows, text.x) for layer, x in seen.items()}
        return encoded

    def token_layout(self, view: View) -> list[str]:
        """The words and pieces of words."""
        return ClipTokenizer(self.config.context).pieces(view.data)

    def detokenize(self, ids: Tensor) -> list[str]:
        """Texts."""
        return ClipTokenizer(self.config.context).texts(ids)

    def class_attention(self, x: Tensor) -> Tensor:
        """ids [N, L] -> the start token's weights over all positions in the last block, [N, H, L]."""
        sequence, real, sequences, rows, first = self._embed(TowerInput(x))
        packed = self.transformer.body(sequence.flatten(0, 1).index_select(0, rows), sequences)
        return self.transformer.last.weights(_padded(packed, rows, x), torch.zeros_like(first), real)

    def _embed(self, text: TowerInput) -> tuple[Tensor, Tensor, Sequences, Tensor, Tensor]:
        """The transformer's input [N, L, W], which of it is real [N, L]; packed, which rows of [N * L] are taken, and
        where in them each sequence begins, [N]."""
        x = text.x
        embedded = self.token_embedding(x)
        if text.token_mask is not None:
            if self.config.masking is None:
                raise ValueError("bert_text hides tokens only with the option `masking`")
            embedded = torch.where(text.token_mask[..., None], self.mask_token, embedded)
        sequence = self.ln_pre(embedded + self.positional_embedding[: x.shape[1]])
        lengths = lengths_of(text)
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        rows = (torch.arange(x.shape[1]) < lengths[:, None]).flatten().nonzero()[:, 0]
        lengths, rows, first = to_device(x.device, lengths, rows, starts[:-1])
        real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        return sequence, real, Sequences(starts.int()), rows, first


def _padded(packed: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """packed [T, W], of the rows [T] of ids [N, L] -> [N, L, W], zeros elsewhere."""
    whole = packed.new_zeros(ids.numel(), packed.shape[-1])
    return whole.index_copy(0, rows, packed).view(*ids.shape, packed.shape[-1])


class MaskedTextCollator(TextCollator):
    """As `TextCollator`, some groups with `token_mask`, and the ids themselves as `targets`."""

    def __init__(self, context: int, masking: TokenMaskingConfig | None) -> None:
        super().__init__(context)
        self.masking = masking

    def __call__(self, samples: list[list[View]], seeds: Sequence[int] = ()) -> Views:
        """Masks are drawn from the samples' seeds. Raises ValueError where those are missing."""
        views = super().__call__(samples, seeds)
        masking = self.masking
        if masking is None:
            return views
        generators = [np.random.default_rng(seed) for seed in seeds]
        for group in views.groups:
            if group.role not in masking.roles:
                continue
            if len(generators) != len(samples):
                raise ValueError("masks are drawn from a seed for each sample; no seeds were given")
            group.token_mask = torch.stack(
                [
                    torch.stack(
                        [draw_word_mask(ids, masking.share, rng) for ids, rng in zip(x, generators, strict=True)]
                    )
                    for x in group.x
                ]
            )
            group.targets = group.x
        return views


def draw_word_mask(ids: Tensor, share: float, rng: np.random.Generator) -> Tensor:
    """[L] bool of ids [L]: `share` of the tokens between start and end, rounded, at least one; none of no tokens."""
    words = int(ids.argmax()) - 1
    hidden = torch.zeros(len(ids), dtype=torch.bool)
    if words > 0:
        hidden[1 + torch.from_numpy(rng.permutation(words)[: max(1, round(share * words))])] = True
    return hidden
