"""What comes out of a forward pass, for losses to read.

Shape legend, used in every docstring of the project:

    V views (globals first)   B batch (of this rank)   M batch of all ranks   L tokens
    D embedding               W tower width            H heads                K head width
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from distill_core.batch import Views
from distill_core.plan import DEFAULT_FUSION
from distill_core.presence import Presence, Present
from distill_core.system.distributed import all_gather, all_gather_together, gather_array, rank, world_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

K = TypeVar("K")
T = TypeVar("T")


@dataclass(slots=True)
class Encoded:
    """What a backbone makes of N inputs of one shape.

    pooled        [N, D]     one embedding each, projected, not normalised
    tokens        [N, L, W]  where they were asked for
    mask          [N, L]     True where a token is real; None where none is padding
    class_tokens  [N, C, W]  what `pooled` was projected from (class or end-of-text tokens), where there is such
    layers        layer -> [N, L, W]  those that were asked for: what the layer gives, before any final norm
    """

    pooled: Tensor
    tokens: Tensor | None = None
    mask: Tensor | None = None
    class_tokens: Tensor | None = None
    layers: Mapping[int, Tensor] = field(default_factory=dict)

    def __getitem__(self, rows: slice) -> Encoded:
        """Some of the inputs."""
        return self._map(lambda x: x[rows])

    def repeated(self, times: int) -> Encoded:
        """Each input so many times, one after the other."""
        return self if times == 1 else self._map(lambda x: x.repeat_interleave(times, 0))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Encoded:
        tokens, mask, classes = (
            None if x is None else function(x) for x in (self.tokens, self.mask, self.class_tokens)
        )
        layers = {layer: function(x) for layer, x in self.layers.items()}
        return Encoded(function(self.pooled), tokens, mask, classes, layers)


class Rows:
    """Embeddings that losses over pairs compare: this rank's rows, and with them the rows of all ranks.

    embedding  [V, B, D]  this rank's
    gathered   [V, M, D]  those of all ranks, with gradients
    offset                where this rank's rows begin among the M
    """

    def __init__(
        self,
        embedding: Tensor,
        gather: Callable[[], Tensor] | None = None,
        present: Present | None = None,
        each: int = 1,
    ) -> None:
        """`gather` makes [V, M, D] of all ranks; None gathers `embedding`. `present` says whose rows they are, `each`
        of them a sample; None: those of all samples."""
        self.embedding, self.present, self.each = embedding, present, each
        self._gather = gather
        self._gathered: Tensor | None = None
        self._origins: list[tuple[Rows, int]] | None = None
        self._views: list[int] = []
        self._of_all_ranks: Tensor | None = None  # [of `_views`, M, D]

    @property
    def offset(self) -> int:
        """The place of this rank's first row in `gathered`."""
        own: int = self.embedding.shape[1]
        return rank() * own if self.present is None else self.present.offset * self.each

    @property
    def origins(self) -> list[tuple[Rows, int]]:
        """Each view as a view of the rows that it was first part of, which hold what is gathered."""
        return [(self, view) for view in range(len(self))] if self._origins is None else self._origins

    @property
    def gathered(self) -> Tensor:
        """[V, M, D]. What `gather_rows` has not brought yet is gathered now, in a collective that every rank must
        reach."""
        if self._gathered is None:  # no cached_property, which torch.compile does not trace in Python 3.11
            self._gathered = self._read_all()
        return self._gathered

    def _read_all(self) -> Tensor:
        if self._origins is None:
            return self._read(list(range(len(self))))
        runs: list[tuple[Rows, list[int]]] = []
        for rows, view in self._origins:
            if not runs or runs[-1][0] is not rows:
                runs.append((rows, []))
            runs[-1][1].append(view)
        parts = [self._selected(rows._read(views), rows) for rows, views in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __len__(self) -> int:
        return len(self.embedding)

    def __getitem__(self, views: slice | Sequence[int]) -> Rows:
        """Some of the views; what is gathered is shared with the whole."""
        numbers = range(len(self))[views] if isinstance(views, slice) else views
        some = Rows(self.embedding[views], present=self.present, each=self.each)
        some._origins = [self.origins[number] for number in numbers]
        return some

    def of(self, present: Present) -> Rows:
        """Of some of the samples; what is gathered is shared with the whole."""
        if present is self.present:
            return self
        some = Rows(present.of(self.embedding, 1, self.present), present=present)
        some._origins = self.origins
        return some

    @staticmethod
    def cat(parts: Sequence[Rows]) -> Rows:
        """The views of several, one after the other; all of them of the same samples."""
        whole = Rows(torch.cat([x.embedding for x in parts]), present=parts[0].present, each=parts[0].each)
        whole._origins = [origin for x in parts for origin in x.origins]
        return whole

    def _selected(self, gathered: Tensor, origin: Rows) -> Tensor:
        return gathered if self.present is None else self.present.of_all_ranks(gathered, 1, origin.present)

    def _read(self, views: list[int]) -> Tensor:
        """[views, M, D] of all ranks."""
        if self._of_all_ranks is None or not set(views) <= set(self._views):
            self._views = list(range(len(self)))
            self._of_all_ranks = self._arrived(all_gather(self._sent, 1)) if self._gather is None else self._gather()
        return _some(self._of_all_ranks, [self._views.index(view) for view in views])

    @property
    def _sent(self) -> Tensor:
        """As many rows on each rank."""
        return self.embedding if self.present is None else self.present.padded(self.embedding, 1, self.each)

    def _arrived(self, gathered: Tensor) -> Tensor:
        return gathered if self.present is None else self.present.unpadded(gathered, 1, self.each)


def gather_rows(every: Iterable[Rows], wire: torch.dtype | None = None) -> None:
    """Gather all that these read of all ranks: one collective, and one in the backward pass. Each view goes once.

    Nothing is done in one process. `wire` is the dtype that travels (`distributed.all_gather_together`).
    """
    if world_size() == 1:
        return
    views: dict[Rows, set[int]] = {}
    for part in every:
        for rows, view in part.origins:
            if rows._gather is None:
                views.setdefault(rows, set()).add(view)
    chosen = [(rows, sorted(numbers)) for rows, numbers in views.items()]
    gathered = all_gather_together([_some(rows._sent, numbers) for rows, numbers in chosen], 1, wire)
    for (rows, numbers), of_all_ranks in zip(chosen, gathered, strict=True):
        rows._views, rows._of_all_ranks = numbers, rows._arrived(of_all_ranks)


def _some(x: Tensor, views: list[int]) -> Tensor:
    """x[views], without a copy where they stand together."""
    first, last = views[0], views[-1]
    if views != list(range(first, last + 1)):
        return x[views]
    return x if len(views) == len(x) else x[first : last + 1]


class Selected(Mapping[K, T]):
    """Some of a mapping's values, each cut when it is first read."""

    def __init__(self, whole: Mapping[K, T], cut: Callable[[K, T], T], names: Iterable[K] | None = None) -> None:
        """`names` of the whole; None: all."""
        self._whole, self._cut, self._names = whole, cut, list(whole if names is None else names)
        self._made: dict[K, T] = {}

    def __getitem__(self, name: K) -> T:
        if name not in self._made:
            if name not in self._names:
                raise KeyError(name)
            self._made[name] = self._cut(name, self._whole[name])
        return self._made[name]

    def __iter__(self) -> Iterator[K]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(kw_only=True)
class _Embedded:
    """What has one embedding a view: `rows` are made once, however many losses read them.

    `present`: the samples whose it is, where some lack the modality; `whole`: what it was cut from.
    """

    present: Present | None = None
    whole: Self | None = field(default=None, repr=False)
    _rows = cast("Rows | None", None)  # no field, since it has no annotation

    @property
    def rows(self) -> Rows:
        """L2-normalised, at least fp32."""
        if self._rows is None:
            whole, present = self.whole, self.present
            self._rows = self._make_rows() if whole is None or present is None else whole.rows.of(present)
        return self._rows

    @abstractmethod
    def _make_rows(self) -> Rows: ...

    @property
    def embedding(self) -> Tensor:
        """[V, B, D] of this rank, L2-normalised, at least fp32."""
        return self.rows.embedding

    @property
    def gathered(self) -> Tensor:
        """`embedding` of all ranks, [V, M, D], with gradients."""
        return self.rows.gathered


@dataclass
class Features(_Embedded):
    """What a backbone makes of its views.

    pooled        [V, B, D]          one embedding a view, projected, not normalised
    tokens        view -> [B, L, W]  only of the views that something needs
    masks         view -> [B, L]     True where a token is real; a view without an entry has no padding
    class_tokens  [V, B, C, W]       what `pooled` was projected from (class or end-of-text tokens), where there is such
    layers        layer -> view -> [B, L, W]  tokens as the layer gives them, before any final norm; only what is needed
    attention     view -> [B, H, L]  the weights with which the last block reads the tokens for `pooled`; only of
                  teachers, of the views that something needs
    """

    pooled: Tensor
    tokens: Mapping[int, Tensor] = field(default_factory=dict)
    masks: Mapping[int, Tensor] = field(default_factory=dict)
    class_tokens: Tensor | None = None
    layers: Mapping[int, Mapping[int, Tensor]] = field(default_factory=dict)
    attention: Mapping[int, Tensor] = field(default_factory=dict)

    def _make_rows(self) -> Rows:
        with torch.autocast(self.pooled.device.type, enabled=False):
            return Rows(normalize(wide(self.pooled), dim=-1), present=self.present)

    def view(self, number: int) -> Encoded:
        """One view of the B samples; its tokens where they were asked for."""
        return Encoded(
            self.pooled[number],
            self.tokens.get(number),
            self.masks.get(number),
            None if self.class_tokens is None else self.class_tokens[number],
            {layer: views[number] for layer, views in self.layers.items() if number in views},
        )

    def of(self, present: Present) -> Features:
        """Of the samples `present`, among those that this is of."""
        if present is self.present:
            return self

        def cut(_: int, x: Tensor) -> Tensor:
            return present.of(x, 0, self.present)

        classes = None if self.class_tokens is None else present.of(self.class_tokens, 1, self.present)
        tokens, masks, attention = (Selected(x, cut) for x in (self.tokens, self.masks, self.attention))
        layers = {layer: Selected(views, cut) for layer, views in self.layers.items()}
        pooled = present.of(self.pooled, 1, self.present)
        return Features(pooled, tokens, masks, classes, layers, attention, present=present, whole=self)


@dataclass
class Fused(_Embedded):
    """What a fusion head makes of one modality.

    pooled  [V, B, D]  one embedding a view, L2-normalised
    tokens  [B, L, D]  for methods whose losses read fused tokens
    """

    pooled: Tensor
    tokens: Tensor | None = None

    def _make_rows(self) -> Rows:
        return Rows(wide(self.pooled), present=self.present)  # as the fusion normalised them

    def of(self, present: Present) -> Fused:
        """Of the samples `present`, among those that this is of."""
        if present is self.present:
            return self
        tokens = None if self.tokens is None else present.of(self.tokens, 0, self.present)
        return Fused(present.of(self.pooled, 1, self.present), tokens, present=present, whole=self)


def wide(x: Tensor) -> Tensor:
    """In fp32, or wider where `x` is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Fusion(Protocol):
    """What a loss may call of the recipe's fusion (`FusionHead`), and what that offers besides (`TokenPooling`)."""

    def __call__(self, features: dict[str, Features]) -> dict[str, Fused]:
        """Fused embeddings of other features than the step's."""
        ...


@dataclass(frozen=True, slots=True)
class NamedFusion:
    """One of a recipe's `fusions`, and what it made of a step."""

    head: Fusion
    fused: Mapping[str, Fused]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the run is: `step` counts from 0, `steps` is the whole run, `epoch` is samples seen / samples."""

    step: int
    steps: int
    epoch: float = 0.0

    @property
    def fraction(self) -> float:
        """The part of the run that is done, 0 to 1."""
        return self.step / max(self.steps, 1)

    def is_logged(self, every: int) -> bool:
        """Whether this step has a row in metrics.jsonl: each `every`-th, and the last."""
        return (self.step + 1) % every == 0 or self.step + 1 == self.steps


def _no_teacher(module: nn.Module) -> nn.Module:
    raise KeyError("not one of this recipe's teacher_modules, or the recipe has no teacher")


@dataclass(slots=True)
class Outputs:
    """Everything a loss may read of one step, by modality.

    outputs.student["image"].embedding               [V, B, D]  this rank's rows, L2-normalised
    outputs.teacher["default"]["image"].gathered     [V, M, D]  all ranks' rows of the views that this teacher saw
    outputs.fused["image"].rows[:1]                  both of the first view, as losses over pairs take them
    outputs.student["image"].tokens[0]               [B, L, W]  where `Needs` names the view

    Where samples may lack a modality (`data.optional`), the B samples that a loss is given are those that have all that
    it needs.
    """

    views: Mapping[str, Views] = field(default_factory=dict)
    student: Mapping[str, Features] = field(default_factory=dict)
    teacher: Mapping[str, Mapping[str, Features]] = field(default_factory=dict)
    """Teacher's name -> modality; empty without a teacher. It encodes only the views of its `TeacherPlan`."""
    fused: Mapping[str, Fused] = field(default_factory=dict)
    """Empty where no loss reads fused views."""
    fusion: Fusion | None = None
    progress: Progress = Progress(0, 1)
    ema: Callable[..., nn.Module] = _no_teacher
    """(module, teacher's name, `default` if left out) -> that teacher's copy of one of the loss's own
    `teacher_modules`, of one of `heads`, or of `fusion`. Raises KeyError where there is none."""
    keys: Sequence[str] = ()
    """Of the B samples."""
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    """What `data.fields` reads of the samples, [B, ...] each."""
    presence: Presence | None = None
    """Which samples have what, where some lack a modality."""
    present: Present | None = None
    """The samples that these outputs are of, where they are not all."""
    heads: Mapping[str, Any] = field(default_factory=dict)
    """The recipe's heads, by name, to be called."""
    fusions: Mapping[str, NamedFusion] = field(default_factory=dict)
    """The recipe's `fusions`, by name. A loss that names one reads it as `fusion` and `fused`."""
    _cut: dict[tuple[frozenset[str], bool], Outputs] = field(default_factory=dict, repr=False)
    _reading: dict[str, Outputs] = field(default_factory=dict, repr=False)

    @property
    def weight(self) -> float:
        """Of this rank's mean in the mean over ranks: its share of the samples, times the ranks. The framework weighs
        terms by it; a loss weighs what it averages over ranks itself."""
        return 1.0 if self.present is None else self.present.weight

    @property
    def filler(self) -> bool:
        """Whether this rank has no sample: B is 1 then, a row whose `weight` is 0."""
        return self.present is not None and self.present.filler

    def rows(self, embedding: Tensor, each: int = 1) -> Rows:
        """What a loss has made of the samples, [V, B * each, D] with `each` rows a sample, as `Rows` over all ranks."""
        return Rows(embedding, present=self.present, each=each)

    def only(self, mask: NDArray[np.bool_]) -> Outputs:
        """The outputs of those samples of this rank whose `mask` [B] is True, for a loss inside another that is
        `partial`. Every rank calls it, which is a collective on the host; one without any has a filler.

        The outer loss weighs the terms by `weight` of these outputs over that of its own.
        """
        whole = mask
        if self.present is not None:
            whole = np.zeros(self.present.batch, np.bool_)
            whole[self.present.own] = mask & (not self.present.filler)
        return self.of(Present(gather_array(whole), rank()))

    def of(self, present: Present) -> Outputs:
        """Of the samples `present`, among those that these are of; what is of other samples is left out."""

        def cut(features: Mapping[str, Any]) -> dict[str, Any]:
            return {name: x.of(present) for name, x in features.items() if x.present is self.present}

        def complete(name: str) -> bool:
            return self.present is not None or self.presence is None or self.presence.of([name]) is None

        places = present.places(self.present)
        return replace(
            self,
            views={n: views.rows(present, self.present) for n, views in self.views.items() if complete(n)},
            student=cut(self.student),
            teacher={name: cut(side) for name, side in self.teacher.items()},
            fused=cut(self.fused),
            keys=self.keys if places is None else [self.keys[int(i)] for i in places],
            fields={name: present.of(x, 0, self.present) for name, x in self.fields.items()},
            present=present,
            fusions={name: replace(named, fused=cut(named.fused)) for name, named in self.fusions.items()},
            _cut={},
            _reading={},
        )

    def reading(self, fusion: str) -> Outputs:
        """The outputs as a loss is given them that reads this fusion."""
        if fusion == DEFAULT_FUSION:
            return self
        if fusion not in self._reading:
            named = self.fusions[fusion]
            self._reading[fusion] = replace(self, fused=named.fused, fusion=named.head, _cut={}, _reading={})
        return self._reading[fusion]

    def having(self, names: Iterable[str], fused: bool = False) -> Outputs:
        """The outputs of those samples alone that have all these modalities, and with `fused` what the fusion reads.

        They hold what every sample has, and what is named.
        """
        key = frozenset(names), fused
        if self.presence is None:
            return self
        if key not in self._cut:
            self._cut[key] = self._having(*key, self.presence)
        return self._cut[key]

    def _having(self, names: frozenset[str], fused: bool, presence: Presence) -> Outputs:
        present = presence.of(names)
        if present is None:
            return self
        known = [name for name in self.views if name in names or name not in presence.masks]

        def of(features: Mapping[str, Features]) -> dict[str, Features]:
            return {name: f.of(present) for name, f in features.items() if name in known}

        return replace(
            self,
            views=Selected(self.views, lambda name, views: views.rows(present, presence.of([name])), known),
            student=of(self.student),
            teacher={name: of(side) for name, side in self.teacher.items()},
            fused={name: f.of(present) for name, f in self.fused.items()} if fused else {},
            keys=[self.keys[int(i)] for i in present.own],
            fields={
                name: present.of(x, 0, None)
                for name, x in self.fields.items()
                if name in names or name not in presence.masks
            },
            present=present,
            _cut={},
            _reading={},
        )
