from torch import nn, pdist
from torch.nn.functional import normalize

from distill_core.contracts.task import Task, TaskConfig
from distill_core.errors import DataError
from distill_core.evaluate.score import Score, mean_over_sets
from distill_core.interfaces import FusionHead, Loss, LossConfig
from distill_core.outputs import Fused
from distill_core.plan import Needs, same_dim


class TokenMean(FusionHead):
    """fused[m] = normalise(pooled[m] + map(mean of the next modality's tokens of view 0))."""

    name = "token_mean"

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
        here = list(features.items())
        pairs = zip(here, here[1:] + here[:1], strict=True)
        fused = {m: self.pool(n, f.pooled, g.tokens[0], g.masks.get(0)) for (m, f), (n, g) in pairs}
        return {m: Fused(normalize(x.float(), dim=-1)) for m, x in fused.items()}

    def pool(self, modality, queries, tokens, mask=None):
        real = tokens.new_ones(tokens.shape[:2]) if mask is None else mask.to(tokens.dtype)
        mean = (tokens * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return queries + self.map[modality](mean)


class AgreementConfig(LossConfig):
    power: float = 1.0
    """Exponent of the distance."""


class Agreement(Loss):
    """Mean of (1 - cosine(student view, its fused view)) ** power."""

    name = "agreement"
    Config = AgreementConfig

    @classmethod
    def needs(cls, config, plan):
        return Needs(fused=tuple(plan.modalities))

    def forward(self, outputs):
        cosine = sum((outputs.student[m].embedding * outputs.fused[m].embedding).sum(-1).mean()
                     for m in outputs.student) / len(outputs.student)  # fmt: skip
        return {"agreement": (1 - cosine) ** self.config.power}, {"cosine": cosine.detach()}


class Uniformity(Task):
    """log mean exp(-2 d^2) over the pairs of a set's embeddings, d their distance (Wang and Isola 2020, section 4)."""

    name = "uniformity"
    Config = TaskConfig

    def run(self, model, sets):
        scores = []
        for samples in sets:
            embedded, _ = samples.embeddings(model, model.modalities[0])
            if len(embedded) < 2:
                raise DataError(f"evaluation set {samples.name!r}: no two samples to compare")
            value = pdist(embedded.double()).square().mul(-2).exp().mean().log().item()
            scores.append(Score(samples.name, "spread", value, "nats", higher_is_better=False, headline=True))
        return [*scores, *mean_over_sets(scores)]
