"""`vit` with `pooling: attention`: a learned query reads all patches, and its answer stands for the class token."""

import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm, softmax

from distill_core import Group, Views
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import parse_recipe
from distill_core.registry import Registry
from distill_vl.attention_pooling import AttentionPooling
from distill_vl.vit import VisionTransformer, VisionTransformerConfig
from tests.vl.test_towers import both_ways

WIDTH, HEADS = 24, 3


def random(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def vit(**options: object) -> VisionTransformer:
    torch.manual_seed(0)
    shape = {"image_size": 24, "patch": 4, "width": WIDTH, "layers": 2, "heads": HEADS, "dim": 10}
    config = VisionTransformerConfig(**shape, pooling="attention", **options)  # type: ignore[arg-type]
    return random(VisionTransformer(config).double())  # type: ignore[return-value]


@pytest.mark.parametrize(("n", "length"), [(3, 7), (1, 1), (5, 30)])
def test_the_pooling_is_the_formula(n: int, length: int) -> None:
    """Head by head; catches a norm that is left out or applied twice, a head that reads another's part, the residual
    taken of the query (it is of the attention's output), and gradients that miss a parameter."""
    torch.manual_seed(length)
    pool, norm = random(AttentionPooling(WIDTH, HEADS, 2.0, "gelu_tanh", 1e-6).double()), nn.LayerNorm(WIDTH).double()
    random(norm)
    x = torch.randn(n, length, WIDTH, dtype=torch.float64, requires_grad=True)
    pooled = pool(x, norm)
    inputs = [x, *pool.parameters(), *norm.parameters()]
    weight = torch.randn_like(pooled)
    ours = torch.autograd.grad((pooled * weight).sum(), inputs)

    p = dict(pool.named_parameters())
    t = layer_norm(x, [WIDTH], norm.weight, norm.bias, norm.eps)
    (wq, wk, wv), (bq, bk, bv) = p["attn.in_proj_weight"].chunk(3), p["attn.in_proj_bias"].chunk(3)
    q, k, v = p["probe"] @ wq.T + bq, t @ wk.T + bk, t @ wv.T + bv
    k_width = WIDTH // HEADS
    heads = []
    for i in range(HEADS):
        part = slice(i * k_width, (i + 1) * k_width)
        scores = softmax(k[..., part] @ q[part] / k_width**0.5, dim=1)  # [N, L]
        heads.append((scores[..., None] * v[..., part]).sum(1))
    y = torch.cat(heads, 1) @ p["attn.out_proj.weight"].T + p["attn.out_proj.bias"]
    hidden = layer_norm(y, [WIDTH], p["ln.weight"], p["ln.bias"], 1e-6) @ p["mlp.c_fc.weight"].T + p["mlp.c_fc.bias"]
    activated = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    expected = y + activated @ p["mlp.c_proj.weight"].T + p["mlp.c_proj.bias"]
    torch.testing.assert_close(pooled, expected, rtol=1e-10, atol=1e-11)
    for a, b in zip(ours, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_a_token_alone_is_pooled_to_what_dense_says_of_it() -> None:
    torch.manual_seed(3)
    pool, norm = random(AttentionPooling(WIDTH, HEADS, 2.0, "gelu", 1e-5).double()), nn.LayerNorm(WIDTH).double()
    x = torch.randn(4, 5, WIDTH, dtype=torch.float64)
    alone = pool(x.flatten(0, 1)[:, None], norm).unflatten(0, (4, 5))
    torch.testing.assert_close(pool.each(norm(x)), alone, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("tokens_of", [(), (0,), (1, 2)])
def test_crops_of_all_sizes_in_one_pass(tokens_of: tuple[int, ...]) -> None:
    """Features and gradients are those of each view by itself; positions have no row for a class token."""
    tower = vit()
    assert tower.positional_embedding.shape == (36, WIDTH)
    assert "class_embedding" not in dict(tower.named_parameters())
    sizes = ((2, 24, "global"), (1, 12, "local"))
    views = [Group(torch.randn(v, 3, 3, side, side, dtype=torch.float64), role) for v, side, role in sizes]
    both_ways(tower, Views(views), tokens_of)


def test_the_class_token_of_losses_is_what_is_pooled() -> None:
    """The embedding is its projection; dropping patches drops them from what is pooled, with their own positions."""
    tower = vit()
    x, keep = torch.randn(2, 3, 24, 24, dtype=torch.float64), torch.tensor([[0, 7, 35], [3, 4, 20]])
    features = tower(Views([Group(x[None])]), tokens_of=(0,))
    torch.testing.assert_close(features.class_tokens[:, :, 0] @ tower.proj, features.pooled)
    kept = tower(Views([Group(x[None], keep=keep[None])]), masked=True)
    patches = tower._embed(x, None).take_along_dim(keep[..., None], 1)
    (out,), _ = tower.transformer.together([patches], [None])
    torch.testing.assert_close(kept.class_tokens[0, :, 0], tower.attention_pool(out, tower.ln_post))


def test_several_class_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="class_tokens must be 1"):
        vit(class_tokens=2)


def test_small_weights_to_start_from() -> None:
    """`initialization: trunc_normal` reaches the pooling: matrices and query of deviation .02, biases 0."""
    torch.manual_seed(1)
    shape = {"image_size": 16, "patch": 4, "width": 64, "layers": 1, "heads": 2, "dim": 10}
    config = VisionTransformerConfig(**shape, pooling="attention", initialization="trunc_normal")  # type: ignore[arg-type]
    for name, parameter in VisionTransformer(config).attention_pool.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif name != "ln.weight":
            assert parameter.std().item() == pytest.approx(0.02, rel=0.35 if parameter.ndim == 1 else 0.1), name


def test_layer_wise_rates_leave_the_pooling_as_it_is(registry: Registry) -> None:
    """It comes after the blocks, as the last norm and the projection do."""
    recipe = parse_recipe(
        """
augment:
  image: {name: multi_crop, size: 16, local: 0}
  text: {name: caption}
backbone:
  image: {name: vit, image_size: 16, patch: 4, width: 24, layers: 2, heads: 3, dim: 10, pooling: attention}
  text: {name: clip_text, width: 16, layers: 1, heads: 2, dim: 10}
loss: [{name: siglip}]
data: {source: {name: emoji}}
train: {steps: 1, lr_decay: {backbone.image: 0.5}}
""",
        "r.yaml",
        registry=registry,
    )
    factors = {name: factor for name, _, factor in build_objective(recipe).trainable((), {}, recipe.train.lr_decay)}
    assert factors["backbone.image.attention_pool.probe"] == factors["backbone.image.proj"] == 1
    assert factors["backbone.image.transformer.resblocks.0.ln_1.weight"] == 0.25
