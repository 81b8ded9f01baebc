"""Vision Transformer in the CLIP layout (Dosovitskiy et al. 2021; Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import embedding, interpolate, linear

from distill_core import (
    Backbone,
    BackboneSpec,
    Collator,
    ComponentConfig,
    Encoded,
    Group,
    ModalityPlan,
    Progress,
    Scheduled,
    TowerInput,
    View,
    Views,
)
from distill_vl.attention_pooling import AttentionPooling
from distill_vl.masking import MASK_OPTION, MaskingConfig, draw_mask, patch_pixels, role_problems
from distill_vl.transformer import DENSE, Activation, Sequences, Transformer

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
    activation: Activation = "gelu"
    """Of the MLPs; OpenAI's CLIP has `quick_gelu`, SigLIP `gelu_tanh`."""
    pre_norm: bool = True
    """LayerNorm before the first block, as CLIP has it; timm's and DINO's ViTs have none."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the variance in every LayerNorm; timm's and DINO's ViTs have 1e-6."""
    pooling: Literal["class_token", "attention"] = "class_token"
    """What the embedding is made of: the class token; or, without one, what a learned query gathers from all patches
    (`attention`: the MAP head of SigLIP), which then is the class token for losses and probes."""
    class_tokens: Positive = 1
    """Class tokens C; the first makes the embedding. Further ones have no position (TIPS has two)."""
    initialization: Literal["clip", "trunc_normal"] = "clip"
    """`trunc_normal`: matrices, positions and class tokens of deviation .02, biases 0, as timm's and DINO's ViTs."""
    drop_path: Scheduled[Annotated[float, Field(ge=0, lt=1)]] = Scheduled(0.0)
    """Stochastic depth of the student: the odds that a view passes by a branch of the last block, falling to 0 in the
    first. Also a schedule."""
    masking: MaskingConfig | None = None
    """Patches that are hidden from the student, as {ratio: [0.1, 0.5]}; null for none."""

    @model_validator(mode="after")
    def _fits(self) -> VisionTransformerConfig:
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch {self.patch}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.pooling == "attention" and self.class_tokens > 1:
            raise ValueError("pooling: attention has one query in place of class tokens; class_tokens must be 1")
        return self


class VisionTransformer(Backbone):
    """ViT: pooled = class token after the final LayerNorm, times `proj`; tokens = patches after that LayerNorm.

    With `pooling: attention` there is no class token: `attention_pool` reads the patches after that LayerNorm.

    With `masking`, a hidden patch's embedding is the learned `mask_token`, before positions are added (BEiT). Of a view
    with `Group.keep`, which a masker makes, the student's tokens are the kept patches.

    Crops of another size resize the position embeddings bicubically by the scale factor (size / patch + 0.1) / grid,
    class position apart, as DINO does: a fixed linear map, computed once a size.
    """

    name = "vit"
    Config = VisionTransformerConfig
    after_units = ("ln_post", "attention_pool", "proj")
    examples = (
        {"image_size": 16, "patch": 4, "width": 32, "layers": 2, "heads": 2, "dim": 24},
        {
            "image_size": 16, "patch": 4, "width": 32, "layers": 2, "heads": 2, "dim": 24, "class_tokens": 2,
            "masking": {"share": 1.0, "ratio": [0.3, 0.6], "targets": "pixels"},
        },
        {
            "image_size": 16, "patch": 4, "width": 32, "layers": 2, "heads": 2, "dim": 24, "pooling": "attention",
            "masking": {"share": 1.0, "ratio": [0.3, 0.6]},
        },
    )  # fmt: skip

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__(config)
        width, grid = config.width, config.image_size // config.patch
        self.grid = grid
        self.leading = config.class_tokens if config.pooling == "class_token" else 0
        """Class tokens that stand before the patches."""
        self.conv1 = nn.Conv2d(3, width, config.patch, config.patch, bias=False)
        scale = width**-0.5
        if self.leading:
            self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(grid * grid + min(self.leading, 1), width))
        self.ln_pre = nn.LayerNorm(width, config.norm_eps) if config.pre_norm else nn.Identity()
        self.transformer = Transformer(
            width, config.layers, config.heads, config.mlp_ratio, config.activation, config.norm_eps
        )
        self.ln_post = nn.LayerNorm(width, config.norm_eps)
        if config.pooling == "attention":
            self.attention_pool = AttentionPooling(
                width, config.heads, config.mlp_ratio, config.activation, config.norm_eps
            )
        self.proj = nn.Parameter(scale * torch.randn(width, config.dim))
        if config.class_tokens > 1:
            self.more_class_embeddings = nn.Parameter(scale * torch.randn(config.class_tokens - 1, width))
        if config.masking is not None:
            self.mask_token = nn.Parameter(torch.zeros(width))
        if config.initialization == "trunc_normal":
            self._start_small()
        self._maps: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}

    def _start_small(self) -> None:
        """All but the convolution, LayerNorms and the projection."""
        for name, parameter in self.named_parameters():
            in_blocks = name.startswith(("transformer.", "attention_pool."))
            if in_blocks and name.endswith("bias") and ".ln" not in name:
                nn.init.zeros_(parameter)
            elif (in_blocks and parameter.ndim == 2) or name.endswith(
                ("class_embedding", "class_embeddings", "positional_embedding", "mask_token", "probe")
            ):
                nn.init.trunc_normal_(parameter, std=0.02)

    def before_step(self, progress: Progress) -> None:
        """Sets the stochastic depth of this step."""
        self.transformer.drop_path = self.config.drop_path.value(progress)

    @classmethod
    def spec(cls, config: VisionTransformerConfig) -> BackboneSpec:
        """Widths of tokens and embedding."""
        masked = config.masking is not None
        return BackboneSpec(
            config.width,
            config.dim,
            can_mask=masked,
            mask_option=MASK_OPTION,
            can_drop=True,
            class_tokens=config.class_tokens,
            layers=config.layers,
            dense=DENSE,
            attention=True,
            stride=(config.patch, config.patch),
        )

    @classmethod
    def view_problems(cls, config: VisionTransformerConfig, views: ModalityPlan) -> Iterable[str]:
        """Roles to be masked that no view has; crops that patches do not tile."""
        if config.masking is not None:
            yield from role_problems(config.masking.roles, views)
        yield from patch_problems(config.patch, views)

    @classmethod
    def collator(cls, config: VisionTransformerConfig) -> Collator:
        """Stacks pictures [3, S, S] of one size and role; draws masks."""
        return PictureCollator(config.patch, config.masking)

    def on_device(self, views: Views) -> Views:
        """Makes the pixels that hidden patches are predicted as."""
        masking, patch = self.config.masking, self.config.patch
        if masking is None or masking.targets != "pixels":
            return views
        return Views(
            [
                group if group.token_mask is None else replace(group, targets=patch_pixels(group.x, patch))
                for group in views.groups
            ]
        )

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings [1 + rows * columns, W] for the class token and a grid of patches; without a class token
        [rows * columns, W]."""  # fmt: skip
        table, first = self.positional_embedding, min(self.leading, 1)
        if (rows, columns) == (self.grid, self.grid):
            return table
        key = (rows, columns, table.device, table.dtype)
        if key not in self._maps:
            self._maps[key] = position_map(self.grid, rows, columns).to(table.device, table.dtype)
        with torch.autocast(table.device.type, enabled=False):
            return torch.cat([table[:first], self._maps[key] @ table[first:]])

    def encode(self, x: Tensor, *, tokens: bool, token_mask: Tensor | None) -> Encoded:
        """x [N, 3, S, S] -> pooled [N, D], tokens [N, L, W], class tokens [N, C, W].

        Raises ValueError for a `token_mask` [N, L] without the option `masking`.
        """
        return self.encode_together([TowerInput(x, tokens, token_mask)])[0]

    def dense(self, x: Tensor, *, attention: str) -> tuple[Tensor, Tensor]:
        """x [N, 3, S, S] -> [N, D], and of the patches [N, rows, columns, D]: all tokens after `ln_post`, times `proj`.

        With `pooling: attention` a patch's is what the pooling makes of it alone (MaskCLIP). What the last block
        attends by: `transformer.Sequences.attention`.
        """
        sequence = self._embed(x, None)
        plain = Sequences.of((sequence.shape[0], sequence.shape[1]))
        body = self.transformer.body(sequence.flatten(0, 1), plain)
        out = self.transformer.last(body, replace(plain, attention=attention)).view(sequence.shape)
        rows, columns = (side // self.config.patch for side in x.shape[-2:])
        pooled, patches = self._classes(out)[:, 0], self.ln_post(out[:, self.leading :])
        if self.config.pooling == "attention":
            patches = self.attention_pool.each(patches)
        return pooled @ self.proj, (patches @ self.proj).unflatten(1, (rows, columns))

    def units(self) -> Sequence[nn.Module]:
        """The blocks."""
        return list(self.transformer.resblocks)

    def encode_together(self, inputs: Sequence[TowerInput]) -> list[Encoded]:
        """Crops of all sizes go through the weights as one packed sequence."""
        sequences = [self._embed(crops.x, crops.token_mask, crops.keep) for crops in inputs]
        # of the last block, no patch's output is needed where class tokens alone are read
        index = [None if crops.tokens or not self.leading else self._class_index(crops.x) for crops in inputs]
        wanted = {layer for crops in inputs for layer in crops.layers}
        outs, layers = self.transformer.together(sequences, index, layers=wanted)
        encoded = []
        for out, own, crops in zip(outs, layers, inputs, strict=True):
            encoded.append(self._read(out, tokens=crops.tokens))
            encoded[-1].layers = {layer: own[layer][:, self.leading :] for layer in crops.layers}
        return encoded

    def token_layout(self, view: View) -> tuple[int, int]:
        """The grid of patches."""
        rows, columns = (side // self.config.patch for side in view.data.shape[-2:])
        return rows, columns

    def class_attention(self, x: Tensor) -> Tensor:
        """x [N, 3, S, S] -> weights over the patches, [N, H, L]: the first class token's in the last block, or those of
        the attention pooling."""  # fmt: skip
        sequence = self._embed(x, None)
        if self.config.pooling == "attention":
            (out,), _ = self.transformer.together([sequence], [None])
            return self.attention_pool.weights(self.ln_post(out))
        weights = self.transformer.weights(sequence, self._class_index(x)[:, 0])
        return weights[..., self.leading :]

    def _embed(self, x: Tensor, token_mask: Tensor | None, keep: Tensor | None = None) -> Tensor:
        """x [N, 3, S, S] -> the transformer's input [N, C + L, W], or of the patches `keep` [N, L'] [N, C + L', W]."""
        patch, (height, width) = self.config.patch, x.shape[-2:]
        patches = rearrange(x, "n c (i p) (j q) -> n (i j) (c p q)", p=patch, q=patch)
        positions = self.positions(height // patch, width // patch)
        if keep is not None:
            patches = patches.take_along_dim(keep[..., None], 1)
            token_mask = None if token_mask is None else token_mask.gather(1, keep)
            first = min(self.leading, 1)
            of_class = positions[:first].expand(x.shape[0], first, -1)
            positions = torch.cat([of_class, embedding(keep, positions[first:])], 1)
        embedded = linear(patches, self.conv1.weight.flatten(1))
        if token_mask is not None:
            if self.config.masking is None:
                raise ValueError("vit hides patches only with the option `masking`")
            embedded = torch.where(token_mask[..., None], self.mask_token.to(embedded.dtype), embedded)
        if not self.leading:
            without_class: Tensor = self.ln_pre(embedded + positions)
            return without_class
        start = self.class_embedding.to(embedded.dtype).expand(x.shape[0], 1, -1)
        sequence = torch.cat([start, embedded], 1) + positions
        if self.leading > 1:
            more = self.more_class_embeddings.to(sequence.dtype).expand(x.shape[0], -1, -1)
            sequence = torch.cat([sequence[:, :1], more, sequence[:, 1:]], 1)
        normed: Tensor = self.ln_pre(sequence)
        return normed

    def _class_index(self, x: Tensor) -> Tensor:
        """Where the class tokens stand in each of N sequences, [N, C]."""
        return torch.arange(self.leading, device=x.device).expand(x.shape[0], -1)

    def _read(self, out: Tensor, *, tokens: bool) -> Encoded:
        """The transformer's output [N, C + L, W]; without `tokens` that of the class tokens alone, if there are any."""
        if not self.leading:
            classes = self._classes(out)
            return Encoded(classes[:, 0] @ self.proj, self.ln_post(out) if tokens else None, class_tokens=classes)
        out = self.ln_post(out)
        classes = out[:, : self.leading]
        return Encoded(classes[:, 0] @ self.proj, out[:, self.leading :] if tokens else None, class_tokens=classes)

    def _classes(self, out: Tensor) -> Tensor:
        """What embeddings are made of: the transformer's output [N, C + L, W] -> [N, C, W]."""
        if self.config.pooling == "attention":
            return self.attention_pool(out, self.ln_post)[:, None]  # type: ignore[no-any-return]
        return self.ln_post(out[:, : self.leading])  # type: ignore[no-any-return]


def position_map(grid: int, rows: int, columns: int) -> Tensor:
    """[rows * columns, grid * grid] float64: bicubic resizing of a grid x grid table as a matrix."""
    unit = torch.eye(grid * grid, dtype=torch.float64).reshape(grid * grid, 1, grid, grid)
    factors = ((rows + 0.1) / grid, (columns + 0.1) / grid)
    resized = interpolate(unit, scale_factor=factors, mode="bicubic", align_corners=False, recompute_scale_factor=False)
    if resized.shape[-2:] != (rows, columns):
        raise ValueError(f"cannot resize {grid} x {grid} positions to {rows} x {columns}")
    return resized.reshape(grid * grid, rows * columns).T


def patch_problems(patch: int, views: ModalityPlan) -> Iterable[str]:
    """Problems with crops [3, S, S] whose size is not a multiple of the patch size."""
    for role, (*_, rows, columns) in dict.fromkeys(zip(views.roles, views.shapes or (), strict=False)):
        if rows % patch or columns % patch:
            yield f"{role} views of {rows} x {columns} px are not whole patches of {patch} px"


class PictureCollator:
    """The views of B samples -> groups [V, B, 3, S, S] by role and size, some with masks of patches."""

    def __init__(self, patch: int, masking: MaskingConfig | None = None) -> None:
        self.patch = patch
        self.masking = masking

    def __call__(self, samples: list[list[View]], seeds: Sequence[int] = ()) -> Views:
        """Masks are drawn from the samples' seeds. Raises ValueError for a crop that patches do not tile."""
        generators = [np.random.default_rng(seed) for _, seed in zip(samples, seeds, strict=True)] if seeds else []
        groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for i, view in enumerate(samples[0]):
            groups.setdefault((view.role, tuple(view.data.shape)), []).append(i)
        result = []
        for (role, shape), members in groups.items():
            if any(side % self.patch for side in shape[-2:]):
                raise ValueError(f"crops of {shape[-2]} x {shape[-1]} px are not whole patches of {self.patch} px")
            x = torch.stack([torch.stack([sample[i].data for sample in samples]) for i in members])
            result.append(self._masked(Group(x, role), generators))
        return Views(result)

    def _masked(self, group: Group, generators: Sequence[np.random.Generator]) -> Group:
        masking = self.masking
        if masking is None or group.role not in masking.roles:
            return group
        if len(generators) != group.x.shape[1]:
            raise ValueError("masks are drawn from a seed for each sample; no seeds were given")
        rows, columns = (side // self.patch for side in group.x.shape[-2:])
        group.token_mask = torch.stack(
            [
                torch.stack([draw_mask(rows, columns, masking, generator) for generator in generators])
                for _ in range(group.x.shape[0])
            ]
        )
        return group
