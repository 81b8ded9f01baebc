"""One COSMOS training step from its equations (arXiv 2412.01814; design/cosmos.md): the oracle of the tests.

Slow on purpose: explicit attention, tokens repeated for every query, one InfoNCE for each pair of views,
parameters moved one by one. Nothing of the framework is imported. Weights are dictionaries of tensors, named
as in the public checkpoints. B batch, L tokens, W width, D embedding width, G patches a side, V views.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
Views = Sequence[Tensor]
SCALES = ("logit_scale", "distill_logit_scale")
LAYER_NORM_EPS = 1e-5
CUBIC_A = -0.75  # the cubic convolution constant of the usual image resizers


def make_weights(
    seed: int,
    dtype: torch.dtype = torch.float64,
    *,
    width: int = 12,
    layers: int = 2,
    heads: int = 2,
    patch: int = 4,
    grid: int = 3,
    text_width: int = 8,
    text_layers: int = 2,
    text_heads: int = 2,
    context: int = 7,
    vocab: int = 23,
    dim: int = 6,
    fusion_heads: int = 2,
) -> Weights:
    """Random weights, no parameter zero; drawn in float64 and then cast: the same ones in every dtype."""
    for size, count in ((width, heads), (text_width, text_heads), (dim, fusion_heads)):
        if size % count:
            raise ValueError(f"a width of {size} does not divide into {count} heads")
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}

    def normal(name: str, *shape: int, std: float) -> None:
        weights[name] = (std * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    def linear(name: str, rows: int, columns: int, weight: str = ".weight", bias: str = ".bias") -> None:
        normal(name + weight, rows, columns, std=columns**-0.5)
        normal(name + bias, rows, std=0.3)

    def norm(name: str, size: int) -> None:
        random = torch.rand(size, generator=generator, dtype=torch.float64)
        weights[name + ".weight"] = (0.6 + 0.8 * random).to(dtype)
        normal(name + ".bias", size, std=0.3)

    def attention_weights(name: str, size: int) -> None:
        linear(name, 3 * size, size, ".in_proj_weight", ".in_proj_bias")
        linear(name + ".out_proj", size, size)

    def tower(name: str, size: int, depth: int) -> None:
        for layer in range(depth):
            block = f"{name}.resblocks.{layer}"
            norm(block + ".ln_1", size)
            attention_weights(block + ".attn", size)
            norm(block + ".ln_2", size)
            linear(block + ".mlp.c_fc", 4 * size, size)
            linear(block + ".mlp.c_proj", size, 4 * size)

    normal("visual.class_embedding", width, std=0.5)
    normal("visual.positional_embedding", 1 + grid * grid, width, std=0.5)
    normal("visual.proj", width, dim, std=width**-0.5)
    normal("visual.conv1.weight", width, 3, patch, patch, std=(3 * patch * patch) ** -0.5)
    norm("visual.ln_pre", width)
    tower("visual.transformer", width, layers)
    norm("visual.ln_post", width)
    normal("positional_embedding", context, text_width, std=0.5)
    normal("text_projection", text_width, dim, std=text_width**-0.5)
    normal("token_embedding.weight", vocab, text_width, std=0.5)
    tower("transformer", text_width, text_layers)
    norm("ln_final", text_width)
    for pooler in ("visual.attn_cross_pool", "text_attn_cross_pool"):
        attention_weights(pooler + ".attn", dim)
        norm(pooler + ".ln_q", dim)
        norm(pooler + ".ln_k", dim)
    linear("image_token_mapping", dim, width)
    linear("text_token_mapping", dim, text_width)
    weights["logit_scale"] = torch.tensor(math.log(1 / 0.07), dtype=dtype)
    weights["distill_logit_scale"] = torch.tensor(math.log(1 / 0.11), dtype=dtype)  # unlike the other
    return weights


def affine(weights: Weights, name: str, x: Tensor) -> Tensor:
    """x [..., W] -> [..., rows of the weight]."""
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


def layer_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    """x [..., W], over its last axis, with the biased variance."""
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = (centred * centred).mean(dim=-1, keepdim=True)
    standard = centred / torch.sqrt(variance + LAYER_NORM_EPS)
    return standard * weights[name + ".weight"] + weights[name + ".bias"]


def attention(
    weights: Weights, name: str, queries: Tensor, tokens: Tensor, heads: int, allowed: Tensor | None = None
) -> Tensor:
    """queries [B, Lq, W] over tokens [B, Lk, W] -> [B, Lq, W]; allowed, bool, broadcasts to [B, Lq, Lk]."""
    width = queries.shape[-1]
    size = width // heads
    matrix, bias = weights[name + ".in_proj_weight"], weights[name + ".in_proj_bias"]
    q = queries @ matrix[:width].T + bias[:width]
    k = tokens @ matrix[width : 2 * width].T + bias[width : 2 * width]
    v = tokens @ matrix[2 * width :].T + bias[2 * width :]
    outputs = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)  # [B, Lq, Lk]
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        outputs.append(torch.softmax(scores, dim=-1) @ v[..., part])
    return affine(weights, name + ".out_proj", torch.cat(outputs, dim=-1))


def block(weights: Weights, name: str, x: Tensor, heads: int, allowed: Tensor | None = None) -> Tensor:
    """One pre-norm transformer block, x [B, L, W]."""
    normed = layer_norm(weights, name + ".ln_1", x)
    x = x + attention(weights, name + ".attn", normed, normed, heads, allowed)
    hidden = affine(weights, name + ".mlp.c_fc", layer_norm(weights, name + ".ln_2", x))
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))  # GELU
    return x + affine(weights, name + ".mlp.c_proj", hidden)


def depth_of(weights: Weights, tower: str) -> int:
    start = tower + ".resblocks."
    return len({key[len(start) :].split(".")[0] for key in weights if key.startswith(start)})


def cubic_matrix(size: int, grid: int) -> Tensor:
    """[size, grid], float64: bicubic weights along one axis with the scale factor (size + 0.1) / grid."""
    scale = (size + 0.1) / grid
    matrix = torch.zeros(size, grid, dtype=torch.float64)
    for row in range(size):
        source = (row + 0.5) / scale - 0.5
        for tap in range(math.floor(source) - 1, math.floor(source) + 3):
            t = abs(source - tap)
            if t <= 1:
                value = (CUBIC_A + 2) * t**3 - (CUBIC_A + 3) * t**2 + 1
            else:
                value = CUBIC_A * (t**3 - 5 * t**2 + 8 * t - 4)
            matrix[row, min(max(tap, 0), grid - 1)] += value  # the border repeats
    return matrix


def resize_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """table [1 + G*G, W] -> [1 + rows*columns, W]; the class position and a table of the right size stay."""
    grid = math.isqrt(table.shape[0] - 1)
    if (rows, columns) == (grid, grid):
        return table
    square = table[1:].reshape(grid, grid, -1)
    down, across = cubic_matrix(rows, grid).to(table), cubic_matrix(columns, grid).to(table)
    resized = torch.einsum("yi,xj,ijw->yxw", down, across, square)
    return torch.cat([table[:1], resized.reshape(rows * columns, -1)])


def encode_image(weights: Weights, x: Tensor, heads: int, patch: int) -> tuple[Tensor, Tensor]:
    """x [B, 3, S, S] -> pooled [B, D], not normalised, and patch tokens after ln_post [B, L, W], unmapped."""
    batch, _, height, width = x.shape
    if height % patch or width % patch:
        raise ValueError(f"an image of {height} x {width} does not divide into patches of {patch}")
    kernel = weights["visual.conv1.weight"]
    patches = []
    for top in range(0, height, patch):
        for left in range(0, width, patch):
            pixels = x[:, :, top : top + patch, left : left + patch].reshape(batch, -1)
            patches.append(pixels @ kernel.reshape(kernel.shape[0], -1).T)
    tokens = torch.stack([weights["visual.class_embedding"].expand(batch, -1), *patches], dim=1)
    positions = weights["visual.positional_embedding"]
    tokens = tokens + resize_positions(positions, height // patch, width // patch)
    tokens = layer_norm(weights, "visual.ln_pre", tokens)
    for layer in range(depth_of(weights, "visual.transformer")):
        tokens = block(weights, f"visual.transformer.resblocks.{layer}", tokens, heads)
    tokens = layer_norm(weights, "visual.ln_post", tokens)
    return tokens[:, 0] @ weights["visual.proj"], tokens[:, 1:]


def encode_text(weights: Weights, ids: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """ids [B, C] -> pooled [B, D], not normalised, and all tokens after ln_final [B, C, W], unmapped."""
    batch, length = ids.shape
    tokens = F.embedding(ids, weights["token_embedding.weight"]) + weights["positional_embedding"][:length]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    for layer in range(depth_of(weights, "transformer")):
        tokens = block(weights, f"transformer.resblocks.{layer}", tokens, heads, causal)
    tokens = layer_norm(weights, "ln_final", tokens)
    end = ids.argmax(dim=1)  # EOT is the largest id
    return tokens[torch.arange(batch), end] @ weights["text_projection"], tokens


def normalise(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(dim=-1, keepdim=True))


def fuse(
    weights: Weights, name: str, pooled: Views, tokens: Tensor, heads: int, real: Tensor | None = None
) -> list[Tensor]:
    """V pooled embeddings [B, D] over one set of *mapped* tokens [B, L, D] -> V fused embeddings, normalised.

    name: "text_attn_cross_pool" (image queries, text tokens) or "visual.attn_cross_pool" (the converse).
    real [B, L], bool: the tokens that may be attended to; None is all.
    """
    views, batch = len(pooled), tokens.shape[0]
    queries = layer_norm(weights, name + ".ln_q", torch.cat(list(pooled)))[:, None]  # [V*B, 1, D]
    repeated = layer_norm(weights, name + ".ln_k", torch.cat([tokens] * views))  # [V*B, L, D]
    mask = None if real is None else torch.cat([real] * views)[:, None]  # [V*B, 1, L]
    attended = attention(weights, name + ".attn", queries, repeated, heads, mask)[:, 0]
    fused = normalise(torch.cat(list(pooled)) + attended)
    return [fused[view * batch : (view + 1) * batch] for view in range(views)]


def info_nce(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """a, b [B, D], normalised: the mean of the two cross-entropies of scale * a @ b.T."""
    logits, target = scale * a @ b.T, torch.arange(a.shape[0])
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def mean_over_pairs(left: Views, right: Views, scale: Tensor) -> Tensor:
    return torch.stack([info_nce(a, b, scale) for a in left for b in right]).mean()


def losses(
    pooled: tuple[Views, Views],
    fused: tuple[Views, Views],
    teacher: tuple[Views, Views],
    scales: tuple[Tensor, Tensor],
    image_globals: int = 2,
) -> Weights:
    """Pairs of (image views, text views), each [B, D], normalised; scales (logit, distill) as logarithms."""
    image, text = pooled
    contrastive = mean_over_pairs(image[:image_globals], text, scales[0].exp())
    four = [mean_over_pairs(views, target, scales[1].exp()) for views in fused for target in teacher]
    distillation = torch.stack(four).mean()
    total = contrastive + distillation
    return {"contrastive": contrastive, "cross_modal_distillation": distillation, "total": total}


def adamw(
    value: Tensor, grad: Tensor, lr: float, betas: tuple[float, float], eps: float, decay: float, step: int
) -> Tensor:
    """One AdamW step from zero moments, bias-corrected as step number `step` (1-based)."""
    first = (1 - betas[0]) * grad / (1 - betas[0] ** step)
    second = (1 - betas[1]) * grad * grad / (1 - betas[1] ** step)
    if value.ndim >= 2:
        value = value - lr * decay * value
    return value - lr * first / (torch.sqrt(second) + eps)


def is_backbone(key: str) -> bool:
    """Whether a key belongs to one of the two encoders: no scale, no pooler, no token map."""
    return key not in SCALES and "attn_cross_pool." not in key and "token_mapping." not in key


def step(
    student: Weights,
    teacher: Weights,
    image_views: Views,
    text_views: Views,
    *,
    heads: int,
    text_heads: int,
    fusion_heads: int,
    patch: int,
    image_globals: int = 2,
    text_globals: int = 2,
    lr: float = 5e-4,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
    weight_decay: float = 0.5,
    optimizer_step: int = 1,
    momentum: float = 0.999,
    order: str = "teacher_first",
    mask_padding: bool = False,
) -> dict[str, Any]:
    """Images [B, 3, S, S] and ids [B, C], globals first -> losses, gradients, student and teacher afterwards.

    The losses always see the teacher as it came in. The inputs stay as they are. mask_padding hides the text
    tokens after EOT from the fusion. A parameter without a gradient (None) is not moved.
    """
    if order not in ("teacher_first", "optimizer_first"):
        raise ValueError(f"order is {order!r}; it must be 'teacher_first' or 'optimizer_first'")
    s = {key: value.detach().clone().requires_grad_() for key, value in student.items()}
    t = {key: value.detach().clone() for key, value in teacher.items()}
    images = [encode_image(s, view, heads, patch) for view in image_views]
    texts = [encode_text(s, view, text_heads) for view in text_views]
    image_pooled, text_pooled = [pooled for pooled, _ in images], [pooled for pooled, _ in texts]
    image_tokens = affine(s, "image_token_mapping", images[0][1])  # of global 0
    text_tokens = affine(s, "text_token_mapping", texts[0][1])
    ids = text_views[0]
    real = torch.arange(ids.shape[1]) <= ids.argmax(dim=1, keepdim=True) if mask_padding else None  # [B, C]
    fused_image = fuse(s, "text_attn_cross_pool", image_pooled, text_tokens, fusion_heads, real)
    fused_text = fuse(s, "visual.attn_cross_pool", text_pooled, image_tokens, fusion_heads)
    teacher_image = [normalise(encode_image(t, x, heads, patch)[0]) for x in image_views[:image_globals]]
    teacher_text = [normalise(encode_text(t, x, text_heads)[0]) for x in text_views[:text_globals]]
    pooled = [normalise(x) for x in image_pooled], [normalise(x) for x in text_pooled]
    scales = s["logit_scale"], s["distill_logit_scale"]
    fused, targets = (fused_image, fused_text), (teacher_image, teacher_text)
    terms = losses(pooled, fused, targets, scales, image_globals)
    found = torch.autograd.grad(terms["total"], list(s.values()), allow_unused=True)
    gradients = dict(zip(s, found, strict=True))

    before = {key: value.detach() for key, value in s.items()}
    after = dict(before)
    for key, gradient in gradients.items():
        if gradient is not None:
            after[key] = adamw(before[key], gradient, lr, betas, eps, weight_decay, optimizer_step)
    for key in SCALES:
        after[key] = after[key].clamp(0, math.log(100))
    source = before if order == "teacher_first" else after
    for key in t:
        if is_backbone(key):
            t[key] = momentum * t[key] + (1 - momentum) * source[key]
    numbers = {name: value.detach() for name, value in terms.items()}
    return {**numbers, "gradients": gradients, "student": after, "teacher": t}
