"""FLAVA: encoder against PyTorch's, losses against the transcription, what masks hide, padding, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from beside import load_beside
from torch import Tensor, nn

from distill_core.batch import Batch, Group, View, Views
from distill_core.contracts.schedule import Scheduled
from distill_core.errors import BadSample, RecipeErrors, UserError
from distill_core.objective import Objective
from distill_core.outputs import Outputs, Progress
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import parse_recipe
from distill_core.registry import Registry
from distill_flava.losses import PredictionHead
from distill_flava.views import FlavaImage, FlavaImageConfig, FlavaText
from distill_vl.captions import TakeConfig

RECIPE = """
augment: {image: {name: flava_image, size: 12}, text: {name: flava_text}}
backbone:
  image: {name: vit, image_size: 12, patch: 4, width: 8, layers: 1, heads: 2, dim: 6,
    masking: {roles: [masked], targets: pixels, ratio: [0.4, 0.4], share: 1.0, block: false}}
  text: {name: bert_text, context: 16, width: 10, layers: 1, heads: 2, dim: 6, masking: {roles: [masked], share: 0.3}}
fusion: {name: multimodal_encoder, role: masked, layers: 2, heads: 2}
loss: [{name: clip}, {name: flava_mlm}, {name: flava_mim, patch: 4}, {name: flava_mmm, patch: 4}, {name: flava_itm}]
data: {source: {name: webdataset, urls: none.tar}}
train: {steps: 1}
"""
TEXTS = ("a red bird", "two old boats on a quiet river", "tree", "the large house by a small tree")


@pytest.fixture(scope="module")
def transcription() -> ModuleType:
    return load_beside(__file__, "transcription")


def build(registry: Registry, *overrides: str) -> Objective:
    torch.manual_seed(0)
    made = build_objective(parse_recipe(RECIPE, "r.yaml", registry=registry, overrides=overrides)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.numel() < 1e5:  # the vocabulary's are random enough
                parameter += 0.1 * torch.randn_like(parameter)
    return made


def make_batch(made: Objective, texts: tuple[str, ...] = TEXTS) -> Batch:
    """By the backbones' own collators."""
    generator = torch.Generator().manual_seed(1)
    pictures = [torch.randn(3, 12, 12, generator=generator, dtype=torch.float64) for _ in texts]
    samples = {
        "image": [[View(x), View(x, "masked")] for x in pictures],
        "text": [[View(x), View(x, "masked")] for x in texts],
    }
    seeds = range(10, 10 + len(texts))
    views = {m: made.backbone[m].collator(made.backbone[m].config)(samples[m], seeds) for m in samples}
    return Batch(views, [str(i) for i in range(len(texts))])


@pytest.fixture(scope="module")
def made(registry: Registry) -> Objective:
    return build(registry)


@pytest.fixture(scope="module")
def batch(made: Objective) -> Batch:
    return make_batch(made)


@pytest.fixture(scope="module")
def outputs(made: Objective, batch: Batch) -> Outputs:
    return made.represent(batch, Progress(0, 1))


def weights(made: Objective, path: str) -> dict[str, Tensor]:
    return dict(made.get_submodule(path).named_parameters())


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def class_tokens(made: Objective, image: Tensor, text: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """(class token [B, D], all outputs [B, 1 + Li + Lt, D]) by PyTorch's own encoder; real [B, Lt]."""
    fusion: Any = made.fusion
    layer = nn.TransformerEncoderLayer(
        6, 2, 24, 0.0, "gelu", norm_first=True, batch_first=True, dtype=torch.float64
    )  # fmt: skip
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    names = {"ln_1": "norm1", "ln_2": "norm2", "attn": "self_attn", "c_fc": "linear1", "c_proj": "linear2"}
    for theirs, ours in zip(encoder.layers, fusion.transformer.resblocks, strict=True):
        state = {}
        for key, value in ours.state_dict().items():
            first, _, rest = key.removeprefix("mlp.").partition(".")
            state[f"{names[first]}.{rest}"] = value
        theirs.load_state_dict(state)
    parts = [fusion.class_token.expand(len(image), 1, -1), fusion.token_map["image"](image)]
    padding = torch.cat([torch.zeros(len(image), 1 + image.shape[1], dtype=torch.bool), ~real], 1)
    out = encoder.eval()(torch.cat([*parts, fusion.token_map["text"](text)], 1), src_key_padding_mask=padding)
    out = fusion.ln_post(out)
    return out[:, 0], out


def test_the_encoder_against_pytorchs(made: Objective, outputs: Outputs) -> None:
    """Catches modalities out of order, the wrong view fused, padding that is attended to, a normalised token."""
    fused = outputs.fused
    image, text = outputs.student["image"].tokens[1], outputs.student["text"].tokens[1]
    real = outputs.student["text"].masks[1]
    assert not real.all()
    first, every = class_tokens(made, image, text, real)
    for m in ("image", "text"):
        close(fused[m].pooled, nn.functional.normalize(first, dim=-1)[None])
    close(fused["image"].tokens, every[:, 1:10])
    close(fused["text"].tokens[real], every[:, 10:][real])
    assert (fused["text"].tokens[~real] == 0).all()


def test_masked_language_and_gradients(made: Objective, outputs: Outputs, transcription: ModuleType) -> None:
    group = outputs.views["text"].groups[1]
    head = weights(made, "loss.flava_mlm.head")
    tokens = outputs.student["text"].tokens[1]
    expected, accuracy = transcription.language(head, [tokens], group.token_mask, group.x)
    terms, metrics = made.loss["flava_mlm"](outputs)
    close(terms["mlm"], expected)
    assert metrics["accuracy"].item() == pytest.approx(accuracy)
    wanted = [*made.backbone["text"].parameters(), *head.values()]
    ours = torch.autograd.grad(terms["mlm"], wanted, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(expected, wanted, retain_graph=True, allow_unused=True)
    assert sum(x is not None for x in ours) > 15
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            close(a, b)


def test_masked_image(made: Objective, batch: Batch, outputs: Outputs, transcription: ModuleType) -> None:
    """Pixels are cut and normalised here by hand, from the picture itself."""
    group = batch.views["image"].groups[1]
    assert group.token_mask is not None
    expected = transcription.pixels(
        weights(made, "loss.flava_mim.head"), outputs.student["image"].tokens[1], group.token_mask[0], group.x[0], 4
    )
    terms, _ = made.loss["flava_mim"](outputs)
    close(terms["mim"], expected)


def test_masked_multimodal(made: Objective, batch: Batch, outputs: Outputs, transcription: ModuleType) -> None:
    """Both parts come from the encoder's outputs, not from the towers'."""
    image, text = batch.views["image"].groups[1], batch.views["text"].groups[1]
    assert image.token_mask is not None
    assert text.token_mask is not None
    _, every = class_tokens(
        made, outputs.student["image"].tokens[1], outputs.student["text"].tokens[1], outputs.student["text"].masks[1]
    )
    words, accuracy = transcription.language(
        weights(made, "loss.flava_mmm.text_head"), [every[:, 10:]], text.token_mask, text.x
    )
    picture = transcription.pixels(
        weights(made, "loss.flava_mmm.image_head"), every[:, 1:10], image.token_mask[0], image.x[0], 4
    )
    terms, metrics = made.loss["flava_mmm"](outputs)
    close(terms["text"], words)
    close(terms["image"], picture)
    assert metrics["accuracy"].item() == pytest.approx(accuracy)


def test_matching(made: Objective, outputs: Outputs, transcription: ModuleType) -> None:
    """Sample i's picture with sample i + 1's text, by PyTorch's encoder."""
    image, text = outputs.student["image"].tokens[1], outputs.student["text"].tokens[1]
    real = outputs.student["text"].masks[1]
    matched, _ = class_tokens(made, image, text, real)
    turned = [1, 2, 3, 0]
    mismatched, _ = class_tokens(made, image, text[turned], real[turned])
    expected, accuracy = transcription.matching(weights(made, "loss.flava_itm.head"), matched, mismatched)
    terms, metrics = made.loss["flava_itm"](outputs)
    close(terms["itm"], expected)
    assert metrics["accuracy"].item() == pytest.approx(accuracy)


def test_hard_partners_are_alike_and_never_their_own(made: Objective, outputs: Outputs) -> None:
    loss: Any = made.loss["flava_itm"]
    plain = loss.config
    try:
        for temperature, count in ((1.0, 3), (1e-4, 1)):
            loss.config = plain.model_copy(update={"negatives": "hard", "temperature": Scheduled(temperature)})
            torch.manual_seed(0)
            drawn = torch.stack([loss.partners(outputs, 4) for _ in range(200)])
            assert (drawn != torch.arange(4)).all()
            assert all(len(set(drawn[:, i].tolist())) == count for i in range(4))
        images, texts = (outputs.student[m].embedding[0] for m in ("image", "text"))
        alike = (images @ texts.T).fill_diagonal_(-2).argmax(1)
        assert torch.equal(drawn[0], alike), "the coldest draw is the most similar other text"
        assert not drawn.requires_grad
    finally:
        loss.config = plain


def test_the_contrastive_loss_sees_whole_views_alone(made: Objective, batch: Batch) -> None:
    """Catches a masked view in the contrastive loss, and masks that the towers do not look at."""
    first = made.losses(made.represent(batch, Progress(0, 1))).terms
    hidden = {m: Views([v.groups[0], Group(v.groups[1].x, "masked")]) for m, v in batch.views.items()}
    for m, views in hidden.items():
        group = batch.views[m].groups[1]
        assert group.token_mask is not None
        views.groups[1].targets = group.targets
        views.groups[1].token_mask = group.token_mask.roll(1, 0).roll(1, -1) if m == "image" else group.token_mask
    second = made.losses(made.represent(Batch(hidden, batch.keys), Progress(0, 1))).terms
    assert torch.equal(first["clip"], second["clip"])
    assert first["flava_mlm"] == second["flava_mlm"]
    for name in ("flava_mim", "flava_mmm/image", "flava_mmm/text", "flava_itm"):
        assert (first[name] - second[name]).abs() > 1e-6, name


def test_what_is_hidden_cannot_be_read(made: Objective, batch: Batch) -> None:
    """Changing a hidden word or patch changes what is to be predicted, never what is fused."""
    views = {}
    for m, v in batch.views.items():
        group = v.groups[1]
        assert group.token_mask is not None
        x = group.x.clone()
        if m == "text":
            x[group.token_mask] = 77
        else:
            for _, b, i in group.token_mask.nonzero().tolist():
                x[0, b, :, i // 3 * 4 : i // 3 * 4 + 4, i % 3 * 4 : i % 3 * 4 + 4] = 5.0
        views[m] = Views([v.groups[0], Group(x, "masked", group.token_mask, group.targets)])
    a = made.represent(batch, Progress(0, 1)).fused
    b = made.represent(Batch(views, batch.keys), Progress(0, 1)).fused
    for m in ("image", "text"):
        assert torch.equal(a[m].tokens, b[m].tokens)
        assert torch.equal(a[m].pooled, b[m].pooled)


def test_padding_never_matters(made: Objective, batch: Batch) -> None:
    """A longer text elsewhere in the batch changes nothing for the others."""
    groups = []
    for group in batch.views["text"].groups:
        groups.append(replace(group.map(lambda x: nn.functional.pad(x, (0, 3))), hidden=None))
    longer = Batch({**batch.views, "text": Views(groups)}, batch.keys)
    a = made.losses(made.represent(batch, Progress(0, 1))).terms
    b = made.losses(made.represent(longer, Progress(0, 1))).terms
    assert len(a) == 6
    for name, value in a.items():
        close(b[name], value)


def test_small_batches(made: Objective) -> None:
    """One sample has no partner; a text without words has nothing to hide."""
    losses = made.losses(made.represent(make_batch(made, ("a bird",)), Progress(0, 1)))
    assert torch.isfinite(losses.total)
    losses.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters() if p.grad is not None)
    made.zero_grad()
    empty = make_batch(made, ("", ""))
    terms = made.losses(made.represent(empty, Progress(0, 1))).terms
    assert terms["flava_mlm"] == 0
    assert terms["flava_mmm/text"] == 0
    assert torch.isfinite(torch.stack(list(terms.values()))).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("backbone.image.masking=null", "'flava_mim' needs masked views of 'image'; its backbone cannot hide tokens"),
        ("backbone.text.masking=null", "'flava_mlm' needs masked views of 'text'; its backbone cannot hide tokens"),
        ("augment.text={name: caption}", "'flava_mlm' needs 1 masked view(s) of 'text'; its augmentation makes 0"),
        ("fusion=none", "'flava_mmm' needs fused views; this recipe has no fusion"),
        ("fusion.heads=4", "4 heads, which do not divide the embedding width 6"),
        ("fusion.role=local", "'multimodal_encoder' needs 1 local view(s) of 'image'"),
        ("loss.flava_mlm.vocabulary=9", "at least 49408"),
        ("loss.flava_itm.modalities=[image, image]", "'flava_itm' needs two different modalities"),
    ],
)
def test_what_is_refused_at_once(registry: Registry, change: str, message: str) -> None:
    with pytest.raises(RecipeErrors) as caught:
        parse_recipe(RECIPE, "r.yaml", registry=registry, overrides=[change])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("backbone.image.masking.targets=null", "flava_mim: the masked views of 'image' came with no targets"),
        ("backbone.text.masking.roles=[global]", r"flava_mlm: the masked views of 'text' came with no mask; set back"),
        ("loss.flava_mim.patch=2", "flava_mim: a patch has 48 pixel values, the head makes 12; set patch to the backb"),
        ("fusion.role=global", r"flava_mmm: reads fused tokens of the masked views; the fusion must be \{name: multi"),
    ],
)
def test_what_is_refused_at_the_first_step(registry: Registry, change: str, message: str) -> None:
    """What only the batch, or another component's options, can tell."""
    wrong = build(registry, change)
    with pytest.raises(UserError, match=message):
        wrong.losses(wrong.represent(make_batch(wrong), Progress(0, 1)))


def test_views_are_the_same_twice() -> None:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file, "PNG")
    sample = {"png": file.getvalue(), "json": json.dumps({"captions": ["one", "two", "three"]}).encode()}
    image = FlavaImage(FlavaImageConfig(size=12, scale=(0.3, 1.0)))
    crops = set()
    for seed in range(20):
        whole, masked = image.train_views(sample, np.random.default_rng(seed))
        assert (whole.role, masked.role) == image.roles(image.config) == ("global", "masked")
        assert whole.data.shape == (3, 12, 12)
        assert torch.equal(whole.data, masked.data)
        crops.add(tuple(whole.data.flatten().tolist()))
    assert len(crops) > 10, "crops are drawn from the generator"
    text = FlavaText(TakeConfig())
    assert [v.data for v in text.train_views(sample, np.random.default_rng(0))] == ["one. two. three"] * 2
    one = FlavaText(TakeConfig(take="one"))
    drawn = [one.train_views(sample, np.random.default_rng(seed)) for seed in range(20)]
    assert all(a.data == b.data for a, b in drawn)
    assert {a.data for a, _ in drawn} == {"one", "two", "three"}
    with pytest.raises(BadSample):
        text.train_views({"txt": b""}, np.random.default_rng(0))


def test_the_vocabularys_logits_are_of_fp32_under_autocast() -> None:
    """A last layer in bf16 rounds logits of some ten to a sixteenth, whatever type they are cast to afterwards."""
    torch.manual_seed(0)
    head = PredictionHead(32, 500)
    with torch.no_grad():
        head.decoder.weight.mul_(20)
    x = torch.randn(6, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(x)
        hidden = head.norm(nn.functional.gelu(head.dense(x)))
    assert logits.dtype == torch.float32
    expected = hidden.double() @ head.decoder.weight.double().T + head.decoder.bias.double()
    assert expected.abs().max() > 10
    assert (logits - expected).abs().max() < 1e-4
    logits.sum().backward()
    assert head.decoder.weight.grad is not None
    assert head.decoder.weight.grad.dtype == torch.float32
    assert head.double()(x.double()).dtype == torch.float64
