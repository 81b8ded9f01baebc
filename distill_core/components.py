"""The interfaces a plugin implements, and the pydantic `Config` each component carries.

Four of them make a method: `Augmentation` (one modality: a raw sample -> its views), `Backbone` (one modality: views
-> features), `FusionHead` (all modalities) and `Loss`. The rest are small contracts around it: `DataSource`,
`Evaluation`, `Optimizer`, `Schedule`, `Tracker` and `Initializer`.

What a component needs of the rest of a recipe it says in `needs`, before any data or weights are touched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from distill_core.media import Media, Shown
from distill_core.types import Features, Fused, Outputs, Progress, Sample, View, Views

if TYPE_CHECKING:
    import numpy as np

    from distill_core.evaluate.sets import EvaluationSet
    from distill_core.model import Model
    from distill_core.objective import Objective


class ComponentConfig(BaseModel):
    """Base of every component's options: unknown keys are errors, types are strict, lists serve for tuples."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


@dataclass(frozen=True)
class ModalityPlan:
    """What is known of one modality before anything is built."""

    roles: tuple[str, ...]
    """The role of each view, globals first."""
    teacher_views: tuple[int, ...]
    """The views that the teacher encodes; empty without a teacher for this modality."""
    width: int
    """Tower width W of the tokens."""
    dim: int
    """Embedding width D."""
    has_tokens: bool
    can_mask: bool = False
    class_tokens: int = 0
    """Class tokens C that come with the embedding; 0 where the backbone gives none."""

    def views(self, role: str) -> tuple[int, ...]:
        """The numbers of the views of one role."""
        return tuple(i for i, r in enumerate(self.roles) if r == role)


@dataclass(frozen=True)
class Plan:
    """What is known of a recipe before anything is built."""

    modalities: Mapping[str, ModalityPlan]
    teacher: bool
    fusion: bool


@dataclass(frozen=True)
class Needs:
    """What a component needs of the recipe around it.

    `tokens` and `teacher_tokens` name the views whose tokens are read, counted as `ModalityPlan.roles` does (the
    teacher's features count only `teacher_views`); a backbone need not compute any other. `masked` names modalities
    whose backbone must be able to hide tokens.
    `views` asks for a least number of views: {modality: {role: number}}.
    """

    teacher: bool = False
    fused: bool = False
    modalities: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    teacher_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    views: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    masked: tuple[str, ...] = ()


class Component:
    """Base of all components: a `kind` (from the interface), a `name` that recipes use, and a `Config`."""

    kind: ClassVar[str]
    name: ClassVar[str]
    Config: ClassVar[type[ComponentConfig]] = ComponentConfig
    examples: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    """Options, as recipes write them, of small instances that `distill check-plugin` builds; {} is the defaults."""

    @classmethod
    def needs(cls, config: Any, plan: Plan) -> Needs:
        """What this component, with these options, needs of the recipe."""
        return Needs()

    @classmethod
    def problems(cls, config: Any, plan: Plan) -> Iterable[str]:
        """Further reasons, one line each, why it cannot work in this recipe (`plan` may lack broken modalities)."""
        return ()


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
        """The role of each view that `views` returns, globals first."""

    @abstractmethod
    def views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        """The sample's training views. Raises `BadSample` when it cannot be used."""

    @abstractmethod
    def read(self, sample: Sample, field: str | None = None) -> list[Any]:
        """The sample's items of this modality as they are (one picture; each caption), for evaluation.

        `field` names another field of the sample than the one that training reads. Raises `BadSample`.
        """

    @abstractmethod
    def plain(self, item: Any) -> View:
        """The deterministic view of one item, as `read` gives it or a user hands it to `Model.encode`.

        Raises `BadSample` for an item that cannot be read.
        """

    def show(self, view: View) -> Shown:
        """What a view looks like to a person, for trackers: a PIL image or a str; None where there is nothing to see.

        The default shows what is one of the two already.
        """
        from PIL import Image

        return view.data if isinstance(view.data, str | Image.Image) else None

    @classmethod
    def example_sample(cls, config: Any, rng: np.random.Generator) -> Sample:
        """A raw sample drawn from `rng` that these options can use, for `distill check-plugin`: bytes by field."""
        raise NotImplementedError(f"{cls.__name__}.example_sample(config, rng) is not written")


Collator = Callable[[list[list[View]], Sequence[int]], Views]
"""The views of B samples (V each, in the order of `roles`) and a seed for each sample -> their `Views`."""


@dataclass(frozen=True)
class Dims:
    """Tower width W of the tokens, embedding width D, whether there are tokens, whether some can be hidden, and the
    number C of `Features.class_tokens`."""  # fmt: skip

    width: int
    dim: int
    has_tokens: bool = True
    can_mask: bool = False
    class_tokens: int = 0


class Backbone(nn.Module, Component, ABC):
    """One modality: views -> features. `forward` is its only entry."""

    kind: ClassVar[str] = "backbone"

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    @abstractmethod
    def dims(cls, config: Any) -> Dims:
        """Widths, without building anything."""

    @classmethod
    @abstractmethod
    def collator(cls, config: Any) -> Collator:
        """A picklable callable for the workers: the views of B samples, and B seeds -> `Views`.

        Whatever it draws (masks, targets) it draws from generators of those seeds, one a sample.
        """

    @classmethod
    def example_views(cls, config: Any, rng: np.random.Generator) -> list[View]:
        """One sample's views drawn from `rng`, as an augmentation hands them over, for `distill check-plugin`.

        Roles and shapes are the same for every sample; a local view beside global ones checks more.
        """
        raise NotImplementedError(f"{cls.__name__}.example_views(config, rng) is not written")

    @abstractmethod
    def encode(self, x: Tensor, *, tokens: bool, token_mask: Tensor | None) -> Features:
        """Features of N inputs of one shape: `pooled` [1, N, D]; if `tokens`, tokens {0: [N, L, W]} and mask;
        `class_tokens` [1, N, C, W] where there are any.

        `token_mask` [N, L] is True where the input token must be hidden.
        """

    def encode_together(self, inputs: Sequence[tuple[Tensor, bool, Tensor | None]]) -> list[Features]:
        """`encode` of several (x, tokens, token_mask). A backbone that packs sequences overrides this."""
        return [self.encode(x, tokens=tokens, token_mask=hidden) for x, tokens, hidden in inputs]

    def forward(self, views: Views, *, need: Sequence[int] = (), masked: bool = False) -> Features:
        """Features of all views; tokens only of those in `need`; `masked` hides the tokens of `token_mask`.

        Each group's needed and other views are an input of `encode_together` each.
        """
        pooled: list[Tensor] = []
        classes: list[Tensor] = []
        features = Features(pooled=torch.empty(0))
        inputs: list[tuple[Tensor, bool, Tensor | None]] = []
        places: list[tuple[int, int, int]] = []  # first view, end, batch
        for start, group in views.numbered():
            count, batch = group.x.shape[:2]
            wanted = [start + i in need for i in range(count)]
            spans = [i for i in range(count) if i == 0 or wanted[i] != wanted[i - 1]] + [count]
            for first, last in pairwise(spans):
                hidden = group.token_mask[first:last].flatten(0, 1) if masked and group.token_mask is not None else None
                inputs.append((group.x[first:last].flatten(0, 1), wanted[first], hidden))
                places.append((start + first, start + last, batch))
        for part, (first, last, batch), (_, tokens, _) in zip(
            self.encode_together(inputs), places, inputs, strict=True
        ):
            pooled.append(part.pooled.reshape(last - first, batch, part.pooled.shape[-1]))
            if part.class_tokens is not None:
                classes.append(part.class_tokens.reshape(last - first, batch, *part.class_tokens.shape[2:]))
            if tokens:
                for i in range(first, last):
                    rows = slice((i - first) * batch, (i - first + 1) * batch)
                    features.tokens[i] = part.tokens[0][rows]
                    if 0 in part.masks:
                        features.masks[i] = part.masks[0][rows]
        features.pooled = torch.cat(pooled)
        features.class_tokens = torch.cat(classes) if len(classes) == len(pooled) else None
        return features


class FusionHead(nn.Module, Component, ABC):
    """Sees the student's features of every modality."""

    kind: ClassVar[str] = "fusion"

    def __init__(self, config: Any, plan: Plan) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(self, features: dict[str, Features]) -> Fused:
        """Fused embeddings, `pooled[m]` [V, B, D] and L2-normalised, for each modality m."""

    @abstractmethod
    def pool(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries [V, B, D] attend over one modality's tokens [B, L, W] (mask [B, L]) -> [V, B, D].

        For losses that pair queries and tokens themselves.
        """


class LossConfig(ComponentConfig):
    """Options that every loss has."""

    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of all of this loss's terms in the total."""


class Loss(nn.Module, Component, ABC):
    """Owns its temperatures, heads and centres. `forward` is pure; state moves in `after_step`."""

    kind: ClassVar[str] = "loss"
    Config: ClassVar[type[ComponentConfig]] = LossConfig
    teacher_modules: ClassVar[tuple[str, ...]] = ()
    """Names of own submodules of which the teacher keeps an EMA; read it by `outputs.ema(self.NAME)`."""

    def __init__(self, config: Any, plan: Plan) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def example_targets(cls, config: Any, modality: str, token_mask: Tensor) -> Tensor | None:
        """`Group.targets` [V, B, L, ...] of a modality that `needs` calls masked, for `distill check-plugin`."""
        return None

    @classmethod
    def example_fusion(cls, config: Any, plan: Plan) -> FusionHead | None:
        """The fusion that this loss works with, for `distill check-plugin`; None where any will do."""
        return None

    @abstractmethod
    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(terms, metrics): 0-dim tensors by name. The framework multiplies terms by `weight` and adds them up.

        Over several ranks each term is the mean over this rank's own rows, with its gradient through the gathered
        embeddings; the trainer averages gradients over ranks.
        """

    def after_step(self, outputs: Outputs, progress: Progress) -> None:
        """Move what is not learned by gradient (clamp scales, move centres); called after each optimiser step."""


class DataSource(Component, ABC):
    """Where shards come from."""

    kind = "source"

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def splits(cls, config: Any) -> tuple[str, ...] | None:
        """The splits it has, if its options tell: a recipe that evaluates on another is refused at once."""
        return None

    def prepare(self) -> None:
        """Write what must be written once (a cache), with a progress bar. Raises `DataError`."""

    @abstractmethod
    def sets(self, split: str) -> dict[str, list[str]]:
        """The shards of a split (`train`, `validation`, `test`), by set; {} where it has no such split.

        Training pools the sets; evaluations score each by itself. Raises `DataError`.
        """

    def size(self, split: str) -> int | None:
        """Samples in a split, if known; `train.epochs` needs it for `train`."""
        return None


class Evaluation(Component, ABC):
    """A task: scores a model on the sets of a split."""

    kind = "evaluation"

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def run(self, model: Model, sets: Sequence[EvaluationSet]) -> dict[str, float]:
        """Scores by name: `SET/score`, and `score` for the mean over sets. Raises `DataError`."""

    def media(self, model: Model, sets: Sequence[EvaluationSet], samples: int) -> Iterable[Media]:
        """What there is to see of it, for a tracker; asked for behind `run`, with the embeddings that it made.

        About `samples` pictures. It may read tokens (`model.features(..., need=...)`) and call `model.fusion`.
        """
        return ()


class Optimizer(Component, ABC):
    """Builds a torch optimiser."""

    kind = "optimizer"

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def groups(self, parameters: Sequence[tuple[str, nn.Parameter, float]]) -> list[dict[str, Any]]:
        """Parameter groups of (name, parameter, learning-rate factor)."""

    @abstractmethod
    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimiser. Each group's `lr` is its peak; the schedule multiplies it."""


class Schedule(Component, ABC):
    """The factor of the learning rate at each optimiser step."""

    kind = "schedule"

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def factor(self, step: int, steps: int) -> float:
        """Factor for optimiser step `step` (from 0) of `steps`."""


class TrackerConfig(ComponentConfig):
    """Options that every tracker has."""

    tags: tuple[str, ...] = ()
    """Words to find the run by, beside the names of its components."""
    media: Annotated[int, Field(ge=0)] = 4
    """Samples whose views, and queries whose matches, are shown as pictures; 0 sends no pictures or distributions."""
    media_every: Annotated[int, Field(gt=0)] = 200
    """Steps between pictures of training views; those of evaluations come with each evaluation."""


class Tracker(Component, ABC):
    """A place that metrics go to beside `metrics.jsonl`. Called on rank 0, in a thread of its own.

    Only `start`, `log` and `finish` must be there. A tracker whose `Config` is no `TrackerConfig` gets no media.
    """

    kind = "tracker"
    Config: ClassVar[type[ComponentConfig]] = TrackerConfig

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def start(self, folder: str, name: str, recipe: dict[str, Any], resume: bool) -> None:
        """Open the run of this name; `folder` is its run folder."""

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float], context: Mapping[str, str]) -> None:
        """Scalars of one step."""

    def describe(self, facts: Mapping[str, Any], tags: Sequence[str]) -> None:
        """What the run is made with (`distill_core.environment`: versions, device, git), and words to find it by.

        Called behind `start`, when a run is resumed as well.
        """

    def image(self, step: int, name: str, picture: Any, caption: str, context: Mapping[str, str]) -> None:
        """A picture: a path, a PIL image, or an array [H, W, 3] of uint8."""

    def distribution(self, step: int, name: str, values: np.ndarray, context: Mapping[str, str]) -> None:
        """Values [N], to be seen as a histogram."""

    @abstractmethod
    def finish(self) -> None:
        """Flush and close."""


@dataclass(frozen=True)
class Loaded:
    """What an initializer did: one line for the user, and the names of the objective's tensors that it loaded."""

    line: str
    names: frozenset[str]


class Initializer(Component, ABC):
    """Weights to start from: an entry of a recipe's `init`."""

    kind = "init"

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def apply(self, objective: Objective) -> Loaded:
        """Load weights into the objective. Raises `UserError`, and has loaded nothing then.

        What the teacher is not given it takes from the student afterwards.
        """


INTERFACES: dict[str, type[Component]] = {
    interface.kind: interface
    for interface in (
        Augmentation, Backbone, FusionHead, Loss, DataSource, Evaluation, Optimizer, Schedule, Tracker, Initializer,
    )
}  # fmt: skip


def same_dim(name: str, modalities: Sequence[str], plan: Plan) -> Iterable[str]:
    """What is wrong when a component compares embeddings of several modalities: their widths D must agree."""
    dims = {m: plan.modalities[m].dim for m in modalities if m in plan.modalities}
    if len(set(dims.values())) > 1:
        shown = ", ".join(f"{modality} {dim}" for modality, dim in dims.items())
        yield f"{name!r} compares embeddings of one width D; the backbones give {shown}"
