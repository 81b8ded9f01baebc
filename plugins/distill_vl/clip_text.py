"""CLIP's causal text transformer (Radford et al. 2021)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import embedding, pad

from distill_core import (
    Backbone,
    BackboneSpec,
    Collator,
    ComponentConfig,
    Encoded,
    Group,
    ModalityPlan,
    Plan,
    TowerInput,
    View,
    Views,
    Vocabulary,
)
from distill_vl.tokenizer import END, START, VOCABULARY, ClipTokenizer
from distill_vl.transformer import Activation, Block, LayerOutputs, Sequences, Transformer

Positive = Annotated[int, Field(gt=0)]

CANNOT_HIDE = "clip_text cannot hide tokens; use a text view whose words are masked"


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
    after_units = ("ln_final", "text_projection")
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
        vocabulary = clip_vocabulary(config.vocabulary, config.context)
        return BackboneSpec(
            config.width, config.dim, class_tokens=1, layers=config.layers, vocabulary=vocabulary, causal=True
        )

    @classmethod
    def problems(cls, config: ClipTextConfig, plan: Plan) -> Iterable[str]:
        """Room for every id of the tokenizer."""
        if config.vocabulary < VOCABULARY:
            yield f"vocabulary {config.vocabulary} is too small: CLIP's tokenizer has {VOCABULARY} ids"

    @classmethod
    def view_problems(cls, config: ClipTextConfig, views: ModalityPlan) -> Iterable[str]:
        """Views that are arrays."""
        if views.shapes is not None:
            shapes = ", ".join(" x ".join(map(str, shape)) for shape in dict.fromkeys(views.shapes))
            yield f"{cls.name!r} reads texts, and the views of its modality are arrays ({shapes})"

    @classmethod
    def collator(cls, config: ClipTextConfig) -> Collator:
        """Tokenises; ids [V, B, L] by role, cut to the longest text of the group."""
        return TextCollator(config.context)

    def units(self) -> Sequence[nn.Module]:
        """The blocks."""
        return list(self.transformer.resblocks)

    def encode_together(self, inputs: Sequence[TowerInput]) -> list[Encoded]:
        """All texts are one packed sequence.

        Attention is causal: what follows end-of-text never reaches the embedding, and is not computed for texts whose
        tokens nobody needs.

        Where everything stands is worked out on the host, from the collator's lengths; ids without them are read there.
        """
        if any(text.token_mask is not None for text in inputs):
            raise ValueError(CANNOT_HIDE)
        ids = [self._padded(text.x) if text.tokens else text.x for text in inputs]
        device, sizes = ids[0].device, [len(x) for x in ids]
        ends = torch.cat([lengths_of(text) for text in inputs]) - 1
        widths = torch.tensor([x.shape[1] for x in ids]).repeat_interleave(torch.tensor(sizes))
        whole = torch.tensor([text.tokens for text in inputs]).repeat_interleave(torch.tensor(sizes))
        lengths = torch.where(whole, widths, ends + 1)
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        owner = torch.arange(len(ends)).repeat_interleave(lengths)  # of each packed row, its text
        place = torch.arange(len(owner)) - starts[owner]
        source = (widths.cumsum(0) - widths)[owner] + place
        is_read = whole[owner] | (place == ends[owner])
        rows, at_end = is_read.nonzero()[:, 0], (is_read.cumsum(0) - 1)[starts[:-1] + ends]
        place, source, rows, at_end = to_device(device, place, source, rows, at_end)

        packed = self.token_embedding(torch.cat([x.flatten() for x in ids])[source])
        packed = packed + embedding(place, self.positional_embedding)
        seen = LayerOutputs(layer for text in inputs for layer in text.layers)
        out = self.ln_final(self.transformer(packed, Sequences(starts.int(), causal=True), rows, seen))
        classes = out.index_select(0, at_end)
        pooled = classes @ self.text_projection
        counts = [x.numel() if text.tokens else len(x) for x, text in zip(ids, inputs, strict=True)]
        packed_counts = [int(own.sum()) for own in torch.split(lengths, sizes)]
        last = self.config.layers - 1
        layers = {layer: torch.split(x, counts if layer == last else packed_counts) for layer, x in seen.items()}
        encoded = []
        for i, (x, text, one, at_its_end, computed) in enumerate(
            zip(ids, inputs, pooled.split(sizes), classes.split(sizes), out.split(counts), strict=True)
        ):
            encoded.append(Encoded(one, class_tokens=at_its_end[:, None]))
            if text.tokens:
                encoded[-1].tokens, encoded[-1].mask = computed.view(*x.shape, computed.shape[-1]), _up_to_end(x)
                encoded[-1].layers = {layer: layers[layer][i].view(*x.shape, packed.shape[-1]) for layer in text.layers}
        return encoded

    def _padded(self, x: Tensor) -> Tensor:
        """ids [N, L] -> [N, context], where tokens are handed on padded to it."""
        return pad(x, (0, self.config.context - x.shape[1])) if self.config.padding == "context" else x

    def encode(self, x: Tensor, *, tokens: bool, token_mask: Tensor | None) -> Encoded:
        """ids x [N, L] -> pooled [N, D], tokens [N, context or L, W] and their mask, class tokens [N, 1, W].

        Padded, so that it can be exported: nothing is read on the host.
        """
        if token_mask is not None:
            raise ValueError(CANNOT_HIDE)
        end = x.argmax(1)
        if tokens:
            x = self._padded(x)
        sequence = self.token_embedding(x) + self.positional_embedding[: x.shape[1]]
        if not tokens:
            (read,), _ = self.transformer.together([sequence], [end[:, None]], causal=True)
            classes = self.ln_final(read)
            return Encoded(classes[:, 0] @ self.text_projection, class_tokens=classes)
        (sequence,), _ = self.transformer.together([sequence], [None], causal=True)
        sequence = self.ln_final(sequence)
        classes = sequence[torch.arange(x.shape[0], device=x.device), end]
        return Encoded(classes @ self.text_projection, sequence, _up_to_end(x), classes[:, None])

    def detokenize(self, ids: Tensor) -> list[str]:
        """Texts."""
        return ClipTokenizer(self.config.context).texts(ids)

    def token_layout(self, view: View) -> list[str]:
        """The words and pieces of words."""
        return ClipTokenizer(self.config.context).pieces(view.data)

    def class_attention(self, x: Tensor) -> Tensor:
        """ids [N, L] -> weights of end-of-text over all positions in the last block, [N, H, context or L]."""
        end, x = x.argmax(1), self._padded(x)
        sequence = self.token_embedding(x) + self.positional_embedding[: x.shape[1]]
        return self.transformer.weights(sequence, end, causal=True)


def clip_vocabulary(size: int, context: int) -> Vocabulary:
    """CLIP's ids, in so many rows."""
    return Vocabulary(size, start=START, end=END, padding=0, longest=context)


def lengths_of(texts: TowerInput) -> Tensor:
    """[N] on the host, up to end-of-text, which is the largest id."""
    return texts.x.argmax(1).cpu() + 1 if texts.lengths is None else torch.from_numpy(texts.lengths).long()


def to_device(device: torch.device, *indices: Tensor) -> tuple[Tensor, ...]:
    """Indices of the host on `device`, in one copy; on a GPU from pinned memory, so that the host does not wait."""
    if device.type == "cpu":
        return indices
    joint = torch.cat(indices)
    if device.type == "cuda":
        joint = joint.pin_memory()
    return torch.split(joint.to(device, non_blocking=True), [len(x) for x in indices])


def _up_to_end(ids: Tensor) -> Tensor:
    """[N, L] bool of ids [N, L]; end-of-text is the largest id."""
    return torch.arange(ids.shape[1], device=ids.device) <= ids.argmax(1, keepdim=True)


class RoleCollator(ABC):
    """The views of B samples -> groups of ids [V, B, L] by role; L is the longest text of the group."""

    @abstractmethod
    def padded(self, texts: list[str]) -> Tensor:
        """Ids [N, L] of N texts, padded to the longest."""

    def lengths(self, ids: Tensor) -> np.ndarray[Any, Any] | None:
        """[N], for `Group.lengths`, where the tower makes use of them."""
        return None

    def __call__(self, samples: list[list[View]], seeds: Sequence[int] = ()) -> Views:
        """View i of every sample has the same role."""
        groups: dict[str, list[int]] = {}
        for i, view in enumerate(samples[0]):
            groups.setdefault(view.role, []).append(i)
        result = []
        for role, members in groups.items():
            ids = self.padded([sample[i].data for i in members for sample in samples])
            lengths = self.lengths(ids)
            views, batch = len(members), len(samples)
            lengths = lengths.reshape(views, batch) if lengths is not None else None
            result.append(Group(ids.reshape(views, batch, ids.shape[1]), role, lengths=lengths))
        return Views(result)


class TextCollator(RoleCollator):
    """With CLIP's ids, up to end-of-text."""

    def __init__(self, context: int) -> None:
        self.tokenize = ClipTokenizer(context)

    def padded(self, texts: list[str]) -> Tensor:
        """Ids [N, L]; padding is 0."""
        ids = self.tokenize(texts)
        return ids[:, : int(self.lengths(ids).max())]

    def lengths(self, ids: Tensor) -> np.ndarray[Any, Any]:
        """Up to end-of-text, the largest id; 0 is padding, and also "!"."""
        lengths: np.ndarray[Any, Any] = ids.argmax(1).numpy() + 1
        return lengths
