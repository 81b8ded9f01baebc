"""Features of all modalities -> fused embeddings."""

from torch import nn
from torch.nn.functional import normalize

from distill_core import Fused, FusionHead, Needs


class MeanFusion(FusionHead):
    """fused[m] = normalise(pooled[m] + map(mean token of the next modality's first view))."""

    name = "my_plugin_mean"

    def __init__(self, config, plan):
        super().__init__(config, plan)
        self.map = nn.ModuleDict({name: nn.Linear(m.spec.width, m.spec.dim) for name, m in plan.modalities.items()})

    @classmethod
    def needs(cls, config, plan):
        """Tokens of view 0 of every modality; what is not asked for is not computed."""
        return Needs(tokens=dict.fromkeys(plan.modalities, (0,)))

    @classmethod
    def problems(cls, config, plan):
        """Said before any data or weights are touched."""
        if len({m.spec.dim for m in plan.modalities.values()}) > 1:
            yield "'my_plugin_mean' needs backbones of one embedding width D"

    def forward(self, features):
        """pooled [V, B, D] of each modality, L2-normalised."""
        names = list(features)
        fused = {}
        for name, other in zip(names, names[1:] + names[:1], strict=True):
            tokens_of = features[other]
            fused[name] = self.pool(other, features[name].pooled, tokens_of.tokens[0], tokens_of.masks.get(0))
        return {name: Fused(normalize(x.float(), dim=-1)) for name, x in fused.items()}

    def pool(self, modality, queries, tokens, mask=None):
        """queries [V, B, D], tokens [B, L, W], mask [B, L] (True where a token is real) -> [V, B, D]."""
        mean = (tokens * self.weights(tokens, mask)[..., None]).sum(1)
        return queries + self.map[modality](mean)

    def attention(self, modality, queries, tokens, mask=None):
        """What `distill attend` draws: weights [V, B, 1, L], the same for each query. Optional."""
        return self.weights(tokens, mask)[None, :, None].expand(len(queries), -1, -1, -1)

    def weights(self, tokens, mask):
        """[B, L]: one divided by the number of real tokens."""
        real = tokens.new_ones(tokens.shape[:2]) if mask is None else mask.to(tokens.dtype)
        return real / real.sum(1, keepdim=True)
