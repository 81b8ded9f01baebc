"""Vision Transformer in the CLIP layout (Dosovitskiy et al. 2021; Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear

from distill_core.components import Backbone, Collator, ComponentConfig, Dims
from distill_core.types import Features, Group, View, Views
from distill_towers.transformer import Transformer

Positive = Annotated[int, Field(gt=0)]


class VisionTransformerConfig(ComponentConfig):
    """Defaults are ViT-B/16 at 224 px with D = 512."""

    image_size: Positive = 224
    """Pixels of a global crop's side; other sizes use resized position embeddings."""
    patch: Positive = 16
    """Pixels of a patch's side."""
    width: Positive = 768
    """Width W of the tokens."""
    layers: Positive = 12
    """Transformer blocks."""
    heads: Positive = 12
    """Attention heads of each block; they divide `width`."""
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Hidden width of each block's MLP, in widths W."""
    dim: Positive = 512
    """Width D of the embedding."""

    @model_validator(mode="after")
    def _fits(self) -> VisionTransformerConfig:
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch {self.patch}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class VisionTransformer(Backbone):
    """ViT: pooled = class token after the final LayerNorm, times `proj`; tokens = patches after that LayerNorm.

    Crops of another size resize the position embeddings bicubically by the scale factor (size / patch + 0.1) / grid,
    class position apart, as DINO does: a fixed linear map, computed once a size.
    """

    name = "vit"
    Config = VisionTransformerConfig

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__(config)
        width, grid = config.width, config.image_size // config.patch
        self.grid = grid
        self.conv1 = nn.Conv2d(3, width, config.patch, config.patch, bias=False)
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(grid * grid + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.layers, config.heads, config.mlp_ratio)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, config.dim))
        self._maps: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}

    @classmethod
    def dims(cls, config: VisionTransformerConfig) -> Dims:
        """Widths of tokens and embedding."""
        return Dims(config.width, config.dim)

    @classmethod
    def collator(cls, config: VisionTransformerConfig) -> Collator:
        """Stacks pictures [3, S, S] of one size and role."""
        return PictureCollator(config.patch)

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings [1 + rows * columns, W] for a grid of patches."""
        table = self.positional_embedding
        if (rows, columns) == (self.grid, self.grid):
            return table
        key = (rows, columns, table.device, table.dtype)
        if key not in self._maps:
            self._maps[key] = _position_map(self.grid, rows, columns).to(table.device, table.dtype)
        with torch.autocast(table.device.type, enabled=False):
            return torch.cat([table[:1], self._maps[key] @ table[1:]])

    def encode(self, x: Tensor, *, tokens: bool, token_mask: Tensor | None) -> Features:
        """x [N, 3, S, S] -> pooled [1, N, D], tokens [N, L, W]. Masked patches are not supported."""
        if token_mask is not None:
            raise ValueError("vit cannot hide tokens")
        patch, (height, width) = self.config.patch, x.shape[-2:]
        patches = rearrange(x, "n c (i p) (j q) -> n (i j) (c p q)", p=patch, q=patch)
        embedded = linear(patches, self.conv1.weight.flatten(1))
        start = self.class_embedding.to(embedded.dtype).expand(x.shape[0], 1, -1)
        sequence = self.ln_pre(torch.cat([start, embedded], 1) + self.positions(height // patch, width // patch))
        if not tokens:
            zeros = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
            first = self.ln_post(self.transformer.at(sequence, zeros, causal=False))
            return Features((first @ self.proj)[None], class_tokens=first[None, :, None])
        sequence = self.ln_post(self.transformer(sequence, causal=False))
        first = sequence[:, 0]
        return Features((first @ self.proj)[None], {0: sequence[:, 1:]}, class_tokens=first[None, :, None])


def _position_map(grid: int, rows: int, columns: int) -> Tensor:
    """[rows * columns, grid * grid] float64: bicubic resizing of a grid x grid table as a matrix."""
    unit = torch.eye(grid * grid, dtype=torch.float64).reshape(grid * grid, 1, grid, grid)
    factors = ((rows + 0.1) / grid, (columns + 0.1) / grid)
    resized = interpolate(unit, scale_factor=factors, mode="bicubic", align_corners=False, recompute_scale_factor=False)
    if resized.shape[-2:] != (rows, columns):
        raise ValueError(f"cannot resize {grid} x {grid} positions to {rows} x {columns}")
    return resized.reshape(grid * grid, rows * columns).T


class PictureCollator:
    """The views of B samples -> groups [V, B, 3, S, S] by role and size."""

    def __init__(self, patch: int) -> None:
        self.patch = patch

    def __call__(self, samples: list[list[View]], seeds: Sequence[int] = ()) -> Views:
        """Raises ValueError for a crop that patches do not tile."""
        groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for i, view in enumerate(samples[0]):
            groups.setdefault((view.role, tuple(view.data.shape)), []).append(i)
        result = []
        for (role, shape), members in groups.items():
            if any(side % self.patch for side in shape[-2:]):
                raise ValueError(f"crops of {shape[-2]} x {shape[-1]} px are not whole patches of {self.patch} px")
            x = torch.stack([torch.stack([sample[i].data for sample in samples]) for i in members])
            source = torch.tensor([[sample[i].source for sample in samples] for i in members])
            result.append(Group(x, role, source))
        return Views(result)
