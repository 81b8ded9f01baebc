"""Broken fusions."""

import torch
from components_to_check.broken import broken
from components_to_check.seeded_fusions import ClearsPadding, ExactlyTwo
from components_to_check.seeded_later import WrongBackward
from my_plugin.fusion import MeanFusion
from torch.nn.functional import normalize

from distill_core.outputs import Fused


@broken("shapes", r"a batch of no sample \(B = 0\) raises RuntimeError: amax")
class FusesASample(MeanFusion):
    def pool(self, modality, queries, tokens, mask=None):
        return super().pool(modality, queries, tokens, mask) + 0 * tokens.amax()


@broken("shapes", "is not L2-normalised")
class NotNormalised(MeanFusion):
    def forward(self, features):
        return {name: Fused(f.pooled + self.map[name](f.tokens[0].mean(1))) for name, f in features.items()}


@broken("shapes", r"returns no 'second'")
class OneSided(MeanFusion):
    def forward(self, features):
        fused = super().forward(features)
        del fused["second"]
        return fused


@broken("shapes", r"KeyError: 1.*add what the component reads")
class ReadsMore(MeanFusion):
    def forward(self, features):
        return {name: Fused(normalize(f.tokens[1].mean(1), dim=-1)[None]) for name, f in features.items()}


@broken("masks", "padded tokens change the result")
class IgnoresPadding(MeanFusion):
    def pool(self, modality, queries, tokens, mask=None):
        return super().pool(modality, queries, tokens)


@broken("attention", "padded tokens have attention weights")
class AttentionIgnoresPadding(MeanFusion):
    def attention(self, modality, queries, tokens, mask=None):
        return super().attention(modality, queries, tokens)


@broken("attention", r"attention is \[3, 1, 6\], not")
class OneQuery(MeanFusion):
    def attention(self, modality, queries, tokens, mask=None):
        return super().attention(modality, queries, tokens, mask)[0]


@broken("pool", "lets padded tokens")
class PoolIgnoresPadding(IgnoresPadding):
    pass


@broken("pool", r"`pool` returns \[3, 32\], not \[1, 3, 32\]")
class PoolSums(MeanFusion):
    def pool(self, modality, queries, tokens, mask=None):
        return super().pool(modality, queries, tokens, mask).sum(0)


@broken("gradients", "no gradient reaches map.second.weight, map.second.bias")
class OneWay(MeanFusion):
    def pool(self, modality, queries, tokens, mask=None):
        return queries if modality == "second" else super().pool(modality, queries, tokens, mask)


@broken("gradients", "no finite gradient reaches the features")
class Detaches(MeanFusion):
    def pool(self, modality, queries, tokens, mask=None):
        return super().pool(modality, queries.detach(), tokens.detach(), mask)


@broken("state_dict", "state outside of parameters and buffers")
class UnsavedFusion(MeanFusion):
    def __init__(self, config, plan):
        super().__init__(config, plan)
        self.offset = torch.randn(32)

    def pool(self, modality, queries, tokens, mask=None):
        return super().pool(modality, queries, tokens, mask) + self.offset


@broken("copied", "deepcopy")
class CachesFused(MeanFusion):
    def forward(self, features):
        self.last = super().forward(features)
        return self.last


@broken("autocast", "TypeError: Got unsupported ScalarType BFloat16")
class FixedTypeFusion(MeanFusion):
    def pool(self, modality, queries, tokens, mask=None):
        found = super().pool(modality, queries, tokens, mask)
        return found - float(self.map[modality](tokens).detach().numpy().max())


for component, check, message in (
    (ExactlyTwo, "shapes", "too many values to unpack.*on a plan with one modality more, which `needs` and `problems`"),
    (ClearsPadding, "inputs_untouched", r"changes features\['first'\].tokens\[0\] in place"),
    (WrongBackward, "true_gradients", "moves by .* and its gradient says .*a backward pass is wrong"),
):
    broken(check, message)(component)


@broken("units", "a unit is not one graph")
class ReadsAnEmbedding(MeanFusion):
    def forward(self, features):
        fused = super().forward(features)
        assert all(x.pooled.norm().item() >= 0 for x in fused.values())
        return fused
