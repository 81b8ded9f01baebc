"""Losses with a bug each."""

import copy

import torch
import torch.distributed as dist
from components_to_check.good import Centred, Fill, ReadsIds, TokenMatch
from components_to_check.seeded import seeded
from my_plugin.loss import Match
from torch.nn.functional import cross_entropy

from distill_core.plan import Needs


@seeded("gradient into the teacher")
class OwnHeadForTargets(Fill):
    def forward(self, outputs):
        found, metrics = super().forward(outputs)
        goal = self.head(outputs.teacher["default"]["signal"].pooled[0].float()).softmax(-1)
        mine = self.head(outputs.student["signal"].pooled[1].float()).log_softmax(-1)
        return {**found, "head": -(goal * mine).sum(-1).mean()}, metrics


@seeded("gradient into the teacher")
class ThawsTheTeachersHead(Fill):
    def forward(self, outputs):
        outputs.ema(self.head).requires_grad_(True)
        return super().forward(outputs)


@seeded("gradient into the teacher")
class ThawsTheTeachersFeatures(Match):
    def forward(self, outputs):
        for features in outputs.teacher["default"].values():
            features.pooled.requires_grad_(True)
        return super().forward(outputs)


@seeded("gradient into the teacher")
class OwnCopyOfTheHead(Fill):
    """The targets' head is a copy of its own, made once, which never moves."""

    def __init__(self, config, plan):
        super().__init__(config, plan)
        self.frozen = [copy.deepcopy(self.head).requires_grad_(False)]

    def forward(self, outputs):
        found, metrics = super().forward(outputs)
        goal = self.frozen[0](outputs.teacher["default"]["signal"].pooled[0].float()).softmax(-1)
        mine = self.head(outputs.student["signal"].pooled[1].float()).log_softmax(-1)
        return {**found, "head": -(goal * mine).sum(-1).mean()}, metrics


@seeded("in-place change")
class NormalizesTheMemo(Match):
    def forward(self, outputs):
        with torch.no_grad():
            outputs.teacher["default"]["left"].gathered.mul_(self.log_scale.exp())
        return super().forward(outputs)


@seeded("in-place change")
class CentresTheTeacher(Match):
    def forward(self, outputs):
        for features in outputs.teacher["default"].values():
            features.pooled -= features.pooled.mean(1, keepdim=True)
        return super().forward(outputs)


@seeded("in-place change")
class ZeroesMaskedTokens(Fill):
    def forward(self, outputs):
        group = outputs.views["signal"].groups[0]
        group.targets[~group.token_mask] = 0
        return super().forward(outputs)


@seeded("in-place change")
class DropsTheTeacherFromOutputs(Match):
    def forward(self, outputs):
        found = super().forward(outputs)
        outputs.teacher = {}
        return found


@seeded("in-place change")
class AfterStepScalesTheStudent(Match):
    @torch.no_grad()
    def after_step(self, outputs, progress):
        super().after_step(outputs, progress)
        outputs.student["left"].pooled.mul_(0.5)


@seeded("undeclared needs")
class ReadsClassTokens(Match):
    def forward(self, outputs):
        found, metrics = super().forward(outputs)
        return {**found, "class": outputs.student["left"].class_tokens[..., 0, :].square().mean()}, metrics


@seeded("undeclared needs")
class TeacherOfAnotherModality(Match):
    @classmethod
    def needs(cls, config, plan):
        return Needs(teacher={"default": dict.fromkeys(config.modalities[:1], ())}, fused=config.modalities)


@seeded("undeclared needs")
class ReadsLocalViews(Match):
    def forward(self, outputs):
        found, metrics = super().forward(outputs)
        local = outputs.student["left"].embedding[2]
        return {
            **found,
            "local": (1 - (local * outputs.teacher["default"]["left"].embedding[0]).sum(-1)).mean(),
        }, metrics


@seeded("undeclared needs")
class ReadsTeacherTokens(Match):
    def forward(self, outputs):
        found, metrics = super().forward(outputs)
        if 0 in outputs.teacher["default"]["left"].tokens:
            found["token"] = outputs.teacher["default"]["left"].tokens[0].mean() * self.log_scale
        else:
            found["token"] = outputs.teacher["default"]["left"].class_tokens.mean() * self.log_scale
        return found, metrics


@seeded("undeclared needs")
class CallsTheFusion(TokenMatch):
    def forward(self, outputs):
        found, metrics = super().forward(outputs)
        tokens = outputs.student["left"].tokens[0]
        queries = outputs.student["left"].pooled
        pooled = outputs.fusion.pool("left", queries, tokens, outputs.student["left"].masks.get(0))
        return {**found, "pooled": pooled.square().mean()}, metrics


@seeded("padding")
class MeanOverPadding(TokenMatch):
    def mean(self, tokens, mask):
        return tokens.mean(1)


@seeded("padding")
class PaddingInOneModality(TokenMatch):
    def mean(self, tokens, mask):
        self.calls = getattr(self, "calls", 0) + 1
        return super().mean(tokens, mask if self.calls % 2 == 0 else None)


@seeded("padding")
class MaxOverPadding(TokenMatch):
    def forward(self, outputs):
        found, metrics = super().forward(outputs)
        return {**found, "peak": sum(f.tokens[0].amax(1).square().mean() for f in outputs.student.values())}, metrics


@seeded("unequal W and D")
class OneWidthForAll(TokenMatch):
    def __init__(self, config, plan):
        super().__init__(config, plan)
        left = self.map["left"]
        self.map["right"] = torch.nn.Linear(left.in_features, left.out_features)


@seeded("two ranks")
class LabelsOfRankZero(Match):
    def forward(self, outputs):
        a, b = self.config.modalities
        queries, keys = outputs.fused[a].embedding[0], outputs.teacher["default"][b].gathered[0]
        return {"match": cross_entropy(self.log_scale.exp() * queries @ keys.T, torch.arange(len(queries)))}, {}


@seeded("two ranks")
class OwnRowsAlone(Match):
    def forward(self, outputs):
        a, b = self.config.modalities
        queries, keys = outputs.fused[a].embedding[0], outputs.teacher["default"][b].embedding[0]
        return {"match": cross_entropy(self.log_scale.exp() * queries @ keys.T, torch.arange(len(queries)))}, {}


@seeded("two ranks")
class CentreOfThisRank(Centred):
    def move(self, mean):
        self.centre.lerp_(mean, 0.1)


@seeded("two ranks")
class GathersWithoutGradient(TokenMatch):
    def gather(self, x):
        if not dist.is_initialized():
            return x
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.detach().contiguous())
        return torch.cat(parts)


@seeded("missing gradient")
class DeadTerm(Match):
    def forward(self, outputs):
        found, metrics = super().forward(outputs)
        return {**found, "spread": outputs.fused["left"].embedding.detach().std()}, metrics


@seeded("missing gradient")
class OneSideDetached(TokenMatch):
    def forward(self, outputs):
        last = outputs.student[list(outputs.student)[-1]]
        last.tokens[0], kept = last.tokens[0].detach(), last.tokens[0]
        found = super().forward(outputs)
        last.tokens[0] = kept
        return found


@seeded("nondeterminism")
class ReseedsTorch(Match):
    def forward(self, outputs):
        torch.manual_seed(0)
        return super().forward(outputs)


@seeded("state not in state_dict")
class PythonCentre(Centred):
    def __init__(self, config, plan):
        super().__init__(config, plan)
        del self.centre
        self.centre = torch.zeros(plan.modalities["left"].spec.dim)


@seeded("gradient where it may not go")
class CentreWithGraph(Centred):
    def after_step(self, outputs, progress):
        self.centre = 0.9 * self.centre + 0.1 * outputs.student["left"].embedding[0].mean(0)


@seeded("gradient where it may not go")
class ClampsInTheGraph(Match):
    def after_step(self, outputs, progress):
        self.log_scale.clamp_(0.0, 4.6)


@seeded("gradient where it may not go")
class RunsBackward(Match):
    def forward(self, outputs):
        found, metrics = super().forward(outputs)
        found["match"].backward(retain_graph=True)
        return found, metrics


@seeded("wrong shape or dtype")
class TermInHalf(Match):
    def forward(self, outputs):
        found, metrics = super().forward(outputs)
        return {"match": found["match"].half()}, metrics


@seeded("wrong shape or dtype")
class TermsOfEachSample(Match):
    def forward(self, outputs):
        found, metrics = super().forward(outputs)
        return {"match": found["match"].expand(3)}, metrics


@seeded("extra modality")
class ThreeAreOneTooMany(TokenMatch):
    def forward(self, outputs):
        (_, _), (_, _) = outputs.student.items()
        return super().forward(outputs)


@seeded("in-place change")
class IdsFromOne(ReadsIds):
    def forward(self, outputs):
        outputs.views["left"].groups[0].x -= 1
        return super().forward(outputs)
