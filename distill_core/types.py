"""What flows through a training step.

Shape legend, used in every docstring of the project:

    V views (globals first)   B batch (of this rank)   M batch of all ranks   L tokens
    D embedding               W tower width            H heads                K head width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, device, nn

    from distill_core.components import FusionHead

GLOBAL = "global"
LOCAL = "local"

Sample = Mapping[str, Any]
"""One raw sample of a shard: `__key__`, `__url__`, and a field's name (its extension) -> bytes."""


@dataclass(frozen=True, slots=True)
class View:
    """One view of one sample, before it is collated.

    `data` is whatever the modality's backbone collates (a tensor, a string). `role` is `global`, `local` or a
    method's own word. `source` says what the view was cut from (which caption, which crop).
    """

    data: Any
    role: str = GLOBAL
    source: int = 0


@dataclass(slots=True)
class Group:
    """The views of one modality that share a shape and a role.

    x           [V, B, ...]    pixels [V, B, 3, S, S], token ids [V, B, L], or what the backbone takes
    source      [V, B]         what each view was cut from
    token_mask  [V, B, L]      True where the student must not see the token (masked modelling)
    targets     [V, B, L, ..]  what a masked token should be predicted as
    """

    x: Tensor
    role: str = GLOBAL
    source: Tensor | None = None
    token_mask: Tensor | None = None
    targets: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Group:
        """The same group with every tensor replaced."""
        others = {name: getattr(self, name) for name in ("source", "token_mask", "targets")}
        return Group(function(self.x), self.role, **{k: None if v is None else function(v) for k, v in others.items()})


@dataclass(slots=True)
class Views:
    """All views of one modality, in groups; view i counts through the groups in order, globals first."""

    groups: list[Group]

    def __len__(self) -> int:
        return sum(group.x.shape[0] for group in self.groups)

    @property
    def roles(self) -> tuple[str, ...]:
        """The role of each view, length V."""
        return tuple(group.role for group in self.groups for _ in range(group.x.shape[0]))

    def numbered(self) -> Iterator[tuple[int, Group]]:
        """Each group with the number of its first view."""
        start = 0
        for group in self.groups:
            yield start, group
            start += group.x.shape[0]

    def only(self, roles: Sequence[str]) -> Views:
        """The groups of these roles."""
        return Views([group for group in self.groups if group.role in roles])

    def map(self, function: Callable[[Tensor], Tensor]) -> Views:
        """The same views with every tensor replaced."""
        return Views([group.map(function) for group in self.groups])


WHOLE_SHARD, REST_OF_SHARD = "(whole shard)", "(rest of the shard)"
"""In place of a sample's key: all or the rest of a shard, of which nobody knows how many samples it has."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A sample that could not be used, or all or the rest of a shard, and why."""

    key: str
    url: str
    reason: str

    def __str__(self) -> str:
        if self.key in (WHOLE_SHARD, REST_OF_SHARD):
            return f"{self.key.strip('()')}: {self.reason}"  # which names the shard
        return f"sample {self.key!r} of {self.url}: {self.reason}"


@dataclass(slots=True)
class Batch:
    """B samples: their views by modality, their keys, and the samples that were passed over on the way.

    `measures` is what the augmentations measured of the samples, {modality: {measure: value}} each; the first alone.
    """

    views: dict[str, Views]
    keys: list[str]
    skipped: list[Skipped] = field(default_factory=list)
    measures: list[dict[str, Mapping[str, float]]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, where: device | str) -> Batch:
        """The same batch on another device."""
        return self._map(lambda x: x.to(where, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in pinned memory; the loader calls this by its name."""
        return self._map(lambda x: x.pin_memory())

    def share_memory(self) -> None:
        """Move the tensors, in place, to memory that another process can open. Raises RuntimeError where it is full."""
        self._map(lambda x: x.share_memory_())  # type: ignore[no-untyped-call]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        views = {name: views.map(function) for name, views in self.views.items()}
        return Batch(views, self.keys, self.skipped, self.measures)


@dataclass(slots=True)
class Features:
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


@dataclass(slots=True)
class Fused:
    """What a fusion head makes of all modalities.

    pooled  modality -> [V, B, D]     one embedding a view, L2-normalised
    tokens  modality -> [B, L, D]     for methods whose losses read fused tokens
    """

    pooled: dict[str, Tensor]
    tokens: dict[str, Tensor] = field(default_factory=dict)


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


@dataclass(slots=True)
class Outputs:
    """Everything a loss may read of one step.

    `student` and `teacher` hold un-normalised embeddings; the teacher saw only the views whose role it is given.
    """

    views: dict[str, Views]
    student: dict[str, Features]
    teacher: dict[str, Features]
    fused: Fused | None
    fusion: FusionHead | None
    progress: Progress
    ema: Callable[[nn.Module], nn.Module]
    """The teacher's copy of one of the loss's own `teacher_modules`."""
    _gathered: dict[tuple[str, bool], Tensor] = field(default_factory=dict)
    _embeddings: dict[tuple[str, bool], Tensor] = field(default_factory=dict)

    def embedding(self, key: str, *, normalised: bool = True) -> Tensor:
        """Embeddings [V, B, D] of this rank, at least fp32, L2-normalised unless asked otherwise.

        `key` is `student.NAME`, `teacher.NAME` or `fused.NAME`, NAME being a modality of the recipe. Each is made once,
        however many losses read it. Raises KeyError for another key.
        """
        import torch
        from torch.nn.functional import normalize

        if (key, normalised) not in self._embeddings:
            who, _, modality = key.partition(".")
            if who == "fused" and self.fused is not None:
                value = self.fused.pooled[modality]
            elif who in ("student", "teacher"):
                value = (self.student if who == "student" else self.teacher)[modality].pooled
            else:
                raise KeyError(key)
            with torch.autocast(value.device.type, enabled=False):
                value = value.to(torch.promote_types(value.dtype, torch.float32))
                if normalised and who != "fused":
                    value = normalize(value, dim=-1)
            self._embeddings[key, normalised] = value
        return self._embeddings[key, normalised]

    def gather(self, key: str, *, normalised: bool = True) -> Tensor:
        """`embedding(key)` of all ranks, [V, M, D], with gradients; one collective a key and step."""
        from distill_core.distributed import all_gather

        if (key, normalised) not in self._gathered:
            self._gathered[key, normalised] = all_gather(self.embedding(key, normalised=normalised), dim=1)
        return self._gathered[key, normalised]
