"""What is known of a recipe before anything is built, and what a component needs of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel

Item = TypeVar("Item")


def joined(key: str) -> tuple[str, ...]:
    """The modalities that a key of `augment` or `backbone` names: `image+text` names two."""
    return tuple(key.split("+"))


@dataclass(frozen=True)
class Vocabulary:
    """The ids that a backbone takes for tokens: 0 to size - 1."""

    size: int
    start: int
    """The first of a sequence."""
    end: int
    """The last of a sequence; what follows it is padding."""
    padding: int
    """Any id: a sequence ends at its first `end`."""
    longest: int
    """The most tokens of a sequence, start and end among them."""


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
    mask_option: str = ""
    """What in its options would let it, as a recipe writes it where a masker says what is hidden:
    `masking: {roles: []}`. For errors."""
    can_drop: bool = False
    """Whether it computes nothing of tokens that are not in `Group.keep`."""
    class_tokens: int = 0
    """Class tokens C that come with the embedding (`Features.class_tokens`)."""
    layers: int = 0
    """How many layers there are of whose tokens it hands on (`Needs.layers`), counted from 0; 0: of the last alone."""
    dense: tuple[str, ...] = ()
    """The kinds of attention that its `dense` takes (`DenseEmbeddings`); empty where it does not offer it."""
    attention: bool = False
    """Whether it says how it reads its tokens (`ClassAttention`), and hands that on (`Features.attention`)."""
    vocabulary: Vocabulary | None = None
    """Of the ids [V, B, L] that its collator makes; None where it takes something else than ids."""
    causal: bool = False
    """Whether a token depends on those before it alone."""
    stride: tuple[int, ...] = ()
    """How much of each of the last axes of a view's data makes a token, (16, 16) of an image in patches: its L tokens
    then lie in a grid, row by row. Empty where they do not."""

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """How the tokens of a view of this shape lie; their product is L. Raises ValueError where they are in no
        grid."""
        if not self.stride:
            raise ValueError("a backbone that gives no `stride` does not say how its tokens lie")
        return tuple(side // step for side, step in zip(shape[-len(self.stride) :], self.stride, strict=True))


@dataclass(frozen=True)
class MaskPlan:
    """What is known of a modality's masker before anything is built."""

    role: str
    """Of the views that are masked."""
    times: int
    """Masks of each view: the student sees it so often."""
    drops: bool
    hides: bool


@dataclass(frozen=True)
class ModalityPlan:
    """What is known of one modality before anything is built."""

    roles: tuple[str, ...]
    """The role of each view, globals first."""
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
    joint: str | None = None
    """The key in the recipe's `augment` of what makes its views together with those of others (`image+text`)."""
    parts: Mapping[str, ModalityPlan] = field(default_factory=dict)
    """The modalities that a `JointTower` reads as this one; {} of any other."""
    mask: MaskPlan | None = None
    """What its masker does, if it has one. Further times that the student sees a view are the last of `roles`, with the
    role `repeated`."""

    def shown(self, view: int) -> tuple[int, ...]:
        """The numbers under which the student sees a view, one for each of its masks: its own, and those of its
        repetitions."""
        if self.mask is None or self.roles[view] != self.mask.role:
            return (view,)
        own = self.views(self.mask.role)
        first = len(self.roles) - len(own) * (self.mask.times - 1) + own.index(view)
        return (view, *(first + k * len(own) for k in range(self.mask.times - 1)))

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


DEFAULT_TEACHER = "default"
"""The teacher of a recipe's section `teacher`, and the one that a loss reads unless its option names another."""


DEFAULT_FUSION = "default"
"""The fusion of a recipe's section `fusion`, which a loss reads unless its option names another."""


@dataclass(frozen=True)
class TeacherPlan:
    """What is known of one teacher before anything is built."""

    views: Mapping[str, tuple[int, ...]]
    """Modality -> the views that it encodes, numbered as in `ModalityPlan.roles`; only those of which it sees some."""
    specs: Mapping[str, BackboneSpec] = field(default_factory=dict)
    """Modality -> widths of its features; the student's where nothing is said."""
    parts: tuple[str, ...] | None = None
    """Paths of the parts of the student that it has copies of; None: of every tower and head that is asked of it."""
    attention_of: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Modality -> the views whose `Features.attention` is read, numbered among its own. Known when it is built."""
    layers_of: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    """Modality -> layer -> the views of which losses read it (`Needs.teacher_layers`), numbered among its own. Known
    when it is built."""

    def copies(self, path: str) -> bool:
        """Whether it has a copy of this part of the student, or of one that holds it."""
        return self.parts is None or any(path == part or path.startswith(f"{part}.") for part in self.parts)


@dataclass(frozen=True)
class HeadPlan:
    """What is known of one of the recipe's heads before anything is built."""

    component: type
    """Its class, a `Head`."""
    config: BaseModel
    """Its options."""
    needs: Needs
    """What it reads where a loss or a task calls it."""


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
    teachers: Mapping[str, TeacherPlan] = field(default_factory=dict)
    fusion: bool = False
    fusion_pools: bool = True
    """Whether the fusion, if there is one, offers `TokenPooling`."""
    fields: Mapping[str, FieldPlan] = field(default_factory=dict)
    """The samples' fields (`data.fields`)."""
    fusions: Mapping[str, bool] = field(default_factory=dict)
    """The fusions besides: whether each offers `TokenPooling`."""
    heads: Mapping[str, HeadPlan] = field(default_factory=dict)
    """The recipe's heads; not known yet where a head itself is asked."""
    raw: Mapping[str, ModalityPlan] = field(default_factory=dict)
    """The modalities that are only collated: no tower encodes their views."""
    complete: bool = True
    """False where a modality is left out because its own options are wrong: their number then says nothing."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "modalities", _Modalities(self.modalities))

    @property
    def optional(self) -> frozenset[str]:
        """The modalities and fields that a sample may lack."""
        modalities = (name for name, plan in {**self.modalities, **self.raw}.items() if plan.optional)
        return frozenset(chain(modalities, (name for name, plan in self.fields.items() if plan.optional)))

    def reading(self, fusion: str) -> Plan:
        """The plan as a loss sees it that reads this fusion: `fusion` and `fusion_pools` are that one's."""
        if fusion == DEFAULT_FUSION:
            return self
        return replace(self, fusion=fusion in self.fusions, fusion_pools=self.fusions.get(fusion, True))

    def unencoded(self, name: str) -> str | None:
        """Why no tower encodes what should be a modality; None where one does, or where that is not known yet."""
        if name in self.raw:
            return f"{name!r} is only collated (it has no tower): leave it out, or give backbone.{name} a tower"
        if name in self.modalities or not self.complete:
            return None
        return f"{name!r} is no modality of this recipe (there are: {', '.join(sorted(self.modalities))})"

    def teacher_views(self, teacher: str, modality: str) -> tuple[int, ...]:
        """The views of a modality that a teacher encodes; () of a teacher that the recipe lacks."""
        return self.teachers[teacher].views.get(modality, ()) if teacher in self.teachers else ()

    def teacher_spec(self, teacher: str, modality: str) -> BackboneSpec:
        """Widths and layers of a modality's features of a teacher: the student's where it has none of its own, or where
        the recipe lacks it."""
        own = self.modalities[modality].spec
        return self.teachers[teacher].specs.get(modality, own) if teacher in self.teachers else own

    def masked_views(self, teacher: str, modality: str) -> dict[int, tuple[int, ...]]:
        """The views that the modality's masker masks and the teacher sees: number among the teacher's -> the student's
        numbers, one for each mask."""
        own = self.modalities[modality]
        role = own.mask.role if own.mask is not None else None
        views = enumerate(self.teacher_views(teacher, modality))
        return {number: own.shown(view) for number, view in views if own.roles[view] == role}


@dataclass(frozen=True)
class Needs:
    """What a component needs of the recipe around it.

    Views are counted as `ModalityPlan.roles` does (a teacher's features count only `TeacherPlan.views`); a backbone
    need not compute any other.
    """

    student: tuple[str, ...] = ()
    """Modalities of which it reads the student's features."""
    teacher: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    """The teachers that it reads, the modalities of each, and of these the views whose tokens are read:
    {"default": {"image": (0, 1), "text": ()}}."""
    fused: tuple[str, ...] = ()
    """Modalities of which it reads fused views."""
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Views whose student's tokens are read: {"image": (0, 1)}."""
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Layers of the student's tower whose tokens are read, {"image": (3, 7)}, of the views in `tokens`."""
    teacher_layers: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    """Those of teachers, {"default": {"image": (7, 11)}}, of the views in `teacher`."""
    views: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """A least number of views: {modality: {role: number}}."""
    masked: tuple[str, ...] = ()
    """Modalities whose backbone must be able to hide tokens."""
    dropped: tuple[str, ...] = ()
    """Modalities of which it reads the tokens that the student does not see at all (`Group.keep`)."""
    whole: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Views of which the student must see every token, {"image": (0, 1)}: each is read in its place."""
    attention: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    """Views of teachers, {"default": {"image": (0,)}}, of which is read how the tower reads their tokens
    (`Features.attention`)."""
    embeddings: tuple[str, ...] | None = None
    """Modalities whose embedding (`Features.pooled`) the loss trains; None: all that it names. A loss that reads class
    tokens or tokens alone says (): nobody should score a projection that nothing trains."""
    pools: bool = False
    """It pools tokens with the fusion itself, and reads no fused views."""
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Extras of views: {modality: names}."""
    fields: tuple[str, ...] = ()
    """Fields of the samples (`Outputs.fields`)."""
    raw: tuple[str, ...] = ()
    """Modalities whose views it reads as they are collated, with a tower or without one (`Outputs.views`)."""
    heads: tuple[str, ...] = ()
    """Heads of the recipe that it calls (`Outputs.heads`), which say themselves what they read."""
    teacher_heads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Heads of which it reads a teacher's copy: {"default": ("projection",)}."""

    @staticmethod
    def union(parts: Sequence[Needs]) -> Needs:
        """What several components need together."""
        explicit = any(part.embeddings is not None for part in parts)
        trained = [name for part in parts for name in (part.named if part.embeddings is None else part.embeddings)]
        views: dict[str, dict[str, int]] = {}
        for part in parts:
            for modality, numbers in part.views.items():
                of_modality = views.setdefault(modality, {})
                for role, number in numbers.items():
                    of_modality[role] = max(number, of_modality.get(role, 0))
        return Needs(
            student=_joined(part.student for part in parts),
            teacher=_by_teacher([part.teacher for part in parts]),
            fused=_joined(part.fused for part in parts),
            tokens=_by_key([part.tokens for part in parts]),
            layers=_by_key([part.layers for part in parts]),
            teacher_layers=_by_teacher([part.teacher_layers for part in parts]),
            views=views,
            masked=_joined(part.masked for part in parts),
            dropped=_joined(part.dropped for part in parts),
            whole=_by_key([part.whole for part in parts]),
            attention=_by_teacher([part.attention for part in parts]),
            embeddings=tuple(sorted(set(trained))) if explicit else None,
            pools=any(part.pools for part in parts),
            extra=_by_key([part.extra for part in parts]),
            fields=_joined(part.fields for part in parts),
            raw=_joined(part.raw for part in parts),
            heads=_joined(part.heads for part in parts),
            teacher_heads=_by_key([part.teacher_heads for part in parts]),
        )

    @property
    def named(self) -> frozenset[str]:
        """The modalities that it names anywhere."""
        return self.encoded | frozenset({*self.raw, *self.views, *self.extra})

    @property
    def encoded(self) -> frozenset[str]:
        """The modalities whose features it reads."""
        sides = (self.student, *self.teacher.values(), *self.attention.values(), self.fused, self.masked, self.dropped)
        return frozenset({*chain(*sides), *self.tokens, *self.layers})


def _joined(parts: Iterable[Iterable[Item]]) -> tuple[Item, ...]:
    """Each item once, in order."""
    return tuple(dict.fromkeys(chain(*parts)))


def _by_key(parts: Sequence[Mapping[str, tuple[Item, ...]]]) -> dict[str, tuple[Item, ...]]:
    return {key: _joined(part.get(key, ()) for part in parts) for key in _joined(parts)}


def _by_teacher(parts: Sequence[Mapping[str, Mapping[str, tuple[int, ...]]]]) -> dict[str, dict[str, tuple[int, ...]]]:
    return {name: _by_key([part.get(name, {}) for part in parts]) for name in _joined(parts)}


def same_dim(name: str, modalities: Sequence[str], plan: Plan, teacher: str | None = None) -> Iterable[str]:
    """What is wrong when a component compares embeddings of several modalities, and those of a teacher if one is named:
    their widths D must agree."""
    dims = {m: plan.modalities[m].spec.dim for m in modalities if m in plan.modalities}
    if teacher is not None and teacher in plan.teachers:
        theirs = {m: spec.dim for m, spec in plan.teachers[teacher].specs.items() if m in dims}
        dims |= {f"{m} of the teacher {teacher!r}": dim for m, dim in theirs.items() if dim != dims[m]}
    if len(set(dims.values())) > 1:
        listed = ", ".join(f"{modality} {dim}" for modality, dim in dims.items())
        yield f"{name!r} compares embeddings of one width D; the backbones give {listed}"
