"""What is known of a recipe before anything is built, and what a component needs of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import BaseModel


@dataclass(frozen=True)
class BackboneSpec:
    """What a backbone says of itself before it is built."""

    width: int
    """Tower width W of the tokens."""
    dim: int
    """Embedding width D."""
    has_tokens: bool = True
    can_mask: bool = False
    """Whether tokens can be hidden."""
    class_tokens: int = 0
    """Class tokens C that come with the embedding (`Features.class_tokens`)."""
    dense: tuple[str, ...] = ()
    """The kinds of attention that its `dense` takes (`DenseEmbeddings`); empty where it does not offer it."""


@dataclass(frozen=True)
class ModalityPlan:
    """What is known of one modality before anything is built."""

    roles: tuple[str, ...]
    """The role of each view, globals first."""
    teacher_views: tuple[int, ...]
    """The views that the teacher encodes; empty without a teacher for this modality."""
    spec: BackboneSpec
    """What its backbone says of itself: widths, tokens."""
    augment: BaseModel | None = None
    """The options of its augmentation; None where they are not known."""
    shapes: tuple[tuple[int, ...], ...] | None = None
    """The shape of each view's data; None where the augmentation's options do not tell."""
    extras: tuple[str, ...] = ()
    """The names of the views' extras (`Augmentation.extras`)."""
    optional: bool = False
    """Whether a sample may lack it (`data.optional`)."""

    def views(self, role: str) -> tuple[int, ...]:
        """The numbers of the views of one role."""
        return tuple(i for i, r in enumerate(self.roles) if r == role)


@dataclass(frozen=True)
class FieldPlan:
    """What is known of a field of the samples."""

    shape: tuple[int, ...]
    """Of one sample's."""
    dtype: str
    optional: bool = False
    """Whether a sample may lack it."""


class MissingModality(LookupError):
    """A component asks a plan for a modality that the recipe lacks: who asked for the plan says so to the user."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no modality {name!r}")
        self.name = name


class _Modalities(dict[str, ModalityPlan]):
    def __missing__(self, name: str) -> ModalityPlan:
        raise MissingModality(name)


@dataclass(frozen=True)
class Plan:
    """What is known of a recipe before anything is built. `modalities[NAME]` raises `MissingModality`."""

    modalities: Mapping[str, ModalityPlan]
    teacher: bool
    fusion: bool
    fusion_pools: bool = True
    """Whether the fusion, if there is one, offers `TokenPooling`."""
    fields: Mapping[str, FieldPlan] = field(default_factory=dict)
    """The samples' fields (`data.fields`)."""
    complete: bool = True
    """False where a modality is left out because its own options are wrong: their number then says nothing."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "modalities", _Modalities(self.modalities))


@dataclass(frozen=True)
class Needs:
    """What a component needs of the recipe around it.

    `student`, `teacher` and `fused` name the modalities of which it reads the student's features, the teacher's, and
    fused views. `tokens` and `teacher_tokens` name the views whose tokens are read, counted as `ModalityPlan.roles`
    does (the teacher's features count only `teacher_views`); a backbone need not compute any other. `masked` names
    modalities whose backbone must be able to hide tokens.
    `views` asks for a least number of views: {modality: {role: number}}.
    `embeddings` names the modalities whose embedding (`Features.pooled`) the loss trains; None stands for all that it
    names. A loss that reads class tokens or tokens alone says (): nobody should score a projection that nothing trains.
    `extra` asks for extras of views by name: {modality: names}.
    `fields` names fields of the samples (`Outputs.fields`).
    `pools`: it pools tokens with the fusion itself, and reads no fused views.
    """

    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    teacher_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    views: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    masked: tuple[str, ...] = ()
    embeddings: tuple[str, ...] | None = None
    pools: bool = False
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fields: tuple[str, ...] = ()

    @property
    def named(self) -> frozenset[str]:
        """The modalities that it names anywhere."""
        sides = (self.student, self.teacher, self.fused)
        return frozenset({*chain(*sides), *self.tokens, *self.teacher_tokens, *self.views, *self.masked, *self.extra})


def same_dim(name: str, modalities: Sequence[str], plan: Plan) -> Iterable[str]:
    """What is wrong when a component compares embeddings of several modalities: their widths D must agree."""
    dims = {m: plan.modalities[m].spec.dim for m in modalities if m in plan.modalities}
    if len(set(dims.values())) > 1:
        listed = ", ".join(f"{modality} {dim}" for modality, dim in dims.items())
        yield f"{name!r} compares embeddings of one width D; the backbones give {listed}"
