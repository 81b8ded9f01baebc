"""What comes out of a forward pass, for losses to read.

Shape legend, used in every docstring of the project:

    V views (globals first)   B batch (of this rank)   M batch of all ranks   L tokens
    D embedding               W tower width            H heads                K head width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from distill_core.batch import Views

if TYPE_CHECKING:
    from torch import Tensor, nn


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


class Fusion(Protocol):
    """What a loss may call of the recipe's fusion (`FusionHead`)."""

    def __call__(self, features: dict[str, Features]) -> Fused:
        """Fused embeddings of other features than the step's."""
        ...

    def pool(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries [V, B, D] over one modality's tokens [B, L, W] -> [V, B, D]."""
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


@dataclass(slots=True)
class Outputs:
    """Everything a loss may read of one step.

    `student` and `teacher` hold un-normalised embeddings; the teacher saw only the views whose role it is given.
    """

    views: dict[str, Views]
    student: dict[str, Features]
    teacher: dict[str, Features]
    fused: Fused | None
    fusion: Fusion | None
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
        from distill_core.system.distributed import all_gather

        if (key, normalised) not in self._gathered:
            self._gathered[key, normalised] = all_gather(self.embedding(key, normalised=normalised), dim=1)
        return self._gathered[key, normalised]
