"""The text tower that looks both ways: against PyTorch's encoder, its masks, and padding that never matters."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill_core.batch import View
from distill_core.errors import RecipeErrors
from distill_core.recipe.resolve import parse_recipe
from distill_core.registry import Registry
from distill_vl.masked_text import BertText, BertTextConfig, MaskedTextCollator, TokenMaskingConfig, draw_word_mask

END = 59
RECIPE = """
augment: {image: {name: random_crop, size: 8}, text: {name: caption}}
backbone:
  image: {name: vit, image_size: 8, patch: 4, width: 8, layers: 1, heads: 2, dim: 6}
  text: {name: bert_text, width: 8, layers: 1, heads: 2, dim: 6, masking: {share: 0.2}}
loss: [{name: clip}]
data: {source: {name: webdataset, urls: none.tar}}
train: {steps: 1}
"""


def tower(**options: object) -> BertText:
    torch.manual_seed(0)
    settings = {"context": 14, "vocabulary": 60, "width": 24, "layers": 3, "heads": 3, "dim": 10, **options}
    made = BertText(BertTextConfig(**settings)).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


@pytest.fixture
def ids() -> Tensor:
    rows = torch.randint(1, 58, (5, 11), generator=torch.Generator().manual_seed(2))
    for i, end in enumerate((2, 10, 5, 1, 7)):
        rows[i, end], rows[i, end + 1 :] = END, 0
    return rows


def torch_encoder(made: BertText) -> nn.TransformerEncoder:
    """PyTorch's own pre-norm encoder with the tower's weights."""
    config = made.config
    layer = nn.TransformerEncoderLayer(
        config.width, config.heads, int(config.width * config.mlp_ratio), 0.0, "gelu", norm_first=True,
        batch_first=True, dtype=torch.float64,
    )  # fmt: skip
    encoder = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
    names = {"ln_1": "norm1", "ln_2": "norm2", "attn": "self_attn", "c_fc": "linear1", "c_proj": "linear2"}
    for theirs, ours in zip(encoder.layers, made.transformer.resblocks, strict=True):
        state = {}
        for key, value in ours.state_dict().items():
            first, _, rest = key.removeprefix("mlp.").partition(".")
            state[f"{names[first]}.{rest}"] = value
        theirs.load_state_dict(state)
    return encoder.eval()


def test_against_pytorchs_encoder(ids: Tensor) -> None:
    """Catches causal attention, padding that is attended to, a pooled token at the wrong end, a lost LayerNorm."""
    made = tower()
    padding = torch.tensor([[j > (row == END).nonzero()[0, 0] for j in range(11)] for row in ids])
    embedded = made.token_embedding(ids) + made.positional_embedding[:11]
    out = made.ln_final(torch_encoder(made)(made.ln_pre(embedded), src_key_padding_mask=padding))
    features = made.encode(ids, tokens=True, token_mask=None)
    assert torch.equal(features.mask, ~padding)
    torch.testing.assert_close(features.tokens[~padding], out[~padding], rtol=1e-10, atol=1e-10)
    assert (features.tokens[padding] == 0).all()
    torch.testing.assert_close(features.pooled, out[:, 0] @ made.text_projection, rtol=1e-10, atol=1e-10)
    assert features.class_tokens is not None
    torch.testing.assert_close(features.class_tokens[:, 0], out[:, 0], rtol=1e-10, atol=1e-10)


def test_without_tokens_the_embedding_and_gradients_are_the_same(ids: Tensor) -> None:
    made = tower()
    weight = torch.randn(5, 10).double()
    found = []
    for tokens in (True, False):
        made.zero_grad()
        features = made.encode(ids, tokens=tokens, token_mask=None)
        (features.pooled * weight).sum().backward()
        found.append((features.pooled, {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}))
        assert (features.tokens is not None) == tokens
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-10, atol=1e-12)
    assert set(found[0][1]) == set(found[1][1])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-9, atol=1e-10, msg=name)


def test_padding_never_matters(ids: Tensor) -> None:
    """Neither what stands behind the end of a text, nor how long the batch's longest text is."""
    made = tower()
    whole = made.encode(ids, tokens=True, token_mask=None)
    junk = torch.where((ids == 0) & (torch.arange(11) > 0), 33, ids)
    torch.testing.assert_close(made.encode(junk, tokens=True, token_mask=None).tokens, whole.tokens)
    for row in range(5):
        length = int(ids[row].argmax()) + 1
        alone = made.encode(ids[row : row + 1, :length], tokens=True, token_mask=None)
        torch.testing.assert_close(alone.tokens[0], whole.tokens[row, :length], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(alone.pooled[0], whole.pooled[row], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tokens", [True, False])
def test_a_hidden_token_is_the_mask_token_at_its_place(ids: Tensor, tokens: bool) -> None:
    """Catches words that leak, places that are lost with them, and a mask that is not looked at."""
    made = tower(masking=TokenMaskingConfig())
    mask = torch.zeros(5, 11, dtype=torch.bool)
    mask[1, 3] = mask[1, 8] = mask[4, 1] = True
    hidden = made.encode(ids, tokens=tokens, token_mask=mask).pooled
    changed = ids.clone()
    changed[1, 3], changed[1, 8], changed[4, 1] = 40, 41, 42
    assert torch.equal(made.encode(changed, tokens=tokens, token_mask=mask).pooled, hidden)
    seen = made.encode(ids, tokens=tokens, token_mask=None).pooled
    differs = (seen - hidden).abs().amax(1) > 1e-6
    assert differs.tolist() == [False, True, False, False, True]
    changed[1, 4] = 40
    assert (made.encode(changed, tokens=tokens, token_mask=mask).pooled[1] - hidden[1]).abs().max() > 1e-6
    moved = mask.clone()
    moved[1, 3], moved[1, 2] = False, True
    assert (made.encode(ids, tokens=tokens, token_mask=moved).pooled[1] - hidden[1]).abs().max() > 1e-6
    with pytest.raises(ValueError, match="only with the option `masking`"):
        tower().encode(ids, tokens=tokens, token_mask=mask)


TEXTS = ("a red bird", "two old boats on a quiet river under a small round bridge", "tree", "the large house by a tree")


def made_samples() -> list[list[View]]:
    return [[View(text), View(text, "masked"), View(f"{text} again", "masked")] for text in TEXTS]


def test_masks_are_a_function_of_the_samples_seed() -> None:
    """Catches a mask that depends on the batch's other samples, their order, the global generators, or the call."""
    collate = pickle.loads(pickle.dumps(MaskedTextCollator(77, TokenMaskingConfig(roles=("masked",), share=0.4))))
    samples, seeds = made_samples(), [5, 6, 7, 8]
    plain, masked = collate(samples, seeds).groups
    assert (plain.token_mask, plain.targets) == (None, None), "only the roles that are named"
    assert masked.token_mask.shape == masked.x.shape
    assert torch.equal(masked.targets, masked.x)
    torch.manual_seed(99)
    np.random.seed(99)
    order = [2, 0, 3]
    again = collate([samples[i] for i in order], [seeds[i] for i in order]).groups[1]
    length = again.x.shape[-1]
    assert length < masked.x.shape[-1], "another longest text"
    assert torch.equal(again.token_mask, masked.token_mask[:, order, :length])
    other = collate(samples, [seed + 100 for seed in seeds]).groups[1]
    assert not torch.equal(other.token_mask, masked.token_mask)
    for x, mask in zip(masked.x.flatten(0, 1), masked.token_mask.flatten(0, 1), strict=True):
        words = int(x.argmax()) - 1
        assert mask.sum() == max(1, round(0.4 * words))
        assert not mask[0], "the start"
        assert not mask[words + 1 :].any(), "the end and padding"
    with pytest.raises(ValueError, match="no seeds were given"):
        collate(samples)


def test_every_token_is_hidden_as_often() -> None:
    ids = torch.tensor([58, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 59, 0, 0])
    counts = torch.stack([draw_word_mask(ids, 0.15, np.random.default_rng(i)) for i in range(1000)]).sum(0)
    assert counts[0] == 0
    assert counts[11:].sum() == 0
    assert counts.sum() == 2000, "2 of 10, for 1.5 rounds to 2"
    assert ((counts[1:11] - 200).abs() < 55).all(), "four standard deviations"
    assert draw_word_mask(torch.tensor([58, 59, 0]), 0.15, np.random.default_rng(0)).sum() == 0, "a text without words"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("backbone.text.masking.roles=[maskd]", "masking.roles: no view has the role 'maskd'"),
        ("backbone.text.vocabulary=100", "vocabulary 100 is too small: CLIP's tokenizer has 49408 ids"),
        ("backbone.text.heads=3", "width 8 is not a multiple of heads 3"),
        ("backbone.text.masking.share=1.5", "at most 1"),
    ],
)
def test_what_is_refused(registry: Registry, change: str, message: str) -> None:
    with pytest.raises(RecipeErrors) as caught:
        parse_recipe(RECIPE, "r.yaml", registry=registry, overrides=[change])
    assert message in str(caught.value)


def test_a_role_that_only_the_other_modality_has_is_refused(registry: Registry) -> None:
    """Both can mask; they are told apart by their widths."""
    given = ["augment.image={name: flava_image, size: 8}", "backbone.image.masking={roles: [masked]}"]
    parse_recipe(RECIPE, "r.yaml", registry=registry, overrides=given)
    with pytest.raises(RecipeErrors, match=r"masking.roles: no view has the role 'masked' \(there are: global\)"):
        parse_recipe(
            RECIPE,
            "r.yaml",
            registry=registry,
            overrides=[*given, "backbone.text.masking.roles=[masked]", "backbone.text.width=10"],
        )


def test_masking_is_said_before_anything_is_built(registry: Registry) -> None:
    assert parse_recipe(RECIPE, "r.yaml", registry=registry).plan.modalities["text"].spec.can_mask
    plain = parse_recipe(RECIPE, "r.yaml", registry=registry, overrides=["backbone.text.masking=null"])
    assert not plain.plan.modalities["text"].spec.can_mask
