"""Fusions with a bug each."""

from components_to_check.seeded import seeded
from my_plugin.fusion import MeanFusion
from torch import nn
from torch.nn.functional import normalize

from distill_core.outputs import Fused
from distill_core.plan import Needs


@seeded("extra modality")
class ExactlyTwo(MeanFusion):
    def forward(self, features):
        (a, x), (b, y) = features.items()
        fused = {
            a: self.pool(b, x.pooled, y.tokens[0], y.masks.get(0)),
            b: self.pool(a, y.pooled, x.tokens[0], x.masks.get(0)),
        }
        return {name: Fused(normalize(x.float(), dim=-1)) for name, x in fused.items()}


@seeded("extra modality")
class FirstTwoAlone(MeanFusion):
    def forward(self, features):
        return super().forward(dict(list(features.items())[:2]))


@seeded("unequal W and D")
class WidthOfTheFirst(MeanFusion):
    def __init__(self, config, plan):
        super().__init__(config, plan)
        first = next(iter(plan.modalities.values())).spec
        self.map = nn.ModuleDict({name: nn.Linear(first.width, first.dim) for name in plan.modalities})


@seeded("unequal W and D")
class AnyDim(MeanFusion):
    @classmethod
    def problems(cls, config, plan):
        return ()


@seeded("padding")
class PaddingOfTheFirst(MeanFusion):
    def pool(self, modality, queries, tokens, mask=None):
        return super().pool(modality, queries, tokens, None if modality == next(iter(self.map)) else mask)


@seeded("padding")
class PadsInForward(MeanFusion):
    def forward(self, features):
        names = list(features)
        fused = {
            mine: self.pool(other, features[mine].pooled, features[other].tokens[0])
            for mine, other in zip(names, names[1:] + names[:1], strict=True)
        }
        return {name: Fused(normalize(x.float(), dim=-1)) for name, x in fused.items()}


@seeded("in-place change")
class ScalesPooled(MeanFusion):
    def forward(self, features):
        for f in features.values():
            f.pooled.data.mul_(2)
        return super().forward(features)


@seeded("in-place change")
class ClearsPadding(MeanFusion):
    def pool(self, modality, queries, tokens, mask=None):
        if mask is not None:
            tokens.data[~mask] = 0
        return super().pool(modality, queries, tokens, mask)


@seeded("in-place change")
class PopsTokens(MeanFusion):
    def forward(self, features):
        found = super().forward(features)
        for f in features.values():
            f.tokens.clear()
        return found


@seeded("undeclared needs")
class UsesClassTokens(MeanFusion):
    def pool(self, modality, queries, tokens, mask=None):
        return super().pool(modality, queries, tokens, mask)

    def forward(self, features):
        for f in features.values():
            assert f.class_tokens.ndim == 4
        return super().forward(features)


@seeded("undeclared needs")
class ReadsTheSecondView(MeanFusion):
    @classmethod
    def needs(cls, config, plan):
        return Needs(tokens={name: (0, 1) for name, m in plan.modalities.items() if len(m.roles) > 1})


@seeded("undeclared needs")
class NeedsTokensOfOne(MeanFusion):
    @classmethod
    def needs(cls, config, plan):
        return Needs(tokens=dict.fromkeys(list(plan.modalities)[:1], (0,)))


@seeded("missing gradient")
class DetachesTokens(MeanFusion):
    def pool(self, modality, queries, tokens, mask=None):
        return super().pool(modality, queries, tokens.detach(), mask)


@seeded("missing gradient")
class DetachesQueries(MeanFusion):
    def forward(self, features):
        names = list(features)
        fused = {
            mine: self.pool(
                other, features[mine].pooled.detach(), features[other].tokens[0], features[other].masks.get(0)
            )
            for mine, other in zip(names, names[1:] + names[:1], strict=True)
        }
        return {name: Fused(normalize(x.float(), dim=-1)) for name, x in fused.items()}


@seeded("wrong shape or dtype")
class FusedInDouble(MeanFusion):
    def forward(self, features):
        return {name: Fused(f.pooled.double()) for name, f in super().forward(features).items()}


@seeded("state not in state_dict")
class RunningMean(MeanFusion):
    mean = 0.0

    def pool(self, modality, queries, tokens, mask=None):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * float(tokens.detach().std())
        return super().pool(modality, queries, tokens, mask) + self.mean
