"""The contract of what says which tokens the student sees: it stands between the teachers' pass and the student's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from distill_core.batch import GLOBAL, REPEATED, Group, Views
from distill_core.contracts.component import Component, ComponentConfig
from distill_core.data.order import stable_hash
from distill_core.plan import Needs, Plan

if TYPE_CHECKING:
    from distill_core.outputs import Features

PREDICTED = "predicted"
"""The extra of the tokens that a loss is to predict, by number; -1 fills up. The student must not see any of them."""


class MaskerConfig(ComponentConfig):
    """Options that every masker has."""

    role: str = GLOBAL
    """Role of the views that are masked, for the student alone: teachers and evaluation see them whole."""


@dataclass(frozen=True, slots=True)
class Mask:
    """Of one view of one sample, over its L tokens (those of a grid row by row). All draws have the same shapes.

    keep   [L'] int64   the tokens that the student sees at all, ascending, none twice
    hidden [L] bool     True where the student sees a mask token in place of the token
    extra  name -> an array or a number that belongs to the mask, as what is to be predicted (`PREDICTED`)
    """

    keep: NDArray[np.int64] | None = None
    hidden: NDArray[np.bool_] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class Masker(Component, ABC):
    """Masks of the views of one modality. `draw` runs in the loader's workers, `choose` in the step; it is picklable.

    All randomness is in `draw`, by a generator of (seed, epoch, sample key, modality): so a resumed run, a replayed
    step and a micro-batch see the same masks. What a mask of several samples' views must share (the number of kept
    tokens) follows from the options alone.
    """

    kind: ClassVar[str] = "masker"
    Config: ClassVar[type[ComponentConfig]] = MaskerConfig
    drops: ClassVar[bool] = False
    """Whether its masks have `keep`."""
    hides: ClassVar[bool] = False
    """Whether its masks have `hidden`."""

    def __init__(self, config: Any, modality: str, plan: Plan) -> None:
        self.config, self.modality = config, modality
        self.grid_of = plan.modalities[modality].spec.grid

    @classmethod
    def times(cls, config: Any) -> int:
        """How many masks each view has. The student sees the view once with each: in its place with the first, and
        after all views, with the role `repeated`, with the others; the batch holds it once."""
        return 1

    @classmethod
    def extras(cls, config: Any) -> tuple[str, ...]:
        """The names in `Mask.extra`, which losses ask for by `Needs.extra` and read in `Group.extra`."""
        return ()

    @classmethod
    def reads(cls, config: Any, modality: str, plan: Plan) -> Needs:
        """What `choose` reads of teachers: `Needs.teacher` (tokens), `Needs.attention`."""
        return Needs()

    @classmethod
    def grid_problems(cls, config: Any, grid: tuple[int, ...]) -> Iterable[str]:
        """Reasons, one line each, why it cannot mask views whose tokens lie so."""
        return ()

    @abstractmethod
    def draw(self, grid: tuple[int, ...], rng: np.random.Generator) -> Mask:
        """One mask of one view, whose tokens lie in this grid, (rows, columns) of an image."""

    def choose(self, group: Group, teacher: Mapping[str, Features]) -> Group:
        """The group of masked views with its final masks, by what the teachers have made of the sample: their features
        of this modality, by name. Before the student's pass, without gradients.

        `group` has what was drawn: `keep`, `token_mask` and `extra` [K * V, B, ...], row k * V + v of mask k, view v.
        It draws nothing, changes no tensor in place, and of the group nothing but these three; a sample's masks do not
        depend on the others of its batch. The default takes what was drawn.
        """
        return group

    def drawn(self, views: Views, seeds: Sequence[int]) -> Views:
        """In a worker: the views of B samples with the masks that are drawn by their seeds.

        Raises ValueError for views that have masks of their own, or an extra of the same name, and for masks of
        different shapes.
        """
        generators = [np.random.default_rng(stable_hash(seed, "masker", self.modality)) for seed in seeds]
        role = self.config.role
        return Views([self._drawn(group, generators) if group.role == role else group for group in views.groups])

    def _drawn(self, group: Group, generators: Sequence[np.random.Generator]) -> Group:
        if group.token_mask is not None or group.keep is not None:
            raise ValueError(f"{group.role} views are masked twice: by the backbone's collator, and by {self.name!r}")
        grid = self.grid_of(group.x.shape[2:])
        count = group.x.shape[0] * self.times(self.config)
        masks = [[self.draw(grid, rng) for _ in range(count)] for rng in generators]  # B x (K * V)

        def stacked(values: list[list[Any]]) -> torch.Tensor:
            return torch.from_numpy(np.stack([np.stack(of_sample) for of_sample in values], 1))

        first = masks[0][0]
        if taken := first.extra.keys() & group.extra.keys():
            raise ValueError(f"{self.name!r} draws the extra {min(taken)!r}, which its views have already: rename it")
        keep = stacked([[mask.keep for mask in row] for row in masks]) if first.keep is not None else None
        hidden = stacked([[mask.hidden for mask in row] for row in masks]) if first.hidden is not None else None
        extra = {name: stacked([[mask.extra[name] for mask in row] for row in masks]) for name in first.extra}
        return replace(group, keep=keep, token_mask=hidden, extra={**group.extra, **extra})

    def chosen(self, views: Views, teacher: Mapping[str, Features]) -> Views:
        """`choose`, of the groups that are masked. Where it makes another `token_mask`, what the worker has located
        (`Group.hidden`) holds no longer: `Group.places` looks again."""
        groups = []
        for group in views.groups:
            if group.role == self.config.role:
                own = self.choose(group, teacher)
                group = replace(own, hidden=group.hidden if own.token_mask is group.token_mask else None)
            groups.append(group)
        return Views(groups)

    def with_masks(self, views: Views, masked: Sequence[Views]) -> Views:
        """The views with the masks that parts of them, one after the other, have."""
        groups = []
        for i, group in enumerate(views.groups):
            if group.role == self.config.role:
                parts = [part.groups[i] for part in masked]
                keep, hidden = ([getattr(part, name) for part in parts] for name in ("keep", "token_mask"))
                extra = {name: torch.cat([part.extra[name] for part in parts], 1) for name in self.extras(self.config)}
                group = replace(
                    group,
                    keep=torch.cat(keep, 1) if keep[0] is not None else None,
                    token_mask=torch.cat(hidden, 1) if hidden[0] is not None else None,
                    extra={**group.extra, **extra},
                    hidden=None,
                )
            groups.append(group)
        return Views(groups)

    def repeated(self, views: Views) -> Views:
        """The views as the student sees them: each once with each of its masks. Their data are shared, not copied."""
        times, own = self.times(self.config), self.extras(self.config)
        groups, more = [], []
        for group in views.groups:
            if group.role != self.config.role or times == 1:
                groups.append(group)
                continue
            count = group.x.shape[0]
            parts = [_masks_of(group, k * count, (k + 1) * count, own) for k in range(times)]
            groups.append(parts[0])
            more += [replace(part, role=REPEATED) for part in parts[1:]]
        return Views(groups + more)


def _masks_of(group: Group, first: int, last: int, own: Sequence[str]) -> Group:
    """The group with these of its masks; `own` are the extras that belong to them."""
    return replace(
        group,
        keep=None if group.keep is None else group.keep[first:last],
        token_mask=None if group.token_mask is None else group.token_mask[first:last],
        hidden=None if group.hidden is None else group.hidden[first:last],
        extra={name: x[first:last] if name in own else x for name, x in group.extra.items()},
    )
