"""Towers: their two paths agree, positions resize as the spec says, first weights have the stated spreads."""

import math
import pickle
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms

from distill_core.batch import Group, View, Views
from distill_core.interfaces import Backbone
from distill_vl.clip_text import ClipText, ClipTextConfig, TextCollator
from distill_vl.multi_crop import MultiCrop, MultiCropConfig
from distill_vl.tokenizer import ClipTokenizer, clean
from distill_vl.vit import PictureCollator, VisionTransformer, VisionTransformerConfig


@pytest.fixture
def vit() -> VisionTransformer:
    torch.manual_seed(0)
    config = VisionTransformerConfig(image_size=24, patch=4, width=24, layers=3, heads=3, dim=10)
    return VisionTransformer(config).double()


@pytest.fixture
def text() -> ClipText:
    torch.manual_seed(0)
    config = ClipTextConfig(context=16, vocabulary=60, width=24, layers=3, heads=3, dim=10)
    return ClipText(config).double()


@pytest.fixture
def ids() -> torch.Tensor:
    rows = torch.randint(1, 58, (6, 11))
    for i, end in enumerate((2, 10, 5, 1, 7, 9)):
        rows[i, end] = 59
        rows[i, end + 1 :] = 0
    return rows


@pytest.mark.parametrize("size", [24, 12])
def test_vit_without_tokens_gives_the_same_embedding_and_gradients(vit: VisionTransformer, size: int) -> None:
    """The last block at the class token alone must equal the whole block."""
    x = torch.randn(5, 3, size, size, dtype=torch.float64)
    weight = torch.randn(5, 10, dtype=torch.float64)
    results = []
    for tokens in (True, False):
        vit.zero_grad()
        features = vit.encode(x, tokens=tokens, token_mask=None)
        (features.pooled * weight).sum().backward()
        results.append((features.pooled, {n: p.grad.clone() for n, p in vit.named_parameters() if p.grad is not None}))
        assert (features.tokens is not None) == tokens
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-10, atol=1e-12)
    assert set(results[0][1]) == set(results[1][1])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-9, atol=1e-10)


def test_the_last_block_calls_its_modules(vit: VisionTransformer) -> None:
    """Adapters and hooks on the output projection act where only the class token is computed, too."""
    out_proj = vit.transformer.resblocks[-1].attn.out_proj
    x = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    plain = vit.encode(x, tokens=False, token_mask=None).pooled
    out_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
    results = [vit.encode(x, tokens=tokens, token_mask=None).pooled for tokens in (True, False)]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(results[1], plain)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("tokens", "pooling"), [(False, "class_token"), (True, "class_token"), (False, "attention")])
def test_vit_is_traced_and_mapped(
    vit: VisionTransformer, tokens: bool, pooling: Literal["class_token", "attention"]
) -> None:
    """torch.jit.trace for another batch size, with none of our operators inside, and torch.func.vmap."""
    if pooling == "attention":
        vit = VisionTransformer(vit.config.model_copy(update={"pooling": pooling})).double()

    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = vit

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.vit.encode(x, tokens=tokens, token_mask=None).pooled

    tower, x, y = Tower(), *(torch.randn(n, 3, 24, 24, dtype=torch.float64) for n in (3, 5))
    traced = torch.jit.trace(tower, (x,), check_trace=False)  # checked here, for another batch size
    torch.testing.assert_close(traced(y), tower(y))
    assert "distill::" not in str(traced.inlined_graph)
    with torch.no_grad():
        mapped = torch.func.vmap(tower)(y.view(5, 1, 3, 24, 24))
        torch.testing.assert_close(mapped[:, 0], tower(y))


def test_text_without_tokens_gives_the_same_embedding(text: ClipText, ids: torch.Tensor) -> None:
    full = text.encode(ids, tokens=True, token_mask=None)
    short = text.encode(ids, tokens=False, token_mask=None)
    torch.testing.assert_close(full.pooled, short.pooled, rtol=1e-10, atol=1e-12)
    assert full.tokens.shape == (6, 16, 24)
    assert full.mask.sum(1).tolist() == [3, 11, 6, 2, 8, 10]


def both_ways(tower: Backbone, views: Views, tokens_of: tuple[int, ...]) -> None:
    """All views in one pass, as the tower does it, against each view encoded alone: features and gradients."""
    results = []
    for together in (True, False):
        tower.zero_grad()
        if together:
            features = tower(views, tokens_of=tokens_of)
            pooled, tokens, masks = features.pooled, features.tokens, features.masks
        else:
            xs = [x for group in views.groups for x in group.x]
            alone = [tower.encode(x, tokens=i in tokens_of, token_mask=None) for i, x in enumerate(xs)]
            pooled = torch.stack([one.pooled for one in alone])
            tokens = {i: alone[i].tokens for i in tokens_of}
            masks = {i: alone[i].mask for i in tokens_of if alone[i].mask is not None}
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (pooled, *tokens.values())]
        sum((t * w).sum() for t, w in zip((pooled, *tokens.values()), weights, strict=True)).backward()
        grads = {n: p.grad.clone() for n, p in tower.named_parameters() if p.grad is not None}
        results.append((pooled, tokens, masks, grads))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("tokens_of", [(), (0,), (1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("layers", [1, 3])
def test_crops_of_all_sizes_in_one_pass(tokens_of: tuple[int, ...], layers: int) -> None:
    torch.manual_seed(0)
    config = VisionTransformerConfig(image_size=24, patch=4, width=24, layers=layers, heads=3, dim=10)
    views = Views(
        [
            Group(torch.randn(2, 3, 3, 24, 24, dtype=torch.float64), "global"),
            Group(torch.randn(2, 3, 3, 12, 12, dtype=torch.float64), "local"),
        ]
    )
    both_ways(VisionTransformer(config).double(), views, tokens_of)


@pytest.mark.parametrize("tokens_of", [(), (0,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("padding", ["context", "longest"])
def test_texts_of_all_lengths_in_one_pass(
    text: ClipText, ids: torch.Tensor, padding: str, tokens_of: tuple[int, ...]
) -> None:
    text.config = text.config.model_copy(update={"padding": padding})
    short = ids.flip(0)[:, :9].clone()
    short[:, 8] = 59
    both_ways(text, Views([Group(ids.view(2, 3, 11), "global"), Group(short[None, :3], "local")]), tokens_of)


def test_text_padding_never_reaches_the_embedding(text: ClipText, ids: torch.Tensor) -> None:
    junk = ids.clone()
    junk[ids == 0] = 33
    for tokens in (True, False):
        a, b = (text.encode(x, tokens=tokens, token_mask=None).pooled for x in (ids, junk))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_clip_text_refuses_to_hide_tokens(text: ClipText, ids: torch.Tensor) -> None:
    """Would catch a mask that is dropped in silence, so that the student sees what it should predict."""
    views = Views([Group(ids[None], token_mask=torch.ones(1, *ids.shape, dtype=torch.bool))])
    with pytest.raises(ValueError, match="clip_text cannot hide tokens"):
        text(views, masked=True)
    with pytest.raises(ValueError, match="clip_text cannot hide tokens"):
        text.encode(ids, tokens=True, token_mask=torch.ones_like(ids, dtype=torch.bool))
    text(views)  # the teacher's pass


def test_text_padding_longest_hands_on_fewer_tokens(text: ClipText, ids: torch.Tensor) -> None:
    text.config = text.config.model_copy(update={"padding": "longest"})
    assert text.encode(ids, tokens=True, token_mask=None).tokens.shape == (6, 11, 24)


@pytest.mark.parametrize(("size", "patch", "crop"), [(224, 16, 96), (224, 16, 160), (48, 8, 24), (224, 32, 96)])
def test_positions_of_other_crops_use_the_scale_factor(size: int, patch: int, crop: int) -> None:
    """((crop / patch) + 0.1) / grid as a scale factor; an output size would differ."""
    config = VisionTransformerConfig(image_size=size, patch=patch, width=8, layers=1, heads=1, dim=4)
    vit = VisionTransformer(config).double()
    grid, new = size // patch, crop // patch
    table = vit.positional_embedding[1:].T.reshape(1, 8, grid, grid)
    factor = (new + 0.1) / grid
    expected = F.interpolate(table, scale_factor=(factor, factor), mode="bicubic")
    ours = vit.positions(new, new)
    assert ours.shape == (1 + new * new, 8)
    torch.testing.assert_close(ours[0], vit.positional_embedding[0])
    torch.testing.assert_close(ours[1:], expected.flatten(2)[0].T, rtol=1e-9, atol=1e-9)
    by_size = F.interpolate(table, size=(new, new), mode="bicubic").flatten(2)[0].T
    assert (ours[1:] - by_size).abs().max() > 1e-3
    assert vit.positions(grid, grid) is vit.positional_embedding


def test_first_weights_of_the_text_tower() -> None:
    """Catches a spread that is off by a factor (10 % is more than twenty standard errors here)."""
    torch.manual_seed(0)
    text = ClipText(ClipTextConfig(width=128, layers=4, heads=4, dim=64, vocabulary=500))
    block = text.transformer.resblocks[1]
    width, layers = 128, 4
    for parameter, std in (
        (text.token_embedding.weight, 0.02),
        (text.positional_embedding, 0.01),
        (text.text_projection, width**-0.5),
        (block.attn.in_proj_weight, width**-0.5),
        (block.attn.out_proj.weight, width**-0.5 * (2 * layers) ** -0.5),
        (block.mlp.c_fc.weight, (2 * width) ** -0.5),
        (block.mlp.c_proj.weight, width**-0.5 * (2 * layers) ** -0.5),
    ):
        assert abs(parameter.std().item() / std - 1) < 0.1
        assert abs(parameter.mean().item()) < 0.1 * std
    assert block.attn.in_proj_bias.abs().max() == 0


def test_first_weights_of_the_image_tower() -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(VisionTransformerConfig(width=192, layers=1, heads=3, dim=64))
    assert abs(vit.positional_embedding.std().item() * math.sqrt(192) - 1) < 0.05
    assert abs(vit.proj.std().item() * math.sqrt(192) - 1) < 0.05
    # Xavier-uniform over a [3W, W] matrix
    bound = math.sqrt(6 / (192 + 3 * 192))
    weight = vit.transformer.resblocks[0].attn.in_proj_weight
    assert 0.98 * bound < weight.abs().max() <= bound


def test_tokenizer_gives_clips_ids() -> None:
    """Ids as CLIP's own tokenizer gives them."""
    ids = ClipTokenizer()(["a photo of a cat", "A  PHOTO\nof a cat", "a photo of a caf&amp;eacute;"])
    assert ids.shape == (3, 77)
    assert ids.dtype == torch.int64
    assert ids[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    assert torch.equal(ids[0], ids[1])
    assert torch.equal(ids[2], ClipTokenizer()(["a photo of a caf\u00e9"])[0])


def test_long_texts_keep_the_end_token() -> None:
    ids = ClipTokenizer(context=10)(["dog " * 50])
    assert ids[0, 0] == 49406
    assert ids[0, -1] == 49407
    assert (ids[0, 1:-1] == ids[0, 1]).all()


def test_tokenizer_pickles_after_use() -> None:
    tokenizer = ClipTokenizer(20)
    expected = tokenizer(["a red bird"])
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(["a red bird"]), expected)


def test_clean_repairs_encoding() -> None:
    assert clean("  caf\u00c3\u00a9 &amp;lt;3 \t x ") == "caf\u00e9 <3 x"


def test_text_collator_groups_by_role_and_cuts_to_the_longest() -> None:
    samples = [
        [View("a cat"), View("a dog runs far away"), View("sun", "local")],
        [View("!"), View("b"), View("the moon", "local")],
    ]
    views = TextCollator(77)(samples)
    assert views.roles == ("global", "global", "local")
    assert [tuple(group.x.shape) for group in views.groups] == [(2, 2, 7), (1, 2, 4)]
    assert views.groups[1].x[0, 1].tolist() == ClipTokenizer()(["the moon"])[0, :4].tolist()
    assert views.groups[0].x[1, 0].tolist() == ClipTokenizer()(["a dog runs far away"])[0, :7].tolist()
    # "!!" holds id 0 (a bare "!"), which is also the padding: it must not shorten the row
    exclamation = TextCollator(77)([[View("!!")]]).groups[0].x[0, 0]
    assert exclamation[-1] == 49407


def test_picture_collator_groups_by_size() -> None:
    def sample(seed: int) -> list[View]:
        generator = torch.Generator().manual_seed(seed)
        big = [View(torch.randn(3, 8, 8, generator=generator), "global") for _ in range(2)]
        return [*big, View(torch.randn(3, 4, 4, generator=generator), "local")]

    samples = [sample(i) for i in range(3)]
    views = PictureCollator(4)(samples)
    assert [tuple(group.x.shape) for group in views.groups] == [(2, 3, 3, 8, 8), (1, 3, 3, 4, 4)]
    assert torch.equal(views.groups[0].x[1, 2], samples[2][1].data)
    with pytest.raises(ValueError, match="not whole patches"):
        PictureCollator(5)(samples)


@pytest.mark.parametrize("shape", [(640, 480), (480, 640), (61, 47), (37, 90), (16, 16), (9, 5)])
@pytest.mark.parametrize("size", [16, 33])
def test_plain_pictures_are_torchvisions(shape: tuple[int, int], size: int) -> None:
    """Against Resize and CenterCrop, which other libraries use. Would catch a side or a crop rounded otherwise."""
    width, height = shape
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    augmentation = MultiCrop(MultiCropConfig(size=size, mean=(0, 0, 0), std=(1, 1, 1)))
    steps = (transforms.Resize(size, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(size))
    theirs = transforms.ToTensor()(transforms.Compose(steps)(picture))
    torch.testing.assert_close(augmentation.eval_view(picture).data, theirs, rtol=0, atol=1e-6)
