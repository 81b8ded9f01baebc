"""The interfaces that make a method, each a component with a pydantic `Config`.

`Augmentation` (one modality: a raw sample -> its views; `JointAugmentation`: several at once), `Backbone` (one
modality: views -> features), `FusionHead` (all modalities), `Head` (what losses and tasks call beside those) and
`Loss`. The small contracts around a method stand in `contracts/`. What a component needs of the rest of a recipe it
says in `needs`, before any data or weights are touched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from distill_core.batch import GLOBAL, Group, Sample, View, Views, join_views, stack_views
from distill_core.contracts.component import Component, ComponentConfig
from distill_core.contracts.media import Rendered
from distill_core.contracts.optional import ClassAttention, offers
from distill_core.contracts.schedule import NotNegative, Scheduled
from distill_core.outputs import Encoded, Features, Fused, Outputs, Progress, Rows
from distill_core.plan import DEFAULT_FUSION, BackboneSpec, ModalityPlan, Needs, Plan

if TYPE_CHECKING:
    import numpy as np


class Augmentation(Component, ABC):
    """One modality: a raw sample -> its views. Picklable; runs in the loader's workers.

    All randomness comes from `rng`, a function of (seed, epoch, sample key, modality), so that a resumed run sees the
    same views whatever its workers did before.
    """

    kind = "augmentation"

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    @abstractmethod
    def roles(cls, config: Any) -> tuple[str, ...]:
        """The role of each view that `train_views` returns, globals first."""

    @classmethod
    def shapes(cls, config: Any) -> tuple[tuple[int, ...], ...] | None:
        """The shape of the data of each view of `train_views`, where the options tell: backbones refuse those that they
        cannot encode (`Backbone.view_problems`) before anything is read."""
        return None

    @classmethod
    def extras(cls, config: Any) -> tuple[str, ...]:
        """The names in the `extra` of each of its training views, which losses ask for by `Needs.extra` and read in
        `Group.extra`. Those that only its `on_device` reads are not named."""
        return ()

    @abstractmethod
    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        """The sample's training views. Raises `BadSample` when it cannot be used, `AbsentModality` where it lacks the
        modality altogether."""

    def on_device(self, views: Views) -> Views:
        """The collated training views as the backbone takes them, made on the device that trains.

        For work that suits a batch on a GPU better than a sample in a worker, as pixels of 8 bits to normalised floats.
        It draws nothing: what a sample's generator decides comes in `View.extra`. It changes no tensor in place, and
        leaves alone what it made itself. The default changes nothing.
        """
        return views

    @abstractmethod
    def decode(self, sample: Sample, field: str | None = None) -> list[Any]:
        """The sample's items of this modality as they are (one picture; each caption), for evaluation.

        On a GPU several threads call this and `eval_view`.

        `field` names another field of the sample than the one that training reads. Raises `BadSample`.
        """

    @abstractmethod
    def eval_view(self, item: Any) -> View:
        """The deterministic view of one item, as `decode` gives it or a user hands it to `Model.encode`.

        Raises `BadSample` for an item that cannot be read.
        """

    def measure(self, sample: Sample) -> Mapping[str, float]:
        """What a run should know of its samples (how many captions, how many sentences), of the first ones that train.

        Raises `BadSample` where there is nothing to measure. The default measures nothing.
        """
        return {}

    @classmethod
    def remarks(cls, config: Any, means: Mapping[str, float]) -> tuple[str, str | None]:
        """Of the mean of each measure, what a run says when it starts: a line, and a warning or None."""
        return ", ".join(f"{mean:.1f} {name}" for name, mean in means.items()) + " a sample", None

    def render(self, view: View) -> Rendered:
        """What a view looks like to a person, for trackers: a PIL image or a str; None where there is nothing to see.

        The default shows what is one of the two already.
        """
        from PIL import Image

        return view.data if isinstance(view.data, str | Image.Image) else None


Collator = Callable[[list[list[View]], Sequence[int]], Views]
"""The views of B samples (V each, in the order of `roles`) and a seed for each sample -> their `Views`."""


class JointAugmentation(Component, ABC):
    """Several modalities at once: a raw sample -> the views of each, where those of one depend on another's.

    A recipe names it beside the modalities' own augmentations, as `image+text`. Those stay in charge of all that
    concerns one modality: evaluation, `on_device`, `render`. Picklable; runs in the loader's workers.

    All randomness comes from `own`, whose views are drawn from each modality's own generator, and from `rng`, a
    function of (seed, epoch, sample key, the name `image+text`).
    """

    kind = "joint_augmentation"

    def __init__(self, config: Any, parts: Mapping[str, Augmentation]) -> None:
        """`parts`: the modalities' own augmentations, in the order in which the recipe names them. Raises ValueError
        for some that it cannot work with."""
        self.config, self.parts = config, dict(parts)

    @classmethod
    def plans(cls, config: Any, own: Mapping[str, ModalityPlan]) -> Mapping[str, ModalityPlan]:
        """What is known of the modalities (roles, shapes, extras) under this augmentation, of what is known under their
        own. Raises ValueError for some that it cannot work with. The default: the same."""
        return own

    @abstractmethod
    def train_views(
        self, sample: Sample, own: Callable[[str], list[View]], rng: np.random.Generator
    ) -> dict[str, list[View]]:
        """The sample's training views, of each of the modalities. `own` makes those of a modality's own augmentation,
        which may be returned as they are, and are not changed in place.

        Raises `BadSample` when the sample cannot be used, `AbsentModality` where it lacks one of the modalities
        altogether (as `own` does): the others then have their own augmentations' views."""


@dataclass(frozen=True, slots=True)
class TowerInput:
    """N inputs of one shape, as `Backbone.encode_together` takes several of them."""

    x: Tensor
    """[N, ...]."""
    tokens: bool = False
    """Whether tokens and their mask are wanted."""
    token_mask: Tensor | None = None
    """[N, L], True where the input token must be hidden."""
    lengths: np.ndarray[Any, Any] | None = None
    """[N] integers on the host, from `Group.lengths`."""
    layers: tuple[int, ...] = ()
    """Layers whose tokens are wanted too (`Encoded.layers`); only where `tokens` are."""
    keep: Tensor | None = None
    """[N, L'], from `Group.keep`."""
    parts: Mapping[str, TowerInput] = field(default_factory=dict)
    """Of a `JointTower`'s: modality -> what its collator has made of these views."""


class Backbone(nn.Module, Component, ABC):
    """One modality: views -> features. `forward` is a training step's only entry.

    What it may offer besides, for figures and dense evaluations: `contracts/optional.py`.
    It may be built under `torch.device("meta")`, to learn the names of its parameters: it reads no weights then.
    """

    kind: ClassVar[str] = "backbone"

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    @abstractmethod
    def spec(cls, config: Any) -> BackboneSpec:
        """Widths, without building anything."""

    @classmethod
    def view_problems(cls, config: Any, views: ModalityPlan) -> Iterable[str]:
        """Reasons, one line each, why it cannot encode the views of its modality: their roles, or their shapes."""
        return ()

    @classmethod
    @abstractmethod
    def collator(cls, config: Any) -> Collator:
        """A picklable callable for the workers: the views of B samples, and B seeds -> `Views`.

        Whatever it draws (masks, targets, tokens to keep) it draws from generators of those seeds, one a sample.
        """

    def on_device(self, views: Views) -> Views:
        """After `Augmentation.on_device`, by the same rules: for targets that are made of what `encode` takes."""
        return views

    def before_step(self, progress: Progress) -> None:
        """Called before the student's forward pass of each training step: for options that are scheduled."""
        return

    after_units: ClassVar[tuple[str, ...]] = ()
    """Names of its own parameters and modules that come after `units` (a final norm, a projection): their learning rate
    is not decayed by `train.lr_decay`."""

    def units(self) -> Sequence[nn.Module]:
        """Its repeated parts (a transformer's blocks), entered by `forward` alone: what `train.parallel` works on.

        Each of them can be compiled as one graph, whatever the lengths of its inputs. () where there are none.
        """
        return ()

    @abstractmethod
    def encode(self, x: Tensor, *, tokens: bool, token_mask: Tensor | None) -> Encoded:
        """N inputs of one shape; tokens and their mask if `tokens`.

        `token_mask` [N, L] is True where the input token must be hidden.
        """

    def encode_together(self, inputs: Sequence[TowerInput]) -> list[Encoded]:
        """`encode` of several inputs. A backbone that packs, drops tokens or hands layers on overrides this."""
        return [self.encode(x.x, tokens=x.tokens, token_mask=x.token_mask) for x in inputs]

    def forward(
        self,
        views: Views,
        *,
        tokens_of: Sequence[int] = (),
        masked: bool = False,
        layers_of: Mapping[int, Sequence[int]] | None = None,
        attention_of: Sequence[int] = (),
    ) -> Features:
        """Features of all views; tokens only of those in `tokens_of`; `masked` hides the tokens of `token_mask`
        and drops those that are not in `keep`, as the student does in training.

        `layers_of`: layer -> those of the views in `tokens_of` whose tokens are wanted as this layer gives them.
        `attention_of`: the views whose `Features.attention` is wanted, of a backbone that offers `ClassAttention`.
        Each group's needed and other views are an input of `encode_together` each.
        """
        if masked and any(group.keep is not None for group in views.groups) and not self.spec(self.config).can_drop:
            raise ValueError(f"{self.name} cannot drop tokens, yet a group of its views has `keep`")
        spans = list(_spans(views, tokens_of, layers_of or {}, masked))
        features = _joined(spans, self.encode_together([span.input for span in spans]), layers_of or {})
        if attention_of:
            assert offers(self, ClassAttention)
            features.attention = {
                start + i: self.class_attention(group.x[i])
                for start, group in views.numbered()
                for i in range(len(group.x))
                if start + i in attention_of
            }
        return features


@dataclass(frozen=True, slots=True)
class _Span:
    """Views of a group that follow one another and of which the same is read: one input of `encode_together`."""

    input: TowerInput
    first: int
    """The first view's number."""
    count: int
    batch: int


def _spans(
    views: Views, tokens_of: Sequence[int], layers_of: Mapping[int, Sequence[int]], masked: bool
) -> Iterator[_Span]:
    for start, group in views.numbered():
        count, batch = group.x.shape[:2]
        read = [
            (view in tokens_of, tuple(layer for layer, of in layers_of.items() if view in of))
            for view in range(start, start + count)
        ]
        ends = [i for i in range(1, count) if read[i] != read[i - 1]]
        for first, last in pairwise([0, *ends, count]):
            hidden, keep = (group.token_mask, group.keep) if masked else (None, None)
            tokens, layers = read[first]
            whole = replace(
                _input(group, first, last),
                tokens=tokens,
                layers=layers,
                token_mask=None if hidden is None else hidden[first:last].flatten(0, 1),
                keep=None if keep is None else keep[first:last].flatten(0, 1),
                parts={name: _input(part, first, last) for name, part in group.parts.items()},
            )
            yield _Span(whole, start + first, last - first, batch)


def _input(group: Group, first: int, last: int) -> TowerInput:
    """Views `first` to `last` of a group, as a tower takes them."""
    lengths = group.lengths[first:last].reshape(-1) if group.lengths is not None else None
    return TowerInput(group.x[first:last].flatten(0, 1), lengths=lengths)


def _joined(spans: Sequence[_Span], encoded: Sequence[Encoded], layers_read: Iterable[int]) -> Features:
    """The views of all spans."""
    pooled: list[Tensor] = []
    classes: list[Tensor] = []
    tokens: dict[int, Tensor] = {}
    masks: dict[int, Tensor] = {}
    layers: dict[int, dict[int, Tensor]] = {layer: {} for layer in layers_read}
    for span, part in zip(spans, encoded, strict=True):
        pooled.append(part.pooled.reshape(span.count, span.batch, *part.pooled.shape[1:]))
        if part.class_tokens is not None:
            classes.append(part.class_tokens.reshape(span.count, span.batch, *part.class_tokens.shape[1:]))
        if span.input.tokens and part.tokens is not None:
            for i in range(span.count):
                view, rows = span.first + i, slice(i * span.batch, (i + 1) * span.batch)
                tokens[view] = part.tokens[rows]
                for layer in span.input.layers:
                    layers[layer][view] = part.layers[layer][rows]
                if part.mask is not None:
                    masks[view] = part.mask[rows]
    joined = torch.cat(classes) if len(classes) == len(pooled) else None
    return Features(torch.cat(pooled), tokens, masks, joined, layers)


class JointTowerConfig(ComponentConfig):
    """Options that every joint tower has."""

    views: tuple[str, ...] = (GLOBAL,)
    """Roles of the views that it reads: view i of each modality with view i of the others."""


class JointTower(Backbone):
    """Several modalities as one sequence. Its place in a recipe's `backbone` names them, as `image+text`, and each of
    them has an entry of its own there, which collates its views: a tower, or `raw`.

    `encode_together` reads `TowerInput.parts`, {modality: TowerInput} in the order of the key, and sees every token,
    whatever a masker hides from the modality's own tower.
    """

    Config: ClassVar[type[ComponentConfig]] = JointTowerConfig

    @classmethod
    def collator(cls, config: Any) -> Collator:
        """For the conformance checks: `View.data` is {modality: array}, stacked by `stack_views`."""
        return _stack_parts

    def encode(self, x: Tensor, *, tokens: bool, token_mask: Tensor | None) -> Encoded:
        """Raises TypeError: one modality is not enough."""
        raise TypeError(f"{self.name!r} encodes several modalities at once: encode_together")

    @abstractmethod
    def encode_together(self, inputs: Sequence[TowerInput]) -> list[Encoded]:
        """Of each of `inputs` the `parts` as one sequence."""


def _stack_parts(samples: list[list[View]], seeds: Sequence[int] = ()) -> Views:
    names, roles = samples[0][0].data, dict.fromkeys(view.role for view in samples[0])
    parts = {n: stack_views([[View(v.data[n], v.role) for v in sample] for sample in samples]) for n in names}
    return join_views(parts, tuple(roles))


class FusionHead(nn.Module, Component, ABC):
    """Sees the student's features of every modality. What it may offer besides: `contracts/optional.py`."""

    kind: ClassVar[str] = "fusion"

    def __init__(self, config: Any, plan: Plan) -> None:
        super().__init__()
        self.config = config

    def units(self) -> Sequence[nn.Module]:
        """What `train.parallel.compile` compiles, each as one graph; here the head itself.

        A `forward` that is not one graph (one that reads a tensor on the host) names those of its parts that are.
        """
        return (self,)

    @abstractmethod
    def forward(self, features: dict[str, Features]) -> dict[str, Fused]:
        """For each modality its fused embeddings, `pooled` [V, B, D], L2-normalised."""


class Head(nn.Module, Component, ABC):
    """A module beside towers and fusion, which losses and tasks call: a decoder, a projection that several losses read.

    A loss names it in `Needs.heads` and calls `Outputs.heads[NAME]`; a teacher may have a copy (`Outputs.ema`). Its
    `needs` name what it is called with; what arguments it takes is between it and those that call it. It stands in the
    recipe's `heads`, is trained where a loss calls it, and is part of the trained model (`Model.heads`).
    """

    kind: ClassVar[str] = "head"

    def __init__(self, config: Any, plan: Plan) -> None:
        super().__init__()
        self.config = config

    def units(self) -> Sequence[nn.Module]:
        """Its repeated parts, as `Backbone.units`."""
        return ()


class Decoder(Head):
    """A head that writes one modality, token by token: `Model.generate` calls it, and losses that teach it."""

    @classmethod
    @abstractmethod
    def writes(cls, config: Any) -> str:
        """The modality whose tokens it predicts, over the ids of its backbone's `Vocabulary`."""

    @classmethod
    @abstractmethod
    def reads(cls, config: Any) -> tuple[str, ...]:
        """The modalities whose tokens it is given, of their first view. The one that it writes is among them where it
        continues what that tower makes of the tokens so far; the tower must be causal then."""

    @classmethod
    def needs(cls, config: Any, plan: Plan) -> Needs:
        """The tokens of what it `reads`."""
        return Needs(tokens=dict.fromkeys(cls.reads(config), (0,)), embeddings=())

    @classmethod
    def problems(cls, config: Any, plan: Plan) -> Iterable[str]:
        """Ids on the side that it writes, and a causal tower where it reads that side."""
        name = cls.writes(config)
        spec = plan.modalities[name].spec
        if spec.vocabulary is None:
            yield f"{cls.name!r} writes {name!r}, whose backbone takes no ids of a known vocabulary"
        if name in cls.reads(config) and not spec.causal:
            yield f"{cls.name!r} continues the tokens of {name!r}, whose backbone also looks at those that follow"

    @abstractmethod
    def forward(self, encoded: Mapping[str, Encoded], ids: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits, fp32 or wider, of the id that follows each of ids [N, L], which begin with `start`: [N, L, S], or at
        `rows` [R] alone, counted through N * L, [R, S].

        `encoded` holds what it `reads`, of the same N samples; tokens of the side that it writes may be more than L.
        Logits depend on no id that follows.
        """


class LossConfig(ComponentConfig):
    """Options that every loss has."""

    weight: Scheduled[NotNegative] = Scheduled(1.0)
    """Factor of all of this loss's terms in the total; also a schedule."""
    fusion: str = DEFAULT_FUSION
    """The fusion whose views it reads, if it reads fused views: `default`, or a name in `fusions`."""

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        if not isinstance(cls.model_fields["weight"].default, Scheduled):
            raise TypeError(
                f"{cls.__qualname__}.weight: write a default of your own as Scheduled[...] = Scheduled(0.5)"
            )


class Loss(nn.Module, Component, ABC):
    """Owns its temperatures, heads and centres. `forward` is pure; state moves in `after_step`."""

    kind: ClassVar[str] = "loss"
    Config: ClassVar[type[ComponentConfig]] = LossConfig
    teacher_modules: ClassVar[tuple[str, ...]] = ()
    """Names of own submodules of which the teacher keeps an EMA; read it by `outputs.ema(self.NAME)`."""
    across_ranks: ClassVar[bool] = True
    """Whether the mean over ranks is the loss of all their rows in one process. False: of each rank's rows alone."""
    partial: ClassVar[bool] = False
    """Whether it can be given a part of the batch, on each rank another: the samples that have all that it needs, where
    some lack a modality (`data.optional`). What it reads of other ranks it reads by `Rows` (of features or of
    `Outputs.rows`), whose `offset` says where its own rows are, and means over ranks heed `Outputs.weight`."""

    def __init__(self, config: Any, plan: Plan) -> None:
        super().__init__()
        self.config = config

    def nested(self) -> dict[str, Loss]:
        """The losses that this one is made of, by the path of the module, which is that of the option: `inner`,
        `of.0`. Those inside them are theirs."""
        return dict(_losses_below(self))

    def weighted(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """As the loss itself, the terms times its `weight` at this step: what a loss around this one calls."""
        terms, metrics = self(outputs)
        weight = self.config.weight.value(outputs.progress)
        return {name: weight * term for name, term in terms.items()}, metrics

    @abstractmethod
    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(terms, metrics): 0-dim tensors by name, terms in fp32 or wider. The framework weights and adds them.

        Other losses read the same `outputs`: nothing of them is changed. Over several ranks each term is the mean over
        this rank's own rows, with its gradient through the gathered embeddings; the trainer averages gradients over
        ranks. Where ranks have different numbers of samples, the framework weighs the terms.
        """

    def units(self) -> Sequence[nn.Module]:
        """What `train.parallel.compile` compiles, each as one graph; here the loss itself, or what the losses inside it
        name.

        A `forward` that is not one graph (one that reads a tensor on the host, or waits for other ranks) names those of
        its parts that are.
        """
        nested = self.nested().values()
        return [unit for loss in nested for unit in loss.units()] if nested else (self,)

    def gathers(self, outputs: Outputs) -> Iterable[Rows]:
        """The rows whose `gathered` it reads: over several ranks, those of all losses are gathered in one collective
        before the losses are called. Rows that are not named are gathered when they are read, one by one. Here those of
        the losses inside it, of these outputs."""
        return [rows for loss in self.nested().values() for rows in loss.gathers(outputs)]

    def after_step(self, outputs: Outputs, progress: Progress) -> None:
        """Move what is not learned by gradient (clamp scales, move centres); called after each optimiser step.

        Gradients are recorded then: decorate it with `torch.no_grad()`. State must stay equal on all ranks.
        It moves buffers and parameters of one element, which are put back where the step turns out not to be finite.
        Here those of the losses inside it move, by these outputs.
        """
        for loss in self.nested().values():
            loss.after_step(outputs, progress)


def _losses_below(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Loss]]:
    for name, child in module.named_children():
        if isinstance(child, Loss):
            yield prefix + name, child
        else:
            yield from _losses_below(child, f"{prefix}{name}.")


def losses_with_paths(losses: Mapping[str, Loss], prefix: str = "loss.") -> Iterator[tuple[str, Loss]]:
    """(path of the module, loss) of losses by id, each before those inside it."""
    for name, loss in losses.items():
        yield prefix + name, loss
        yield from losses_with_paths(loss.nested(), f"{prefix}{name}.")
