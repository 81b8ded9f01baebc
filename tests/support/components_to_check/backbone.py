"""Broken backbones."""

from dataclasses import replace

import numpy as np
import torch
from components_to_check.broken import broken
from components_to_check.good import DeepTower, MaskingTower, Telling, masking_stack
from components_to_check.seeded_backbones import PooledFromDetached, ScalesImages
from my_plugin.tower import Tower, stack
from torch import nn
from torch.nn.functional import dropout

from distill_core.outputs import Encoded
from distill_core.plan import BackboneSpec


@broken("collator", "pickle")
class LambdaCollator(Tower):
    @classmethod
    def collator(cls, config):
        return lambda samples, seeds=(): stack(samples)


def batch_masks(samples, seeds=()):
    views = masking_stack(samples, seeds)
    for group in views.groups:
        draw = torch.Generator().manual_seed(len(samples))
        group.token_mask = torch.rand(group.token_mask.shape, generator=draw) < 0.5
    return views


@broken("collator", "depends on the other samples of its batch")
class BatchMasks(MaskingTower):
    @classmethod
    def collator(cls, config):
        return batch_masks


def random_masks(samples, seeds=()):
    views = masking_stack(samples, seeds)
    for group in views.groups:
        group.token_mask = torch.rand(group.token_mask.shape) < np.random.default_rng().uniform(0.2, 0.8)
    return views


@broken("collator", "draw only from generators of the seeds")
class RandomMasks(MaskingTower):
    @classmethod
    def collator(cls, config):
        return random_masks


@broken("shapes", r"pooled is \[2, 3, 8\], not \[V, B, D\] = \[2, 3, 9\]")
class WrongDim(Tower):
    @classmethod
    def spec(cls, config):
        return BackboneSpec(config.width, config.dim + 1)


@broken("shapes", "has a mask and no tokens|must be bool")
class FloatMask(Tower):
    def encode(self, x, *, tokens, token_mask):
        encoded = super().encode(x, tokens=tokens, token_mask=token_mask)
        return Encoded(encoded.pooled, encoded.tokens, torch.ones(len(x), 4) if tokens else None)


@broken("shapes", r"a batch of no sample \(B = 0\) raises RuntimeError")
class NeedsASample(Tower):
    def encode(self, x, *, tokens, token_mask):
        encoded = super().encode(x, tokens=tokens, token_mask=token_mask)
        encoded.pooled = encoded.pooled.reshape(len(x), 1, -1)[:, 0]
        return encoded


@broken("tokens_of", "return these alone")
class AllTokens(Tower):
    def forward(self, views, *, tokens_of=(), masked=False):
        return super().forward(views, tokens_of=range(len(views)), masked=masked)


@broken("tokens_of", "pooled changes with tokens_of")
class NeedChanges(Tower):
    def encode(self, x, *, tokens, token_mask):
        encoded = super().encode(x, tokens=tokens, token_mask=token_mask)
        encoded.pooled = encoded.pooled + tokens
        return encoded


@broken("independence", "depends on the rest of its batch")
class Centred(Tower):
    def encode(self, x, *, tokens, token_mask):
        encoded = super().encode(x, tokens=tokens, token_mask=token_mask)
        encoded.pooled = encoded.pooled - encoded.pooled.mean(0, keepdim=True)
        return encoded


@broken("hidden_tokens", "token_mask is not used")
class IgnoresMask(MaskingTower):
    def encode(self, x, *, tokens, token_mask):
        return super().encode(x, tokens=tokens, token_mask=None)


@broken("gradients", "no gradient reaches spare")
class Spare(Tower):
    def __init__(self, config):
        super().__init__(config)
        self.spare = nn.Parameter(torch.zeros(3))


@broken("gradients", "carries no gradient")
class NoGrad(Tower):
    def encode(self, x, *, tokens, token_mask):
        with torch.no_grad():
            return super().encode(x, tokens=tokens, token_mask=token_mask)


@broken("state_dict", "state outside of parameters and buffers")
class Unsaved(Tower):
    def __init__(self, config):
        super().__init__(config)
        self.offset = torch.randn(config.dim)

    def encode(self, x, *, tokens, token_mask):
        encoded = super().encode(x, tokens=tokens, token_mask=token_mask)
        encoded.pooled = encoded.pooled + self.offset
        return encoded


@broken("teacher_copy", "deepcopy")
class Caches(Tower):
    def encode(self, x, *, tokens, token_mask):
        encoded = super().encode(x, tokens=tokens, token_mask=token_mask)
        self.last = encoded.pooled
        return encoded


@broken("determinism", "the same weights give different features")
class AlwaysDrops(Tower):
    def encode(self, x, *, tokens, token_mask):
        return super().encode(dropout(x, 0.5, training=True), tokens=tokens, token_mask=token_mask)


@broken("determinism", "the same seed gives different weights")
class OwnSeed(Tower):
    def __init__(self, config):
        super().__init__(config)
        self.position = nn.Parameter(torch.from_numpy(np.random.default_rng().random((4, 16), dtype=np.float32)))


@broken("autocast", "TypeError: Got unsupported ScalarType BFloat16")
class FixedType(Tower):
    def encode(self, x, *, tokens, token_mask):
        encoded = super().encode(x, tokens=tokens, token_mask=token_mask)
        encoded.pooled = encoded.pooled - float(encoded.pooled.detach().numpy().max())
        return encoded


@broken("attention", "sum to more than 1")
class Logits(Telling):
    def class_attention(self, x):
        return super().class_attention(x) * 7


@broken("attention", r"has 3 positions for 4 real tokens")
class ShortLayout(Telling):
    def token_layout(self, view):
        return ["a ", "b ", "c "]


@broken("dense", r"`spec` says dense=\('plain',\), and there is no method `dense`")
class DenseInWordsAlone(MaskingTower):
    @classmethod
    def spec(cls, config):
        return BackboneSpec(config.width, config.dim, dense=("plain",))


@broken("dense", "with plain attention `dense` must return the embedding of `encode`")
class OtherDense(Telling):
    def dense(self, x, *, attention):
        pooled, tokens = super().dense(x, attention=attention)
        return pooled + 1, tokens


@broken("dense", r"`dense` must give \[3, 8\] and \[3, ..., 8\]")
class NoPlaces(Telling):
    def dense(self, x, *, attention):
        pooled, tokens = super().dense(x, attention=attention)
        return pooled, tokens.mean(1)


for component, check, message in (
    (ScalesImages, "inputs_untouched", r"changes views.groups\[0\].x in place"),
    (PooledFromDetached, "true_gradients", "moves by .* and its gradient says 0: something detaches it"),
):
    broken(check, message)(component)


def hashing_stack(samples, seeds=()):
    views = masking_stack(samples, [hash(str(seed)) % 1000 for seed in seeds])
    return views


@broken("processes", "returns different views in another process")
class HashesSeeds(MaskingTower):
    @classmethod
    def collator(cls, config):
        return hashing_stack


@broken("units", "unit 'mlp' has a parameter that is used outside its `forward`")
class DecaysAUnit(Tower):
    def encode(self, x, *, tokens, token_mask):
        encoded = super().encode(x, tokens=tokens, token_mask=token_mask)
        return Encoded(encoded.pooled + 1e-3 * self.mlp[1].weight.square().sum(), encoded.tokens)


@broken("units", "unit 'mlp' is not called in a step")
class EntersByLayers(Tower):
    def encode(self, x, *, tokens, token_mask):
        patches = self.embed(x.unflatten(1, (-1, self.config.patch))) + self.position
        y = patches
        for layer in self.mlp:
            y = layer(y)
        return Encoded(self.project((patches + y).flatten(1)), patches + y if tokens else None)


class Halting(nn.GELU):
    """Not one graph."""

    def forward(self, x):
        return super().forward(x) if x.abs().max().item() < 1e6 else x


@broken("units", r"a unit is not one graph .*components_to_check/backbone\.py:\d+")
class BranchesOnAValue(Tower):
    def __init__(self, config):
        super().__init__(config)
        self.mlp[2] = Halting()


@broken("layers", "two layers give the same tokens")
class HandsTheLastOn(DeepTower):
    def encode_one(self, one):
        encoded = super().encode_one(replace(one, tokens=True))
        return replace(encoded, layers=dict.fromkeys(one.layers, encoded.tokens))


@broken("dropped_tokens", "dropping tokens changes nothing: keep is not used")
class DropsNothing(DeepTower):
    def encode_one(self, one):
        return super().encode_one(replace(one, keep=None))


@broken("dropped_tokens", "keeping every token is not the same as dropping none")
class ScalesWhatIsKept(DeepTower):
    def encode_one(self, one):
        encoded = super().encode_one(one)
        return encoded if one.keep is None else replace(encoded, pooled=1.1 * encoded.pooled)
