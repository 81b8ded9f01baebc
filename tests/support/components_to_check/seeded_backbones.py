"""Backbones with a bug each."""

import torch
from components_to_check.good import MaskingTower, Words, pad
from components_to_check.seeded import seeded
from my_plugin.tower import Tower, stack

from distill_core.batch import Views
from distill_core.outputs import Encoded


@seeded("padding")
class ReadsPadding(Words):
    def mean(self, sequence, real):
        return sequence.mean(1)


@seeded("padding")
class TokensMixWithPadding(Words):
    def encode(self, x, *, tokens, token_mask):
        encoded = super().encode(x, tokens=tokens, token_mask=token_mask)
        if tokens:
            encoded.tokens = encoded.tokens - encoded.tokens.mean(1, keepdim=True)
        return encoded


@seeded("padding")
class MaskTurnedRound(Words):
    def encode(self, x, *, tokens, token_mask):
        encoded = super().encode(x, tokens=tokens, token_mask=token_mask)
        if tokens:
            encoded.mask = torch.ones_like(encoded.mask)
        return encoded


@seeded("in-place change")
class ScalesImages(Tower):
    def encode(self, x, *, tokens, token_mask):
        return super().encode(x.div_(2), tokens=tokens, token_mask=token_mask)


@seeded("in-place change")
class ClearsTokenMask(MaskingTower):
    def encode(self, x, *, tokens, token_mask):
        encoded = super().encode(x, tokens=tokens, token_mask=token_mask)
        if token_mask is not None:
            token_mask.zero_()
        return encoded


def centring_stack(samples, seeds=()):
    for views in samples:
        for view in views:
            view.data.sub_(view.data.mean())
    return stack(samples, seeds)


@seeded("in-place change")
class CollatorCentres(Tower):
    @classmethod
    def collator(cls, config):
        return centring_stack


@seeded("gradient into the teacher")
class GradientInTheCopy(Tower):
    def encode(self, x, *, tokens, token_mask):
        with torch.enable_grad():
            return super().encode(x.requires_grad_(), tokens=tokens, token_mask=token_mask)


@seeded("gradient into the teacher")
class CopySharesTheProjection(Tower):
    def __init__(self, config):
        super().__init__(config)
        project = self.project
        self.last = [lambda x: project(x)]

    def encode(self, x, *, tokens, token_mask):
        patches = self.embed(x.unflatten(1, (-1, self.config.patch))) + self.position
        sequence = patches + self.mlp(patches)
        return Encoded(self.last[0](sequence.flatten(1)), sequence if tokens else None)


@seeded("missing gradient")
class PooledFromDetached(Tower):
    def encode(self, x, *, tokens, token_mask):
        encoded = super().encode(x, tokens=True, token_mask=token_mask)
        pooled = self.project(encoded.tokens.detach().flatten(1))
        return Encoded(pooled, encoded.tokens if tokens else None)


@seeded("wrong shape or dtype")
class PooledInBf16(Tower):
    def encode(self, x, *, tokens, token_mask):
        encoded = super().encode(x, tokens=tokens, token_mask=token_mask)
        encoded.pooled = encoded.pooled.bfloat16()
        return encoded


def reversed_stack(samples, seeds=()):
    views = stack(samples, seeds)
    return Views(views.groups[::-1])


@seeded("roles not together")
class LocalGroupFirst(Tower):
    @classmethod
    def collator(cls, config):
        return reversed_stack


@seeded("nondeterminism")
class DropsInEvaluation(Words):
    def mean(self, sequence, real):
        return torch.nn.functional.dropout(super().mean(sequence, real), 0.1, training=True)


def longest_first(samples, seeds=()):
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i][0].data))
    return pad([samples[i] for i in order], seeds)


@seeded("wrong shape or dtype")
class SortsByLength(Words):
    @classmethod
    def collator(cls, config):
        return longest_first


@seeded("state not in state_dict")
class ForgottenBuffer(Tower):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("shift", torch.zeros(config.dim), persistent=False)

    def encode(self, x, *, tokens, token_mask):
        encoded = super().encode(x, tokens=tokens, token_mask=token_mask)
        if self.training:
            self.shift = self.shift * 0.5 + encoded.pooled.detach().mean(0) * 0.5
        encoded.pooled = encoded.pooled - self.shift
        return encoded
