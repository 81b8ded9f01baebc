"""Broken losses."""

import torch
from components_to_check.broken import broken
from components_to_check.good import Centred, Fill, ReadsIds
from components_to_check.seeded_losses import (
    CentresTheTeacher,
    GathersWithoutGradient,
    LabelsOfRankZero,
    MeanOverPadding,
    OwnHeadForTargets,
    OwnRowsAlone,
)
from my_plugin.loss import Match
from torch import nn
from wrapping_losses import Ramped

from distill_core.outputs import Fused
from distill_core.plan import Needs
from distill_core.system.distributed import rank


@broken("terms", "the term 'match' must be a 0-dim tensor")
class FloatTerm(Match):
    def forward(self, outputs):
        return {"match": super().forward(outputs)[0]["match"].item()}, {}


@broken("terms", r"the metric\(s\) scale keep the graph")
class AttachedMetric(Match):
    def forward(self, outputs):
        return super().forward(outputs)[0], {"scale": self.log_scale.exp()}


@broken("terms", "is nan for a batch of 1")
class OneSample(Match):
    def forward(self, outputs):
        spread = outputs.fused["left"].embedding.std(1, unbiased=True).mean()
        return {"match": super().forward(outputs)[0]["match"] + spread}, {}


@broken("terms", r"ValueError: rows must come in fours \(loss.py:")
class NeedsFourRows(Match):
    """Refuses floats and integer ids alike: its own error is the finding, with the line that raised it."""

    def forward(self, outputs):
        if next(iter(outputs.student.values())).pooled.shape[1] % 4:
            raise ValueError("rows must come in fours")
        return super().forward(outputs)


@broken("terms", "KeyError: 'third'")
class ReadsAMissingModality(Match):
    """An error that no dtype of the inputs explains is not taken for a wrong one."""

    def forward(self, outputs):
        return {"match": outputs.student["third"].pooled.sum()}, {}


@broken("gradients", "no gradient reaches the student")
class DetachedLoss(Match):
    def forward(self, outputs):
        outputs.fused = {name: Fused(f.pooled.detach()) for name, f in outputs.fused.items()}
        return super().forward(outputs)


@broken("embeddings", "no gradient reaches the embedding of left: leave it out of Needs.embeddings")
class TrainsNoEmbedding(ReadsIds):
    @classmethod
    def needs(cls, config, plan):
        return Needs(student=("left",), tokens={"left": (0,)})


@broken("embeddings", "it trains the embedding of left: name it in Needs.embeddings")
class TrainsAnother(Centred):
    @classmethod
    def needs(cls, config, plan):
        return Needs(teacher={"default": {"left": ()}}, embeddings=())


@broken("purity", "`forward` changes calls|changes when `forward` is called again")
class Counts(Match):
    def __init__(self, config, plan):
        super().__init__(config, plan)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs):
        self.calls += 1
        return super().forward(outputs)


@broken("after_step", "its state is not finite after")
class Explodes(Match):
    @torch.no_grad()
    def after_step(self, outputs, progress):
        self.log_scale.fill_(torch.inf)


@broken("after_step", "state outside of parameters and buffers")
class UnsavedCentre(Match):
    centre = 0.0

    def forward(self, outputs):
        return {"match": super().forward(outputs)[0]["match"] + self.centre}, {}

    def after_step(self, outputs, progress):
        self.centre = outputs.teacher["default"]["left"].embedding.sum()


@broken("teacher_modules", "the loss has no module of that name")
class NamesNothing(Fill):
    teacher_modules = ("heads",)

    def __init__(self, config, plan):
        super().__init__(config, plan)
        self.heads = None


@broken("teacher_modules", "return Needs")
class Teacherless(Match):
    teacher_modules = ("head",)

    def __init__(self, config, plan):
        super().__init__(config, plan)
        self.head = nn.Linear(2, 2)

    @classmethod
    def needs(cls, config, plan):
        return Needs(fused=config.modalities)


@broken("masked_tokens", "is nan where no token is masked")
class EmptyMean(Fill):
    def mean(self, errors, mask):
        return errors[mask].mean()


@broken("absence", "have other terms than all samples in one process: own rows begin at Rows.offset")
class CountsRowsByRank(Centred):
    partial = True

    def forward(self, outputs):
        terms, metrics = super().forward(outputs)
        rows = outputs.student["left"].rows[:1]
        logits = rows.embedding[0] @ rows.gathered[0].T
        own = (rank() * len(logits) + torch.arange(len(logits))).clamp(max=logits.shape[1] - 1)
        return {"distance": terms["distance"] + nn.functional.cross_entropy(logits, own)}, metrics

    def after_step(self, outputs, progress):
        pass


@broken("absence", "hold another state than one process: means over ranks heed outputs.weight")
class WeighsRanksAlike(Centred):
    partial = True


@broken("autocast", "TypeError")
class Numpy(Match):
    def forward(self, outputs):
        spread = float(outputs.teacher["default"]["left"].pooled.numpy().std())
        return {"match": super().forward(outputs)[0]["match"] + spread}, {}


@broken("autocast", "compute logits in fp32")
class HalfLogits(Match):
    def forward(self, outputs):
        raw = outputs.teacher["default"]["left"].pooled
        return {"match": super().forward(outputs)[0]["match"] + (raw.dtype == torch.bfloat16)}, {}


@broken("gathers", r"reads `gathered` of outputs.teacher\['default'\]\['left'\] \(view 0\), .*\['right'\] .* not name")
class NamesNoRows(Match):
    def gathers(self, outputs):
        return ()


@broken("gathers", r"`gathers` names outputs.fused\['left'\] \(view 0, 1\), whose `gathered` is not read: they travel")
class NamesWhatItDoesNotRead(Match):
    def gathers(self, outputs):
        return [*super().gathers(outputs), outputs.fused["left"].rows[:2]]


@broken("gathers", r"names outputs.teacher\['default'\]\['left'\] \(view 1\), .*\['right'\] \(view 1\), whose")
class NamesAllViews(Match):
    def gathers(self, outputs):
        return [outputs.teacher["default"][modality].rows for modality in self.config.modalities]


@broken("gathers", r"reads `gathered` of outputs.student\['left'\] \(view 0, 1")
class ReadsAfterTheStep(Match):
    def after_step(self, outputs, progress):
        self.seen = outputs.student["left"].gathered.detach().mean()


for component, check, message in (
    (CentresTheTeacher, "inputs_untouched", r"changes outputs.teacher\['default'\]\['left'\].pooled in place"),
    (MeanOverPadding, "padding", "padded tokens change the term"),
    (OwnHeadForTargets, "teacher_targets", "do not depend on the teacher's copy of 'head'"),
    (LabelsOfRankZero, "ranks", "the same rows give different terms on another rank"),
    (OwnRowsAlone, "ranks", "is not the term of all their rows: compare with `gathered`"),
    (GathersWithoutGradient, "ranks", "gradient differs between two ranks and one process"),
):
    broken(check, message)(component)


@broken("units", "a unit is not one graph")
class ReadsItsTerm(Match):
    def forward(self, outputs):
        terms, metrics = super().forward(outputs)
        return ({"match": -terms["match"]}, metrics) if terms["match"].item() > 1e6 else (terms, metrics)


class Wrapper(Ramped):
    name = "wrapper"
    examples = ({"inner": {"name": "contrastive"}},)


@broken("nested", "the option `weight` of the loss 'inner' changes no term")
class DropsTheInnerWeight(Wrapper):
    def forward(self, outputs):
        return self.inner(outputs)


@broken("nested", "must be the module of that path: self.inner")
class HidesTheInnerLoss(Wrapper):
    def __init__(self, config, plan):
        super().__init__(config, plan)
        self.elsewhere = self.inner
        del self.inner

    def forward(self, outputs):
        return self.elsewhere.weighted(outputs)


@broken("nested", "`after_step` does not call that of the loss 'inner'")
class StillsTheInnerLoss(Wrapper):
    def after_step(self, outputs, progress):
        return


@broken("gathers", "which `gathers` does not name")
class GathersNothing(Wrapper):
    def gathers(self, outputs):
        return ()
