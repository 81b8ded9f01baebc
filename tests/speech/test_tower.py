"""The tower over spectrograms."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv1d, gelu, layer_norm

from distill_core.errors import RecipeErrors
from distill_core.interfaces import TowerInput
from distill_core.recipe.resolve import parse_recipe
from distill_core.registry import Registry
from distill_speech.tower import SpeechTransformer

OPTIONS = {"mels": 6, "frames": 12, "patch": 3, "width": 16, "layers": 2, "heads": 2, "dim": 10}


def test_by_an_independent_transcription() -> None:
    """Stem, class token, positions, blocks, projection, written out with torch's own layers. Catches frames in place of
    bands, positions of other steps, and an embedding that is not the class token's."""
    torch.manual_seed(0)
    tower = SpeechTransformer(SpeechTransformer.Config(**OPTIONS)).double().eval()
    x = torch.randn(5, 6, 12, dtype=torch.float64)
    steps = gelu(conv1d(x, tower.conv1.weight, tower.conv1.bias, padding=1))
    steps = gelu(conv1d(steps, tower.conv2.weight, tower.conv2.bias, stride=3)).transpose(1, 2)
    assert steps.shape == (5, 4, 16)
    h = torch.cat([tower.class_embedding.expand(5, 1, 16), steps], 1) + tower.positional_embedding
    h = layer_norm(h, (16,), tower.ln_pre.weight, tower.ln_pre.bias)
    layers = []
    for block in tower.transformer.resblocks:
        a = layer_norm(h, (16,), block.ln_1.weight, block.ln_1.bias)
        q, k, v = (a @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        h = h + mixed @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
        m = layer_norm(h, (16,), block.ln_2.weight, block.ln_2.bias)
        m = gelu(m @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias)
        h = h + m @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias
        layers.append(h[:, 1:])
    out = layer_norm(h, (16,), tower.ln_post.weight, tower.ln_post.bias)
    (encoded,) = tower.encode_together([TowerInput(x, tokens=True, layers=(0,))])
    torch.testing.assert_close(encoded.pooled, out[:, 0] @ tower.proj)
    torch.testing.assert_close(encoded.tokens, out[:, 1:])
    torch.testing.assert_close(encoded.layers[0], layers[0])


def test_spectrograms_of_another_size_are_refused(registry: Registry) -> None:
    text = """
augment: {speech: {name: log_mel, mels: 64, seconds: 2.0}, text: {name: caption}}
backbone: {speech: {name: speech_transformer, mels: 80, frames: 200}, text: {name: clip_text}}
loss: [{name: clip, modalities: [speech, text]}]
data: {source: {name: webdataset, urls: x.tar}}
train: {steps: 1}
"""
    with pytest.raises(RecipeErrors) as caught:
        parse_recipe(text, "r.yaml", registry=registry)
    assert "reads 80 mels x 200 frames; the views are 64 x 200" in str(caught.value)
