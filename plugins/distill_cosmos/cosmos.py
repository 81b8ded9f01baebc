"""COSMOS on one page (arXiv 2412.01814, CVPR 2025). Read this first.

One training step as one would write it from the equations, with torch alone: views (sections 3.1, 3.2), cross-attention
(3.3), losses (3.4), the teacher, and at the end CLIP's towers. Modules are named as in the public checkpoints.

A recipe's COSMOS is this step made of exchangeable parts, and faster: no padding, no token repeated for each view that
reads it, no loss a pair of views. `distill bench step` shows that losses and gradients are the same, and times both.

B samples, V views of a modality, L tokens, W a tower's width, D the embedding's. [V * B, ...]: global views first.
"""
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, normalize


class Views(NamedTuple):
    """One modality of a batch: crops [B, 3, S, S] (multi_crop.py), or token ids [B, context] (text_crop.py)."""

    global_: Sequence[Tensor]  # 2 crops of 0.4 to 1 of the image's area (3.1); 2 texts of one to five sentences (3.2)
    local: Sequence[Tensor]  # 6 smaller crops of 0.05 to 0.4 of it (3.1); 6 texts of one sentence (3.2)


class CrossAttention(nn.Module):
    """Section 3.3: pooled + attention(LN(pooled), LN(tokens)), by which a view reads tokens of the other modality."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ln_q, self.ln_k = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, pooled: Tensor, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """pooled [V * B, D], tokens [B, L, D], padding [B, L] (True: not read) -> [V * B, D], not normalized."""
        views = len(pooled) // len(tokens)
        query, keys = self.ln_q(pooled)[:, None], self.ln_k(tokens.repeat(views, 1, 1))
        padding = None if padding is None else padding.repeat(views, 1)
        return pooled + self.attn(query, keys, keys, key_padding_mask=padding, need_weights=False)[0][:, 0]


def losses(
    student: Cosmos, teacher: Cosmos, images: Views, texts: Views, *, text_length: int, mask_padding: bool,
    mark: Callable[[str], None] = lambda part: None,
) -> dict[str, Tensor]:  # fmt: skip
    """Section 3.4: the two terms, whose sum is minimized; `mark(part)` is called after each part of the step.

    Images read the first `text_length` tokens of a text: also those after its end, unless `mask_padding`.
    """
    batch = len(images.global_[0])
    with torch.no_grad():  # the teacher encodes the global views, and fuses nothing
        teacher_images, _ = teacher.encode_images(Views(images.global_, []))
        teacher_texts, _ = teacher.encode_texts(Views(texts.global_, []))
    mark("teacher")
    student_images, image_tokens = student.encode_images(images)
    mark("image tower")
    student_texts, text_tokens = student.encode_texts(texts)
    mark("text tower")
    # the tokens of global view 0: what all views of the other modality read
    image_keys = student.image_token_mapping(image_tokens[:batch])  # [B, L, D]
    text_keys = student.text_token_mapping(text_tokens[:batch, :text_length])
    end = texts.global_[0].argmax(1, keepdim=True)  # [B, 1]
    padding = torch.arange(text_length, device=end.device) > end if mask_padding else None
    fused_images = student.text_attn_cross_pool(student_images, text_keys, padding)
    fused_texts = student.visual.attn_cross_pool(student_texts, image_keys)
    mark("fusion")
    with torch.autocast(end.device.type, enabled=False):
        # global crops with all texts: with local crops as well, the model overfits
        global_images = student_images[: len(images.global_) * batch]
        contrastive = info_nce(global_images, student_texts, student.logit_scale.exp(), batch)
        # all fused views of both modalities with the teacher's global views of both
        fused, targets = (fused_images, fused_texts), (teacher_images, teacher_texts)
        scale = student.distill_logit_scale.exp()
        distillation = torch.stack([info_nce(x, y, scale, batch) for x in fused for y in targets]).mean()
    mark("losses")
    return {"contrastive": contrastive, "cross_modal_distillation": distillation}


def info_nce(a: Tensor, b: Tensor, scale: Tensor, batch: int) -> Tensor:
    """Mean InfoNCE of each view of a [Va * B, D] with each of b [Vb * B, D]: both cross-entropies of their cosines."""
    own = torch.arange(batch, device=a.device)  # a sample's positive is itself
    a_views, b_views = (torch.split(normalize(x.float(), dim=-1), batch) for x in (a, b))
    logits = [scale * x @ y.T for x in a_views for y in b_views]  # each [B, B]
    return torch.stack([(cross_entropy(x, own) + cross_entropy(x.T, own)) / 2 for x in logits]).mean()


@torch.no_grad()
def update(student: Cosmos, teacher: Cosmos, optimizer: torch.optim.Optimizer, momentum: float) -> None:
    """After the backward pass: the teacher as a moving average, the optimizer, both scales in 1..100.

    The order is the public code's; the paper's is the optimizer first (`teacher.update` in a recipe).
    """
    for average, value in zip(teacher.parameters(), student.parameters(), strict=True):
        average.mul_(momentum).add_((1 - momentum) * value)
    optimizer.step()
    for scale in (student.logit_scale, student.distill_logit_scale):
        scale.clamp_(0, math.log(100))
    optimizer.zero_grad()


class Cosmos(nn.Module):
    """Student or teacher; `vit` and `text` are the options of a recipe's towers. A teacher uses its towers alone."""

    def __init__(self, vit: Any, text: Any, fusion_heads: int) -> None:
        super().__init__()
        self.visual = ImageTower(vit, fusion_heads)
        self.token_embedding = nn.Embedding(text.vocabulary, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.context, text.width))
        self.transformer = Transformer(text.width, text.layers, text.heads, int(text.width * text.mlp_ratio))
        self.ln_final = nn.LayerNorm(text.width)
        self.text_projection = nn.Parameter(torch.empty(text.width, text.dim))
        self.text_attn_cross_pool = CrossAttention(vit.dim, fusion_heads)  # over text tokens: images read them
        self.image_token_mapping = nn.Linear(vit.width, vit.dim)
        self.text_token_mapping = nn.Linear(text.width, vit.dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.distill_logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.register_buffer("causal", torch.full([text.context] * 2, -math.inf).triu(1), persistent=False)

    def encode_images(self, images: Views) -> tuple[Tensor, Tensor]:
        """Embeddings [V * B, D] of all crops, patch tokens [V_global * B, L, W] of the global ones."""
        pooled, tokens = self.visual(torch.cat(list(images.global_)))
        if images.local:  # of another size, so a pass of their own
            pooled = torch.cat([pooled, self.visual(torch.cat(list(images.local)))[0]])
        return pooled, tokens

    def encode_texts(self, texts: Views) -> tuple[Tensor, Tensor]:
        """Embeddings [V * B, D], read at the end-of-text token (the largest id), and tokens [V * B, context, W]."""
        ids = torch.cat([*texts.global_, *texts.local])
        tokens = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding, self.causal))
        return tokens[torch.arange(len(ids)), ids.argmax(1)] @ self.text_projection, tokens


class ImageTower(nn.Module):
    """CLIP's ViT, and the cross-attention over its tokens, which texts read."""

    def __init__(self, vit: Any, fusion_heads: int) -> None:
        super().__init__()
        width, self.patch, self.grid = vit.width, vit.patch, vit.image_size // vit.patch
        self.conv1 = nn.Conv2d(3, width, vit.patch, vit.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(self.grid**2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, vit.layers, vit.heads, int(width * vit.mlp_ratio))
        self.proj = nn.Parameter(torch.empty(width, vit.dim))
        self.attn_cross_pool = CrossAttention(vit.dim, fusion_heads)

    def positions(self, side: int) -> Tensor:
        """[1 + side * side, W]; for crops of another size the grid is resized by (side + 0.1) / grid."""
        if side == self.grid:
            return self.positional_embedding
        table = self.positional_embedding[1:].T.reshape(1, -1, self.grid, self.grid)
        factor = (side + 0.1) / self.grid
        resized = interpolate(table.float(), scale_factor=(factor, factor), mode="bicubic").flatten(2)[0].T
        return torch.cat([self.positional_embedding[:1], resized])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Crops [N, 3, S, S] -> embeddings [N, D] of the class token, patch tokens [N, L, W]."""
        patches = self.conv1(x).flatten(2).transpose(1, 2)
        start = self.class_embedding.to(patches.dtype).expand(len(x), 1, -1)
        tokens = torch.cat([start, patches], 1) + self.positions(x.shape[-1] // self.patch)
        tokens = self.ln_post(self.transformer(self.ln_pre(tokens)))
        return tokens[:, 0] @ self.proj, tokens[:, 1:]


class Transformer(nn.Module):
    """A tower's blocks."""

    def __init__(self, width: int, layers: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, heads, mlp_width) for _ in range(layers)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [N, L, W], mask [L, L] added to the logits -> [N, L, W]."""
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Block(nn.Module):
    """Pre-norm: x + attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        c_fc, c_proj = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=c_fc, gelu=nn.GELU(), c_proj=c_proj))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [N, L, W], mask [L, L] -> [N, L, W]."""
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))
