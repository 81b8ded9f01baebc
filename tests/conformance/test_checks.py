"""Each check fails on a component that is broken in just the way it is for, and says what to mend."""

import importlib
import inspect
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from my_plugin.data import Waves
from my_plugin.evaluation import Agreement
from my_plugin.fusion import MeanFusion
from my_plugin.loss import Match, MatchConfig
from my_plugin.schedule import Linear
from my_plugin.tower import Tower, stack
from my_plugin.views import Noisy
from pydantic import Field
from torch import nn
from torch.nn.functional import dropout, normalize

from distill_core.components import (
    INTERFACES,
    ComponentConfig,
    Dims,
    Initializer,
    Loaded,
    Loss,
    LossConfig,
    Needs,
    Optimizer,
    Tracker,
)
from distill_core.conformance import assert_conforms, check, checks_of, report
from distill_core.errors import UserError
from distill_core.registry import Plugins
from distill_core.types import Features, Fused

# good ones, of kinds that the template has none of


class Sgd(Optimizer):
    """Plain gradient descent."""

    name = "sgd"

    def groups(self, parameters):
        return [{"params": [p], "lr": 0.1 * factor} for _, p, factor in parameters]

    def build(self, groups):
        return torch.optim.SGD(groups)


class Silent(Tracker):
    """Keeps nothing."""

    name = "silent"

    def start(self, folder, name, recipe, resume):
        self.folder = folder

    def log(self, step, values, context):
        assert self.folder

    def finish(self):
        self.folder = None


class Zeros(Initializer):
    """Starts the first backbone at zero."""

    name = "zeros"

    def apply(self, objective):
        names = [name for name in objective.state_dict() if name.startswith("backbone.first.")]
        state = objective.state_dict()
        objective.load_state_dict({name: torch.zeros_like(state[name]) for name in names}, strict=False)
        return Loaded("zeros", frozenset(names))


class MaskingTower(Tower):
    """A tower that can hide tokens."""

    name = "masking"

    def __init__(self, config):
        super().__init__(config)
        self.hidden = nn.Parameter(torch.randn(config.width))

    @classmethod
    def dims(cls, config):
        return Dims(config.width, config.dim, can_mask=True)

    @classmethod
    def collator(cls, config):
        return masking_stack

    def encode(self, x, *, tokens, token_mask):
        patches = self.embed(x.unflatten(1, (-1, self.config.patch)))
        if token_mask is not None:
            patches = torch.where(token_mask[..., None], self.hidden.to(patches.dtype), patches)
        sequence = patches + self.position
        return Features(self.project((sequence + self.mlp(sequence)).flatten(1))[None], {0: sequence} if tokens else {})


def masking_stack(samples, seeds=()):
    views = stack(samples)
    for group in views.groups:
        draws = [torch.rand(len(group.x), 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        group.token_mask = torch.stack(draws, 1) < 0.5
    return views


class Fill(Loss):
    """Masked tokens predict their targets; a teacher's head judges the embedding."""

    name = "fill"
    teacher_modules = ("head",)

    def __init__(self, config, plan):
        super().__init__(config, plan)
        modality = plan.modalities["signal"]
        self.predict = nn.Linear(modality.width, 5)
        self.head = nn.Linear(modality.dim, 6)

    @classmethod
    def needs(cls, config, plan):
        return Needs(
            teacher=True, modalities=("signal",), masked=("signal",), tokens={"signal": (0,)},
            views={"signal": {"global": 2}},
        )  # fmt: skip

    @classmethod
    def example_targets(cls, config, modality, token_mask):
        return torch.arange(token_mask.numel()).reshape(token_mask.shape) % 5

    def forward(self, outputs):
        group = outputs.views["signal"].groups[0]
        mask, targets = group.token_mask[0], group.targets[0]
        scores = self.predict(outputs.student["signal"].tokens[0].float())
        errors = nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none")
        with torch.no_grad():
            goal = outputs.ema(self.head)(outputs.teacher["signal"].pooled[0].float()).softmax(-1)
        mine = self.head(outputs.student["signal"].pooled[1].float()).log_softmax(-1)
        return {"fill": self.mean(errors, mask.flatten()), "head": -(goal * mine).sum(-1).mean()}, {}

    def mean(self, errors, mask):
        return (errors * mask).sum() / mask.sum().clamp(min=1)


GOOD = (
    Noisy, Tower, MaskingTower, MeanFusion, Match, Fill, Waves, Agreement, Linear, Sgd, Silent, Zeros,
)  # fmt: skip


@pytest.mark.parametrize("component", GOOD, ids=lambda component: component.name)
def test_good_components_conform(component):
    """The control: what is broken below differs from these in one way. Would catch a check that is never content."""
    assert_conforms(component)


def test_every_kind_has_a_good_component_and_most_checks_fit():
    """Would catch a check that passes because it is skipped everywhere."""
    assert {component.kind for component in GOOD} == set(INTERFACES)
    fitted = {(component.kind, r.check) for component in GOOD for r in check(component) if r.status == "ok"}
    assert fitted == {(kind, one.name) for kind in INTERFACES for one in checks_of(kind)}


# broken ones: (class, check, what the message says)

BROKEN = []


def broken(check_name, message):
    def add(cls):
        cls.__doc__ = cls.__doc__ if check_name == "documented" else "Broken."
        BROKEN.append(pytest.param(cls, check_name, message, id=f"{cls.kind}-{check_name}-{cls.__name__}"))
        return cls

    return add


@broken("documented", "write a docstring for the class Undocumented")
class Undocumented(Linear):
    pass


@broken("documented", r"for the option\(s\) bare")
class BareOption(Linear):
    """Told."""

    class Config(ComponentConfig):
        bare: int = 1


@broken("options", r"the example \{\} is refused: urls: Field required.*`examples = ")
class Required(Linear):
    class Config(ComponentConfig):
        urls: str
        """Needed."""


@broken("options", "changes extra of model_config")
class Loose(Linear):
    class Config(ComponentConfig):
        model_config = {**ComponentConfig.model_config, "extra": "allow"}  # noqa: RUF012


@broken("options", "must extend LossConfig")
class Weightless(Match):
    class Config(ComponentConfig):
        modalities: tuple[str, str] = ("left", "right")
        """Two."""


@broken("options", "load as something else|are refused")
class Lossy(Linear):
    class Config(ComponentConfig):
        final: float = Field(0.0, exclude=True)
        """Not written out."""

    examples = ({"final": 0.5},)


@broken("named", "the name 'my.loss' must be a word")
class Dotted(Match):
    name = "my.loss"


@broken("needs_and_problems", r"`needs` raises KeyError\(0\)|`needs` raises IndexError")
class NeedsFirst(MeanFusion):
    @classmethod
    def needs(cls, config, plan):
        return Needs(tokens={list(plan.modalities)[0]: (0,)})  # noqa: RUF015


@broken("needs_and_problems", "`problems` must return strings")
class OneString(MeanFusion):
    @classmethod
    def problems(cls, config, plan):
        return "" if len(plan.modalities) == 2 else "wrong"


@broken("pickled_options", "PicklingError|pickle|AttributeError")
class LocalConfig(Linear):
    @staticmethod
    def make():
        class Hidden(ComponentConfig):
            """Not found by its name."""

        return Hidden


LocalConfig.Config = LocalConfig.make()


@broken("roles", "`views` makes .*, `roles` says")
class WrongRoles(Noisy):
    @classmethod
    def roles(cls, config):
        return ("global",)

    def views(self, sample, rng):
        return [*super().views(sample, rng), *super().views(sample, rng)]


@broken("roles", "global views come first")
class LocalsFirst(Noisy):
    @classmethod
    def roles(cls, config):
        return ("local", "global")


@broken("determinism", "draw from `rng` alone")
class GlobalRandom(Noisy):
    def views(self, sample, rng):
        return super().views(sample, np.random.default_rng(np.random.randint(1 << 30)))


@broken("determinism", "keep nothing between samples")
class Remembers(Noisy):
    seen = 0

    def views(self, sample, rng):
        self.seen += 1
        return super().views(sample, np.random.default_rng(self.seen))


@broken("pickling", "pickle")
class HoldsLambda(Noisy):
    def __init__(self, config):
        super().__init__(config)
        self.scale = lambda x: x


@broken("sample_untouched", "`views` changes the sample")
class Consumes(Noisy):
    def views(self, sample, rng):
        made = super().views(sample, rng)
        sample.pop("left")
        return made


@broken("evaluation_view", "`plain` must give the same view each time")
class NoisyPlain(Noisy):
    def plain(self, item):
        view = super().plain(item)
        view.data.add_(torch.randn(()))
        return view


@broken("bad_samples", "`views` of a sample with no field raises KeyError.*raise BadSample")
class KeyErrors(Noisy):
    def read(self, sample, field=None):
        return [np.frombuffer(sample[field or self.config.field], dtype=np.float32)]


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


@broken("collator", "draw from generators of the seeds alone")
class RandomMasks(MaskingTower):
    @classmethod
    def collator(cls, config):
        return random_masks


@broken("shapes", r"pooled is \[2, 3, 8\], not \[V, B, D\] = \[2, 3, 9\]")
class WrongDim(Tower):
    @classmethod
    def dims(cls, config):
        return Dims(config.width, config.dim + 1)


@broken("shapes", "has a mask and no tokens|must be bool")
class FloatMask(Tower):
    def encode(self, x, *, tokens, token_mask):
        features = super().encode(x, tokens=tokens, token_mask=token_mask)
        return Features(features.pooled, features.tokens, {0: torch.ones(len(x), 4)} if tokens else {})


@broken("shapes", r"a batch of no sample \(B = 0\) raises RuntimeError")
class NeedsASample(Tower):
    def encode(self, x, *, tokens, token_mask):
        features = super().encode(x, tokens=tokens, token_mask=token_mask)
        features.pooled = features.pooled.reshape(1, len(x), -1)
        return features


@broken("shapes", r"a batch of no sample \(B = 0\) raises RuntimeError: amax")
class FusesASample(MeanFusion):
    def pool(self, modality, queries, tokens, mask=None):
        return super().pool(modality, queries, tokens, mask) + 0 * tokens.amax()


@broken("need", "give those asked for")
class AllTokens(Tower):
    def forward(self, views, *, need=(), masked=False):
        return super().forward(views, need=range(len(views)), masked=masked)


@broken("need", "pooled changes with need")
class NeedChanges(Tower):
    def encode(self, x, *, tokens, token_mask):
        features = super().encode(x, tokens=tokens, token_mask=token_mask)
        features.pooled = features.pooled + tokens
        return features


@broken("independence", "depends on the others of its batch")
class Centred(Tower):
    def encode(self, x, *, tokens, token_mask):
        features = super().encode(x, tokens=tokens, token_mask=token_mask)
        features.pooled = features.pooled - features.pooled.mean(1, keepdim=True)
        return features


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
        features = super().encode(x, tokens=tokens, token_mask=token_mask)
        features.pooled = features.pooled + self.offset
        return features


@broken("teacher_copy", "deepcopy")
class Caches(Tower):
    def encode(self, x, *, tokens, token_mask):
        features = super().encode(x, tokens=tokens, token_mask=token_mask)
        self.last = features.pooled
        return features


@broken("determinism", "the same weights give other features")
class AlwaysDrops(Tower):
    def encode(self, x, *, tokens, token_mask):
        return super().encode(dropout(x, 0.5, training=True), tokens=tokens, token_mask=token_mask)


@broken("determinism", "the same seed gives other weights")
class OwnSeed(Tower):
    def __init__(self, config):
        super().__init__(config)
        self.position = nn.Parameter(torch.from_numpy(np.random.default_rng().random((4, 16), dtype=np.float32)))


@broken("autocast", "TypeError: Got unsupported ScalarType BFloat16")
class FixedType(Tower):
    def encode(self, x, *, tokens, token_mask):
        features = super().encode(x, tokens=tokens, token_mask=token_mask)
        features.pooled = features.pooled - float(features.pooled.detach().numpy().max())
        return features


@broken("shapes", "is not L2-normalised")
class NotNormalised(MeanFusion):
    def forward(self, features):
        return Fused({name: f.pooled + self.map[name](f.tokens[0].mean(1)) for name, f in features.items()})


@broken("shapes", r"pooled has no 'second'")
class OneSided(MeanFusion):
    def forward(self, features):
        fused = super().forward(features)
        del fused.pooled["second"]
        return fused


@broken("shapes", r"KeyError: 1.*name what is read there")
class ReadsMore(MeanFusion):
    def forward(self, features):
        return Fused({name: normalize(f.tokens[1].mean(1), dim=-1)[None] for name, f in features.items()})


@broken("masks", "padded tokens change the result")
class IgnoresPadding(MeanFusion):
    def pool(self, modality, queries, tokens, mask=None):
        return super().pool(modality, queries, tokens)


@broken("pool", "lets padded tokens")
class PoolIgnoresPadding(IgnoresPadding):
    pass


@broken("pool", r"`pool` gives \[3, 32\], not \[1, 3, 32\]")
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


@broken("terms", "the term 'match' must be a 0-dim tensor")
class FloatTerm(Match):
    def forward(self, outputs):
        return {"match": super().forward(outputs)[0]["match"].item()}, {}


@broken("terms", r"the metric\(s\) scale hold on to the graph")
class AttachedMetric(Match):
    def forward(self, outputs):
        return super().forward(outputs)[0], {"scale": self.log_scale.exp()}


@broken("terms", "is nan for a batch of 1")
class OneSample(Match):
    def forward(self, outputs):
        spread = outputs.embedding("fused.left").std(1, unbiased=True).mean()
        return {"match": super().forward(outputs)[0]["match"] + spread}, {}


@broken("gradients", "no gradient reaches the student")
class DetachedLoss(Match):
    def forward(self, outputs):
        outputs.fused.pooled = {name: x.detach() for name, x in outputs.fused.pooled.items()}
        return super().forward(outputs)


@broken("purity", "`forward` moves calls|changes when `forward` is called again")
class Counts(Match):
    def __init__(self, config, plan):
        super().__init__(config, plan)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs):
        self.calls += 1
        return super().forward(outputs)


@broken("after_step", "its state is not finite then")
class Explodes(Match):
    def after_step(self, outputs, progress):
        self.log_scale.fill_(torch.inf)


@broken("after_step", "state outside of parameters and buffers")
class UnsavedCentre(Match):
    centre = 0.0

    def forward(self, outputs):
        return {"match": super().forward(outputs)[0]["match"] + self.centre}, {}

    def after_step(self, outputs, progress):
        self.centre = outputs.embedding("teacher.left").sum()


@broken("teacher_modules", "the loss has no module of that name")
class NamesNothing(Fill):
    teacher_modules = ("heads",)

    def __init__(self, config, plan):
        super().__init__(config, plan)
        self.heads = None


@broken("teacher_modules", "say needs")
class Teacherless(Match):
    teacher_modules = ("head",)

    def __init__(self, config, plan):
        super().__init__(config, plan)
        self.head = nn.Linear(2, 2)

    @classmethod
    def needs(cls, config, plan):
        return Needs(fused=True, modalities=config.modalities)


@broken("masked_tokens", "is nan where no token is masked")
class EmptyMean(Fill):
    def mean(self, errors, mask):
        return errors[mask].mean()


@broken("autocast", "TypeError")
class Numpy(Match):
    def forward(self, outputs):
        spread = float(outputs.teacher["left"].pooled.numpy().std())
        return {"match": super().forward(outputs)[0]["match"] + spread}, {}


@broken("autocast", "compute logits in fp32")
class HalfLogits(Match):
    def forward(self, outputs):
        raw = outputs.teacher["left"].pooled
        return {"match": super().forward(outputs)[0]["match"] + (raw.dtype == torch.bfloat16)}, {}


@broken("factors", "must be finite and not negative")
class Negative(Linear):
    def factor(self, step, steps):
        return 0.5 - step / steps


@broken("factors", "depends on the steps asked before")
class Stateful(Linear):
    calls = 0

    def factor(self, step, steps):
        self.calls += 1
        return 1 / self.calls


@broken("steps", "each parameter it is given exactly once")
class Forgets(Sgd):
    def groups(self, parameters):
        return [{"params": [p], "lr": 0.1} for _, p, _ in parameters if p.ndim > 1]


@broken("steps", "times the parameter's factor")
class OneRate(Sgd):
    def groups(self, parameters):
        return [{"params": [p], "lr": 0.1} for _, p, _ in parameters]


class Slowing(torch.optim.SGD):
    done = 0

    def step(self, closure=None):
        self.done += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(group["lr"] / self.done * parameter.grad)


@broken("optimizer_state", "after load_state_dict the next step is another one")
class UnsavedSteps(Sgd):
    def build(self, groups):
        return Slowing(groups)


@broken("splits", "KeyError")
class UnknownSplit(Waves):
    def sets(self, split):
        return {"waves": {name: [str(self._path(name))] for name in ("train", "validation", "test")}[split]}


@broken("shards", "`size` of 'train' is 17; its shards hold 16")
class Miscounts(Waves):
    def size(self, split):
        return super().size(split) + 1

    def _write(self, path, samples, rng):
        super()._write(path, samples - 1, rng)


@broken("pickling", "pickle")
class SourceWithLambda(Waves):
    def __init__(self, config):
        super().__init__(config)
        self.open = lambda path: path


@broken("scores", "the score 'cosine' is tensor")
class TensorScore(Agreement):
    def run(self, model, sets):
        return {"cosine": torch.tensor(super().run(model, sets)["cosine"])}


@broken("scores", "other scores the second time")
class RandomScore(Agreement):
    def run(self, model, sets):
        return {"cosine": torch.rand(()).item()}


@broken("nothing_to_score", "raises ZeroDivisionError.*raise DataError")
class Divides(Agreement):
    def run(self, model, sets):
        a, b = (sets[0].embeddings(model, name)[0] for name in model.modalities)
        return {"cosine": float((a * b).sum()) / len(a)}


@broken("tracked", "AttributeError")
class NeverStarted(Silent):
    def start(self, folder, name, recipe, resume):
        if not resume:
            self.folder = folder


@broken("refusal", "raises UserError after it has changed backbone")
class HalfLoaded(Zeros):
    def apply(self, objective):
        super().apply(objective)
        raise UserError("no such file")


@broken("refusal", "names what it loaded|which the model has not")
class Invents(Zeros):
    def apply(self, objective):
        return Loaded("all", frozenset({"backbone.third.weight"}))


@broken("refusal", "raise FileNotFoundError.*raise UserError")
class Traceback(Zeros):
    def apply(self, objective):
        raise FileNotFoundError("weights.pt")


@pytest.mark.parametrize(("component", "name", "message"), BROKEN)
def test_a_broken_component_fails_its_check(component, name, message):
    """Would catch a check that passes whatever it is given, or a message that does not say what is wrong."""
    (result,) = check(component, only=[name])
    assert result.status == "failed", result
    assert re.search(message, result.message), result.message
    with pytest.raises(AssertionError, match=f"{component.kind} {re.escape(component.name)}: {name}: "):
        assert_conforms(component)


def test_each_check_has_a_broken_component():
    """Would catch a new check that nobody has seen fail."""
    seen = Counter((param.values[0].kind, param.values[1]) for param in BROKEN)
    general = {"documented", "options", "named", "needs_and_problems", "pickled_options"}
    wanted = {(kind, one.name) for kind in INTERFACES for one in checks_of(kind) if one.name not in general}
    assert wanted - set(seen) == set()
    assert general <= {name for _, name in seen}


def test_a_loss_may_bring_the_fusion_it_works_with():
    """`example_fusion` makes the fused features, from the tokens that it needs. Would catch leaves in their place."""

    class Own(MeanFusion):
        """Known by its class."""

        name = "own"

    class NeedsOwn(Match):
        """Works with one fusion alone."""

        def forward(self, outputs):
            if not isinstance(outputs.fusion, Own):
                raise UserError("needs the fusion 'own'")
            assert outputs.fused.pooled["left"].grad_fn is not None
            return super().forward(outputs)

    (result,) = check(NeedsOwn, only=["terms"])
    assert result.status == "failed"
    assert "needs the fusion 'own'" in result.message
    NeedsOwn.example_fusion = classmethod(lambda cls, config, plan: Own(ComponentConfig(), plan))
    assert {r.status for r in check(NeedsOwn)} == {"ok", "skipped"}


def test_a_component_that_no_plan_suits_is_told_so():
    """Would catch a component that passes because nothing could be built for it."""

    class Picky(Match):
        """Never content."""

        @classmethod
        def problems(cls, config, plan):
            yield "needs a width of 7"

    (result,) = check(Picky, only=["terms"])
    assert result.status == "failed"
    assert "no plan suits it: needs a width of 7" in result.message
    assert "`examples`" in result.message


def test_the_failing_example_is_named():
    class Two(Tower):
        """Works with the first example alone."""

        examples = (Tower.examples[0], {**Tower.examples[0], "dim": 9})

        def encode(self, x, *, tokens, token_mask):
            features = super().encode(x, tokens=tokens, token_mask=token_mask)
            return Features(features.pooled[..., :8], features.tokens)

    (result,) = check(Two, only=["shapes"])
    assert result.status == "failed"
    assert '"dim": 9' in result.message


def test_each_check_says_what_it_holds_a_component_to():
    assert all(inspect.cleandoc(one.about) for kind in INTERFACES for one in checks_of(kind))
    assert MatchConfig.model_fields["weight"].default == LossConfig().weight


def test_a_plugin_that_ends_python_without_a_word(tmp_path, monkeypatch):
    """Would catch a check that needs an error message to tell of."""
    (tmp_path / "mute_plugin.py").write_text("import os, sys\nif '-c' in sys.argv: os._exit(7)\n")
    monkeypatch.syspath_prepend(tmp_path)
    plugins = Plugins()
    plugins.add("mute", importlib.import_module("mute_plugin"), "mute")
    (light,) = [result for result in report._plugin(plugins, "mute") if result.check == "light"]
    assert light.status == "failed"
    assert "exit code 7" in light.message


@pytest.mark.parametrize("given", ["", "/somewhere"])
def test_the_templates_cache_is_distills(given, tmp_path, monkeypatch):
    """An empty XDG_CACHE_HOME is none: would catch a source that writes into /distill."""
    monkeypatch.delenv("DISTILL_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    expected = Path(given or tmp_path / ".cache") / "distill"
    assert Waves(Waves.Config())._path("train").is_relative_to(expected)
