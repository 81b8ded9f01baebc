"""Every fusion against its formula written out sample by sample, and what all of them must do."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distill_core.batch import Batch, Group, Views
from distill_core.contracts.optional import TokenPooling
from distill_core.errors import RecipeErrors
from distill_core.interfaces import FusionHead
from distill_core.outputs import Features, Progress
from distill_core.plan import BackboneSpec, ModalityPlan, Plan
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import parse_recipe
from distill_core.registry import Registry
from distill_cosmos.fusion import CrossAttention
from distill_cosmos_variants.fusion import GatedCrossAttention, Identity, MeanPooling
from distill_cosmos_variants.q_former import QFormer

D, HEADS = 6, 2
WIDTH = {"image": 5, "text": 4}
LENGTH = {"image": 7, "text": 9}
OTHER = {"image": "text", "text": "image"}
PLAN = Plan(
    {name: ModalityPlan(("global",), BackboneSpec(width, D)) for name, width in WIDTH.items()},
    fusion=True,
)
CASES: list[tuple[type[FusionHead], dict[str, Any]]] = [
    (Identity, {}),
    (MeanPooling, {}),
    (CrossAttention, {"heads": HEADS}),
    (CrossAttention, {"heads": HEADS, "mask_padding": False}),
    (GatedCrossAttention, {"heads": HEADS, "mlp_ratio": 2.0}),
    (GatedCrossAttention, {"heads": HEADS, "mlp_ratio": 0.0}),
    (QFormer, {"heads": HEADS, "queries": 3, "mlp_ratio": 2.0}),
    (QFormer, {"heads": HEADS, "queries": 1, "layers": 2, "mlp_ratio": 2.0}),
]
each = pytest.mark.parametrize(("cls", "options"), CASES)
with_tokens = pytest.mark.parametrize(("cls", "options"), CASES[1:])


def make(cls: type[FusionHead], options: dict[str, Any], seed: int = 0) -> Any:
    """No parameter where it starts: gates open, norms and biases uneven."""
    torch.manual_seed(seed)
    fusion = cls(cls.Config.model_validate_json(json.dumps(options)), PLAN).double()
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter += 0.4 * torch.randn_like(parameter)
    return fusion


def make_features(seed: int, batch: int = 4, image_views: int = 3, text_views: int = 2) -> dict[str, Features]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    features = {
        name: Features(random(views, batch, D), {0: random(batch, LENGTH[name], WIDTH[name])})
        for name, views in (("image", image_views), ("text", text_views))
    }
    lengths = torch.randint(1, LENGTH["text"] + 1, (batch, 1), generator=generator)
    features["text"].masks[0] = torch.arange(LENGTH["text"]) < lengths
    return features


# the formulas, for one view of one sample: x [D], tokens [L, W] without padding


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def attend(w: dict[str, Tensor], name: str, queries: Tensor, keys: Tensor) -> Tensor:
    """queries [N, D] over keys [L, D] -> [N, D]; softmax written out."""
    matrices, biases = w[f"{name}.in_proj_weight"].chunk(3), w[f"{name}.in_proj_bias"].chunk(3)
    q, k, v = (x @ m.T + b for x, m, b in zip((queries, keys, keys), matrices, biases, strict=True))
    heads = []
    for h in range(HEADS):
        part = slice(h * D // HEADS, (h + 1) * D // HEADS)
        weights = torch.exp(q[:, part] @ k[:, part].T / math.sqrt(D / HEADS))
        heads.append(weights / weights.sum(1, keepdim=True) @ v[:, part])
    return linear(w, f"{name}.out_proj", torch.cat(heads, 1))


def feed_forward(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    hidden = linear(w, f"{name}.c_fc", x)
    return linear(w, f"{name}.c_proj", 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))


def by_hand(cls: type[FusionHead], w: dict[str, Tensor], other: str, x: Tensor, tokens: Tensor) -> Tensor:
    if cls is Identity:
        return x
    keys = linear(w, f"token_map.{other}", tokens)
    if cls is MeanPooling:
        return x + keys.sum(0) / len(keys)
    if cls is QFormer:
        former = f"former.{other}"
        q = w[f"{former}.queries"]
        layers = {name.split(".")[3] for name in w if name.startswith(f"{former}.blocks.")}
        for layer in sorted(layers):
            block = f"{former}.blocks.{layer}"
            conditioned = torch.cat([q, x[None]])
            q = q + attend(w, f"{block}.attn", norm(w, f"{block}.ln_1", q), norm(w, f"{block}.ln_1", conditioned))
            cross = f"{block}.cross"
            q = q + attend(w, f"{cross}.attn", norm(w, f"{cross}.ln_q", q), norm(w, f"{cross}.ln_k", keys))
            q = q + feed_forward(w, f"{block}.mlp", norm(w, f"{block}.ln_2", q))
        return x + linear(w, f"{former}.proj", norm(w, f"{former}.ln_post", q).sum(0) / len(q))
    pooler = f"pooler.{other}"
    found = attend(w, f"{pooler}.attn", norm(w, f"{pooler}.ln_q", x)[None], norm(w, f"{pooler}.ln_k", keys))[0]
    if cls is CrossAttention:
        return x + found
    x = x + torch.tanh(w[f"{pooler}.gate"]) * found
    if f"{pooler}.mlp_gate" in w:
        x = x + torch.tanh(w[f"{pooler}.mlp_gate"]) * feed_forward(w, f"{pooler}.mlp", norm(w, f"{pooler}.ln_mlp", x))
    return x


def expected(fusion: Any, features: dict[str, Features], *, normalised: bool) -> dict[str, Tensor]:
    w = dict(fusion.named_parameters())
    honours = getattr(fusion.config, "mask_padding", True)
    result = {}
    for name, other in OTHER.items():
        rows = []
        for view in features[name].pooled:
            for b, x in enumerate(view):
                tokens = features[other].tokens[0][b]
                if honours and 0 in features[other].masks:
                    tokens = tokens[features[other].masks[0][b]]
                y = by_hand(type(fusion), w, other, x, tokens)
                rows.append(y / y.square().sum().sqrt() if normalised else y)
        result[name] = torch.stack(rows).view(features[name].pooled.shape)
    return result


@each
@pytest.mark.parametrize(("batch", "image_views", "text_views"), [(4, 3, 2), (1, 1, 1), (1, 3, 1), (3, 1, 4)])
def test_against_the_formula(
    cls: type[FusionHead], options: dict[str, Any], batch: int, image_views: int, text_views: int
) -> None:
    fusion, features = make(cls, options), make_features(7, batch, image_views, text_views)
    for feature in features.values():
        feature.pooled.requires_grad_()
        feature.tokens[0].requires_grad_()
    fused, wanted = fusion(features), expected(fusion, features, normalised=True)
    assert set(fused) == {"image", "text"}
    for name, value in wanted.items():
        torch.testing.assert_close(fused[name].pooled, value, rtol=1e-10, atol=1e-10)
        if not isinstance(fusion, TokenPooling):
            assert cls is Identity
            continue
        other = OTHER[name]
        pooled = fusion.pool(other, features[name].pooled, features[other].tokens[0], features[other].masks.get(0))
        plain = expected(fusion, features, normalised=False)[name]
        torch.testing.assert_close(pooled, plain, rtol=1e-10, atol=1e-10)

    weights = {name: torch.randn_like(value) for name, value in wanted.items()}
    leaves = [*fusion.parameters(), *(f.pooled for f in features.values()), *(f.tokens[0] for f in features.values())]
    ours, theirs = (
        torch.autograd.grad(sum((weights[m] * x[m]).sum() for m in weights), leaves, allow_unused=True)  # type: ignore[arg-type]
        for x in ({m: f.pooled for m, f in fused.items()}, wanted)
    )
    for mine, reference in zip(ours, theirs, strict=True):
        assert (mine is None) == (reference is None)
        if mine is not None:
            torch.testing.assert_close(mine, reference, rtol=1e-8, atol=1e-9)


@with_tokens
def test_every_parameter_and_every_token_matters(cls: type[FusionHead], options: dict[str, Any]) -> None:
    fusion, features = make(cls, options), make_features(2)
    for feature in features.values():
        feature.tokens[0].requires_grad_()
    fused = fusion(features)
    generator = torch.Generator().manual_seed(3)
    sum(
        (f.pooled * torch.randn(f.pooled.shape, generator=generator, dtype=f.pooled.dtype)).sum()
        for f in fused.values()
    ).backward()  # type: ignore[union-attr]
    for name, parameter in fusion.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-8, name
    mask = features["text"].masks[0]
    moved = features["text"].tokens[0].grad.abs().amax(-1) > 0  # type: ignore[union-attr]
    honours = options.get("mask_padding", True)
    torch.testing.assert_close(moved, mask if honours else torch.ones_like(mask))


@with_tokens
def test_padding_cannot_reach_a_fused_view(cls: type[FusionHead], options: dict[str, Any]) -> None:
    fusion, features = make(cls, options), make_features(4)
    before = {name: f.pooled for name, f in fusion(features).items()}
    padding = ~features["text"].masks[0]
    assert padding.any()
    features["text"].tokens[0][padding] = 50.0
    after = {name: f.pooled for name, f in fusion(features).items()}
    same = torch.equal(before["image"], after["image"])
    assert same == options.get("mask_padding", True)


@with_tokens
def test_a_sample_without_tokens_is_finite(cls: type[FusionHead], options: dict[str, Any]) -> None:
    fusion, features = make(cls, options), make_features(5)
    features["text"].masks[0][1] = False
    features["text"].tokens[0].requires_grad_()
    fused = fusion(features)["image"].pooled
    fused.sum().backward()
    assert torch.isfinite(fused).all()
    if cls is MeanPooling:
        x = features["image"].pooled[:, 1]
        torch.testing.assert_close(fused[:, 1], x / x.norm(dim=-1, keepdim=True), rtol=1e-12, atol=1e-12)
    if options.get("mask_padding", True):
        assert (features["text"].tokens[0].grad[1] == 0).all()  # type: ignore[index]


@each
def test_samples_and_views_do_not_mix(cls: type[FusionHead], options: dict[str, Any]) -> None:
    """Catches rows put together wrongly: any sample or view alone must give what it gives among others."""
    fusion, features = make(cls, options), make_features(6)
    whole = {name: f.pooled for name, f in fusion(features).items()}
    for b in range(4):
        one = {
            name: Features(
                f.pooled[1:2, b : b + 1], {0: f.tokens[0][b : b + 1]}, {i: m[b : b + 1] for i, m in f.masks.items()}
            )
            for name, f in features.items()
        }
        for name, value in ((m, f.pooled) for m, f in fusion(one).items()):
            torch.testing.assert_close(value, whole[name][1:2, b : b + 1], rtol=1e-10, atol=1e-10)


@each
def test_an_empty_batch(cls: type[FusionHead], options: dict[str, Any]) -> None:
    fused = make(cls, options)(make_features(8, batch=0))
    assert {name: f.pooled.shape for name, f in fused.items()} == {"image": (3, 0, D), "text": (2, 0, D)}


@each
def test_bf16_autocast(cls: type[FusionHead], options: dict[str, Any]) -> None:
    """Embeddings near fp32's, of unit length and in fp32, with finite gradients in the parameters' dtype."""
    fusion = make(cls, options).float()
    features = {
        name: Features(f.pooled.float(), {0: f.tokens[0].float()}, f.masks) for name, f in make_features(9).items()
    }
    exact = {name: f.pooled for name, f in fusion(features).items()}
    low = {name: Features(f.pooled.bfloat16(), {0: f.tokens[0].bfloat16()}, f.masks) for name, f in features.items()}
    with torch.autocast("cpu", torch.bfloat16):
        rough = {name: f.pooled for name, f in fusion(low).items()}
    for name, value in rough.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.norm(dim=-1), torch.ones(value.shape[:2]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(value, exact[name], rtol=0, atol=5e-2)
    if list(fusion.parameters()):
        sum(x[..., 0].sum() for x in rough.values()).backward()  # type: ignore[union-attr]
    for name, parameter in fusion.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name


def test_a_gated_fusion_starts_as_none() -> None:
    torch.manual_seed(0)
    fusion = GatedCrossAttention(GatedCrossAttention.Config(heads=HEADS), PLAN).double()
    features = make_features(1)
    fused = {name: f.pooled for name, f in fusion(features).items()}
    for name, f in features.items():
        torch.testing.assert_close(fused[name], f.pooled / f.pooled.norm(dim=-1, keepdim=True), rtol=0, atol=1e-12)
    (fused["image"][..., 0].sum() + fused["text"][..., 0].sum()).backward()
    for name, parameter in fusion.named_parameters():
        if name.endswith("gate"):
            assert parameter.grad is not None
            assert parameter.grad.abs() > 0, f"{name} can never open"


def test_the_views_of_a_q_former_share_one_set_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    import distill_vl.token_fusion

    shapes: list[tuple[torch.Size, torch.Size]] = []
    original = distill_vl.token_fusion.cross_attention_pool

    def counting(queries: Tensor, tokens: Tensor, **rest: Any) -> Tensor:
        shapes.append((queries.shape, tokens.shape))
        return original(queries, tokens, **rest)

    monkeypatch.setattr(distill_vl.token_fusion, "cross_attention_pool", counting)
    make(QFormer, {"heads": HEADS, "queries": 3})(make_features(1))
    assert shapes == [((3 * 3, 4, D), (4, LENGTH["text"], D)), ((2 * 3, 4, D), (4, LENGTH["image"], D))]


RECIPE = """\
augment:
  image: {{name: multi_crop, size: 16, local_size: 8, local: 1}}
  text: {{name: text_crop, local: 1}}
backbone:
  image: {{name: vit, image_size: 16, patch: 8, width: 16, layers: 1, heads: 2, dim: 12}}
  text: {{name: clip_text, context: 8, width: 16, layers: 1, heads: 2, dim: {dim}}}
fusion: {fusion}
loss: [{{name: contrastive}}, {{name: cross_modal_distillation}}]
teacher: {{}}
data: {{source: {{name: webdataset, urls: x.tar}}}}
train: {{steps: 4}}
tracking: null
"""


@pytest.fixture
def parse(registry: Registry) -> Callable[..., Any]:
    return lambda fusion, dim=12: parse_recipe(RECIPE.format(fusion=fusion, dim=dim), "r.yaml", registry=registry)


@pytest.mark.parametrize("name", ["identity", "mean_pooling", "cross_attention", "gated", "q_former"])
def test_from_a_recipe(parse: Callable[..., Any], name: str) -> None:
    """A whole step: tokens of the first view only, none for `identity`, and a gradient wherever one is due."""
    torch.manual_seed(0)
    heads = ", heads: 3" if name in ("cross_attention", "gated", "q_former") else ""
    objective = build_objective(parse(f"{{name: {name}{heads}}}"))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 48, (3, 3, 6), generator=generator)
    sizes = ((2, 16, "global"), (1, 8, "local"))
    pictures = [Group(torch.randn(v, 3, 3, s, s, generator=generator), role) for v, s, role in sizes]
    batch = Batch(
        {"image": Views(pictures), "text": Views([Group(ids[:2], "global"), Group(ids[2:], "local")])}, ["a", "b", "c"]
    )
    outputs = objective.represent(batch, Progress(0, 4))
    tokens = [] if name == "identity" else [0]
    assert {m: list(f.tokens) for m, f in outputs.student.items()} == {"image": tokens, "text": tokens}
    objective.losses(outputs).total.backward()
    assert objective.fusion is not None
    assert all(p.grad is not None for p in objective.fusion.parameters())


@pytest.mark.parametrize("name", ["cross_attention", "gated", "q_former"])
def test_heads_and_widths_are_checked_before_anything_is_built(parse: Callable[..., Any], name: str) -> None:
    with pytest.raises(RecipeErrors, match=f"'{name}' has 5 heads, which do not divide the embedding width 12"):
        parse(f"{{name: {name}, heads: 5}}")
    with pytest.raises(RecipeErrors, match=f"'{name}' compares embeddings of one width D"):
        parse(f"{{name: {name}, heads: 4}}", 8)
    with pytest.raises(RecipeErrors, match=f"'{name}' needs two different modalities"):
        parse(f"{{name: {name}, heads: 4, modalities: [image, image]}}")
