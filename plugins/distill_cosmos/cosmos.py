"""COSMOS's step as one would write it from the equations: what `distill bench step` measures ours against.

Captions are padded to the context, tokens are repeated for each query, every pair of views has a loss of its own, and
the teacher is moved parameter by parameter. Modules are torch's, named as public checkpoints name them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, normalize


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, mlp_width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(mlp_width, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class _Stack(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([_Block(width, heads, mlp_width) for _ in range(layers)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class _Pooler(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ln_q, self.ln_k = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, tokens: Tensor, queries: Tensor, padding: Tensor | None = None) -> Tensor:
        """tokens [N, L, D], queries [N, 1, D], padding [N, L] (True where there is some) -> [N, 1, D]."""
        keys, queries = self.ln_k(tokens), self.ln_q(queries)
        return self.attn(queries, keys, keys, key_padding_mask=padding, need_weights=False)[0]  # type: ignore[no-any-return]


class _Visual(nn.Module):
    def __init__(self, vit: Any, fusion_heads: int) -> None:
        super().__init__()
        width, self.patch = vit.width, vit.patch
        self.grid = vit.image_size // vit.patch
        self.conv1 = nn.Conv2d(3, width, vit.patch, vit.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(self.grid**2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = _Stack(width, vit.layers, vit.heads, int(width * vit.mlp_ratio))
        self.proj = nn.Parameter(torch.empty(width, vit.dim))
        self.attn_cross_pool = _Pooler(vit.dim, fusion_heads)

    def positions(self, side: int) -> Tensor:
        if side == self.grid:
            return self.positional_embedding
        table = self.positional_embedding[1:].T.reshape(1, -1, self.grid, self.grid)
        factor = (side + 0.1) / self.grid
        resized = interpolate(table.float(), scale_factor=(factor, factor), mode="bicubic").flatten(2)[0].T
        return torch.cat([self.positional_embedding[:1], resized])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, S, S] -> pooled [N, D], tokens [N, L, W]."""
        patches = self.conv1(x).flatten(2).transpose(1, 2)
        start = self.class_embedding.to(patches.dtype).expand(len(x), 1, -1)
        sequence = self.ln_pre(torch.cat([start, patches], 1) + self.positions(x.shape[-1] // self.patch))
        sequence = self.ln_post(self.transformer(sequence))
        return sequence[:, 0] @ self.proj, sequence[:, 1:]


class PlainCosmos(nn.Module):
    """One side (student or teacher), with public parameter names; configs are those of `vit` and `clip_text`."""

    def __init__(self, vit: Any, text: Any, fusion_heads: int) -> None:
        super().__init__()
        self.visual = _Visual(vit, fusion_heads)
        self.token_embedding = nn.Embedding(text.vocabulary, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.context, text.width))
        self.transformer = _Stack(text.width, text.layers, text.heads, int(text.width * text.mlp_ratio))
        self.ln_final = nn.LayerNorm(text.width)
        self.text_projection = nn.Parameter(torch.empty(text.width, text.dim))
        self.text_attn_cross_pool = _Pooler(vit.dim, fusion_heads)
        self.image_token_mapping = nn.Linear(vit.width, vit.dim)
        self.text_token_mapping = nn.Linear(text.width, vit.dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.distill_logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        ahead = torch.full((text.context, text.context), float("-inf")).triu(1)
        self.register_buffer("ahead", ahead, persistent=False)

    def encode_text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids [N, context] -> pooled [N, D], tokens [N, context, W]."""
        sequence = self.token_embedding(ids) + self.positional_embedding
        sequence = self.ln_final(self.transformer(sequence, self.ahead))
        return sequence[torch.arange(len(ids)), ids.argmax(1)] @ self.text_projection, sequence

    def encode_images(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Crops [B, 3, S, S], those of a size together: pooled [V * B, D], tokens of the globals."""
        pooled, tokens = self.visual(torch.cat([x for x in crops if x.shape[-1] == crops[0].shape[-1]]))
        locals_ = [x for x in crops if x.shape[-1] != crops[0].shape[-1]]
        if locals_:
            pooled = torch.cat([pooled, self.visual(torch.cat(locals_))[0]])
        return pooled, tokens


def info_nce(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Mean of the two cross-entropies of scale * a @ b.T; a, b [B, D]."""
    logits = scale * a.float() @ b.float().T
    truth = torch.arange(len(a), device=a.device)
    return (cross_entropy(logits, truth) + cross_entropy(logits.T, truth)) / 2


def losses(
    student: PlainCosmos,
    teacher: PlainCosmos,
    crops: Sequence[Tensor],
    texts: Sequence[Tensor],
    image_globals: int,
    text_globals: int,
    text_length: int,
    mask_padding: bool,
    timed: Callable[[str], None] = lambda part: None,
) -> dict[str, Tensor]:
    """The two terms; `timed(part)` is called after each part.

    Images attend to the first `text_length` tokens of a text, padding among them unless `mask_padding`.
    """
    batch = len(crops[0])
    with torch.no_grad():
        teacher_images = teacher.encode_images(crops[:image_globals])[0]
        teacher_texts = teacher.encode_text(torch.cat(list(texts[:text_globals])))[0]
    timed("teacher")
    images, image_tokens = student.encode_images(crops)
    timed("image tower")
    words, text_tokens = student.encode_text(torch.cat(list(texts)))
    timed("text tower")
    image_keys = student.image_token_mapping(image_tokens[:batch])
    text_keys = student.text_token_mapping(text_tokens[:batch, :text_length])
    padding = None
    if mask_padding:
        place = torch.arange(text_length, device=text_keys.device)
        padding = (place > texts[0].argmax(1, keepdim=True)).repeat(len(crops), 1)
    many_keys = text_keys.repeat(len(crops), 1, 1)
    fused_images = images + student.text_attn_cross_pool(many_keys, images[:, None], padding)[:, 0]
    fused_texts = words + student.visual.attn_cross_pool(image_keys.repeat(len(texts), 1, 1), words[:, None])[:, 0]
    timed("fusion")

    def views(x: Tensor) -> list[Tensor]:
        return list(torch.split(normalize(x.float(), dim=-1), batch))

    with torch.autocast(crops[0].device.type, enabled=False):
        scale, distill_scale = student.logit_scale.exp(), student.distill_logit_scale.exp()
        pairs = [info_nce(a, b, scale) for a in views(images)[:image_globals] for b in views(words)]
        contrastive = torch.stack(pairs).mean()
        blocks = []
        for fused in (fused_images, fused_texts):
            for taught in (teacher_images, teacher_texts):
                own = [info_nce(a, b, distill_scale) for a in views(fused) for b in views(taught)]
                blocks.append(torch.stack(own).mean())
    timed("losses")
    return {"contrastive": contrastive, "cross_modal_distillation": torch.stack(blocks).mean()}


@torch.no_grad()
def move_teacher(student: PlainCosmos, teacher: PlainCosmos, momentum: float) -> None:
    """Parameter by parameter, all of them, as the public code does."""
    for own, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        own.mul_(momentum).add_((1 - momentum) * theirs)
