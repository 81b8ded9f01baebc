"""CoCa's decoder against what the paper says, written out sample by sample; and its recipe's weights."""

from __future__ import annotations

import plain_decoders as plain
import torch

from distill_coca.decoder import CocaDecoder, CocaDecoderConfig
from distill_core import BackboneSpec, Encoded, ModalityPlan, Model, Plan, Vocabulary
from distill_core.recipe.build import build_objective, models_of
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry

N, P, L, WIDTH, QUERIES = 3, 6, 5, 12, 4


def test_the_decoder() -> None:
    """Queries that read the image once; causal blocks over the text tower's tokens that read the queries. Would catch
    blocks that read the patches, a text that is embedded anew, tokens of the text beyond the ids, padded patches."""
    torch.manual_seed(0)
    vocabulary = Vocabulary(9, 1, 4, padding=0, longest=8)
    plan = Plan(
        {
            "image": ModalityPlan(("global",), BackboneSpec(10, 7)),
            "text": ModalityPlan(("global",), BackboneSpec(WIDTH, 7, vocabulary=vocabulary, causal=True)),
        }
    )
    decoder = CocaDecoder(CocaDecoderConfig(layers=2, heads=3, queries=QUERIES), plan).double()
    mask = torch.arange(P) < torch.tensor([[6], [2], [4]])
    image = Encoded(torch.zeros(N, 7), torch.randn(N, P, 10, dtype=torch.float64), mask)
    text = Encoded(torch.zeros(N, 7), torch.randn(N, L + 2, WIDTH, dtype=torch.float64))
    ids = torch.randint(0, 9, (N, L))
    rows = []
    for row in range(N):
        assert image.tokens is not None
        assert text.tokens is not None
        pooler = decoder.pooler
        read = plain.norm(image.tokens[row], pooler.norm_read)
        pooled = plain.norm(plain.cross_attention(pooler.queries, read, pooler.attention, mask[row]), pooler.norm)
        x = text.tokens[row, :L]
        for block in decoder.blocks:
            x = plain.block(x, pooled, block, None)
        rows.append(plain.logits(x, decoder.readout))
    found = decoder({"image": image, "text": text}, ids)
    torch.testing.assert_close(found, torch.stack(rows), rtol=1e-9, atol=1e-9)


def test_generating_encodes_the_words_so_far(registry: Registry) -> None:
    """Would catch a prefix whose tokens are those of another length, and beams that read another image's tokens."""
    recipe = load_recipe("coca_tiny", registry=registry)
    torch.manual_seed(0)
    objective = build_objective(recipe)
    model: Model = models_of(recipe, objective, torch.device("cpu"))["student"]
    images = torch.randint(0, 256, (3, 50, 48, 3), dtype=torch.uint8).numpy()
    decoder, text = objective.heads["decoder"].eval(), model.backbone["text"].eval()
    augment = model.augment["image"]
    expected = []
    for image in images:
        seen = model.features("image", [[augment.eval_view(image)]], tokens_of=(0,))
        ids = torch.tensor([[49406]])
        for _ in range(4):
            given = {"image": seen.view(0), "text": text.encode(ids, tokens=True, token_mask=None)}
            ids = torch.cat([ids, decoder(given, ids)[:, -1].argmax(-1, keepdim=True)], 1)
        expected += text.detokenize(ids)  # type: ignore[operator]
    assert model.generate("image", images, longest=5) == expected
    assert len(set(expected)) > 1


def test_the_recipe_has_the_papers_weights(registry: Registry) -> None:
    """Contrastive 1, captioning 2 (section 4.1)."""
    recipe = load_recipe("coca_tiny", registry=registry)
    assert {slot.id: float(slot.config.weight.source) for slot in recipe.loss} == {"clip": 1.0, "captioning": 2.0}
