from torch import nn

from distill_core import Fused, FusionHead, Loss, Needs, same_dim


class MaxPooling(FusionHead):
    """normalise(pooled + map(the largest of the next modality's tokens, feature by feature))."""

    name = "max_pooling"

    def __init__(self, config, plan):
        super().__init__(config, plan)
        self.map = nn.ModuleDict({m: nn.Linear(p.spec.width, p.spec.dim) for m, p in plan.modalities.items()})

    @classmethod
    def needs(cls, config, plan):
        return Needs(tokens=dict.fromkeys(plan.modalities, (0,)))

    @classmethod
    def problems(cls, config, plan):
        return same_dim(cls.name, tuple(plan.modalities), plan)

    def forward(self, features):
        pairs = zip(here := list(features.items()), here[1:] + here[:1], strict=True)
        fused = {m: self.pool(n, f.pooled, g.tokens[0], g.masks.get(0)) for (m, f), (n, g) in pairs}
        return {m: Fused(nn.functional.normalize(x.float(), dim=-1)) for m, x in fused.items()}

    def pool(self, modality, queries, tokens, mask=None):
        real = tokens if mask is None else tokens.masked_fill(~mask[..., None], -1e4)  # [B, L, W]
        return queries + self.map[modality](real.amax(1))


class FusedAgreement(Loss):
    """Mean of 1 - cosine of each fused view and the teacher's first view of its modality."""

    name = "fused_agreement"

    @classmethod
    def needs(cls, config, plan):
        return Needs(teacher={"default": dict.fromkeys(plan.modalities, ())}, fused=tuple(plan.modalities))

    @classmethod
    def problems(cls, config, plan):
        return same_dim(cls.name, tuple(plan.modalities), plan, "default")

    def forward(self, outputs):
        pairs = [(outputs.fused[m].embedding, f.embedding[:1]) for m, f in outputs.teacher["default"].items()]
        return {"agreement": sum((1 - (x * y).sum(-1)).mean() for x, y in pairs) / len(pairs)}, {}
