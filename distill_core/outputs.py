"""What comes out of a forward pass, for losses to read.

Shape legend, used in every docstring of the project:

    V views (globals first)   B batch (of this rank)   M batch of all ranks   L tokens
    D embedding               W tower width            H heads                K head width
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from distill_core.batch import Views
from distill_core.system.distributed import all_gather, all_gather_together, world_size


@dataclass(slots=True)
class Encoded:
    """What a backbone makes of N inputs of one shape.

    pooled        [N, D]     one embedding each, projected, not normalised
    tokens        [N, L, W]  where they were asked for
    mask          [N, L]     True where a token is real; None where none is padding
    class_tokens  [N, C, W]  what `pooled` was projected from (class or end-of-text tokens), where there is such
    """

    pooled: Tensor
    tokens: Tensor | None = None
    mask: Tensor | None = None
    class_tokens: Tensor | None = None


class Rows:
    """Embeddings that losses over pairs compare: this rank's rows, and with them the rows of all ranks.

    embedding  [V, B, D]  this rank's
    gathered   [V, M, D]  those of all ranks, with gradients
    """

    def __init__(self, embedding: Tensor, gather: Callable[[], Tensor] | None = None) -> None:
        """`gather` makes [V, M, D] of all ranks; None gathers `embedding`."""
        self.embedding = embedding
        self._gather = gather
        self._gathered: Tensor | None = None
        self._origins: list[tuple[Rows, int]] | None = None
        self._views: list[int] = []
        self._of_all_ranks: Tensor | None = None  # [of `_views`, M, D]

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
        parts = [rows._read(views) for rows, views in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __len__(self) -> int:
        return len(self.embedding)

    def __getitem__(self, views: slice | Sequence[int]) -> Rows:
        """Some of the views; what is gathered is shared with the whole."""
        numbers = range(len(self))[views] if isinstance(views, slice) else views
        some = Rows(self.embedding[views])
        some._origins = [self.origins[number] for number in numbers]
        return some

    @staticmethod
    def cat(parts: Sequence[Rows]) -> Rows:
        """The views of several, one after the other."""
        whole = Rows(torch.cat([x.embedding for x in parts]))
        whole._origins = [origin for x in parts for origin in x.origins]
        return whole

    def _read(self, views: list[int]) -> Tensor:
        """[views, M, D] of all ranks."""
        if self._of_all_ranks is None or not set(views) <= set(self._views):
            self._views = list(range(len(self)))
            self._of_all_ranks = all_gather(self.embedding, dim=1) if self._gather is None else self._gather()
        return _some(self._of_all_ranks, [self._views.index(view) for view in views])


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
    gathered = all_gather_together([_some(rows.embedding, numbers) for rows, numbers in chosen], 1, wire)
    for (rows, numbers), of_all_ranks in zip(chosen, gathered, strict=True):
        rows._views, rows._of_all_ranks = numbers, of_all_ranks


def _some(x: Tensor, views: list[int]) -> Tensor:
    """x[views], without a copy where they stand together."""
    first, last = views[0], views[-1]
    if views != list(range(first, last + 1)):
        return x[views]
    return x if len(views) == len(x) else x[first : last + 1]


class _Embedded:
    """What has one embedding a view: `rows` are made once, however many losses read them."""

    pooled: Tensor
    _rows = cast("Rows | None", None)  # no field, since it has no annotation

    @property
    def rows(self) -> Rows:
        """L2-normalised, at least fp32."""
        if self._rows is None:
            self._rows = self._make_rows()
        return self._rows

    def _make_rows(self) -> Rows:
        with torch.autocast(self.pooled.device.type, enabled=False):
            return Rows(normalize(wide(self.pooled), dim=-1))

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
    """

    pooled: Tensor
    tokens: dict[int, Tensor] = field(default_factory=dict)
    masks: dict[int, Tensor] = field(default_factory=dict)
    class_tokens: Tensor | None = None


@dataclass
class Fused(_Embedded):
    """What a fusion head makes of one modality.

    pooled  [V, B, D]  one embedding a view, L2-normalised
    tokens  [B, L, D]  for methods whose losses read fused tokens
    """

    pooled: Tensor
    tokens: Tensor | None = None

    def _make_rows(self) -> Rows:
        return Rows(wide(self.pooled))  # as the fusion normalised them


def wide(x: Tensor) -> Tensor:
    """In fp32, or wider where `x` is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Fusion(Protocol):
    """What a loss may call of the recipe's fusion (`FusionHead`), and what that offers besides (`TokenPooling`)."""

    def __call__(self, features: dict[str, Features]) -> dict[str, Fused]:
        """Fused embeddings of other features than the step's."""
        ...


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


@dataclass(slots=True)
class Outputs:
    """Everything a loss may read of one step, by modality.

    outputs.student["image"].embedding               [V, B, D]  this rank's rows, L2-normalised
    outputs.teacher["default"]["image"].gathered     [V, M, D]  all ranks' rows of the views that this teacher saw
    outputs.fused["image"].rows[:1]                  both of the first view, as losses over pairs take them
    outputs.student["image"].tokens[0]               [B, L, W]  where `Needs` names the view
    """

    views: dict[str, Views]
    student: dict[str, Features]
    teacher: dict[str, dict[str, Features]]
    """Teacher's name -> modality; empty without a teacher. A teacher sees only the views whose role it is given."""
    fused: dict[str, Fused]
    """Empty where no loss reads fused views."""
    fusion: Fusion | None
    progress: Progress
    ema: Callable[[nn.Module], nn.Module]
    """The teacher's copy of one of the loss's own `teacher_modules`."""
