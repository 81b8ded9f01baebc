"""What goes into a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Stream, Tensor, device

    from distill_core.presence import Present


GLOBAL = "global"


LOCAL = "local"


REPEATED = "repeated"
"""The role of the further times that the student sees a view, each with another mask (`Masker.times`)."""


Sample = Mapping[str, Any]
"""One raw sample of a shard: `__key__`, `__url__`, and a field's name (its extension) -> bytes."""


@dataclass(frozen=True, slots=True)
class View:
    """One view of one sample, before it is collated.

    `data` is whatever the modality's backbone collates (a tensor, a string). `role` is `global`, `local` or a
    method's own word.
    """

    data: Any
    role: str = GLOBAL
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Small arrays, tensors or numbers that belong to the view (a crop's box), by name. All views of a role have the
    same names and shapes."""


@dataclass(slots=True)
class Group:
    """The views of one modality that share a shape and a role.

    x           [V, B, ...]    pixels [V, B, 3, S, S], token ids [V, B, L], or what the backbone takes
    token_mask  [V, B, L]      True where the student must not see the token (masked modelling)
    hidden      V tensors [N]  where each view's token_mask is True, counted through its B * L tokens: `places`
    targets     [V, B, L, ..]  what a masked token should be predicted as
    keep        [V, B, L']     which of the L tokens the student sees at all, as integers; a tower drops the others
                before its first layer, and its tokens of the view are these L', in this order. Class tokens always stay
    extra       name -> [V, B, ...], each view's `View.extra`
    lengths     [V, B] integers that stay on the host: tokens up to the last real one, where the collator knows them, so
                that a tower that packs sequences need not read them from the device

    Where a masker draws K masks of each view, token_mask and keep are [K * V, B, ...], mask by mask, until the student
    sees each of them as a group (`Masker.repeated`).
    """

    x: Tensor
    role: str = GLOBAL
    token_mask: Tensor | None = None
    targets: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    lengths: np.ndarray[Any, Any] | None = None
    hidden: tuple[Tensor, ...] | None = None
    keep: Tensor | None = None
    parts: Mapping[str, Group] = field(default_factory=dict)
    """Of views of several modalities at once (`join_views`): modality -> its own, whose view i belongs to this view i;
    `x` is the first one's."""

    def locate_hidden(self) -> None:
        """Set `hidden`: the loader's workers do, so that nobody has to count on the device how many there are."""
        if self.token_mask is not None:
            self.hidden = tuple(mask.flatten().nonzero()[:, 0] for mask in self.token_mask)

    def places(self) -> tuple[Tensor, ...]:
        """`hidden`, which the host looks for now where no worker did. Raises ValueError without a `token_mask`."""
        if self.token_mask is None:
            raise ValueError("a group without token_mask hides nothing")
        if self.hidden is None:
            self.locate_hidden()
        assert self.hidden is not None
        return self.hidden

    def dropped(self, tokens: int) -> Tensor:
        """Which of its L tokens the student does not see at all, [V, B, L - L'], ascending: the others than `keep`.

        Raises ValueError without a `keep`.
        """
        if self.keep is None:
            raise ValueError("a group without `keep` drops nothing")
        import torch

        visible = torch.zeros(*self.keep.shape[:2], tokens, dtype=torch.bool, device=self.keep.device)
        visible.scatter_(-1, self.keep, True)
        order = visible.to(torch.uint8).argsort(dim=-1, stable=True)
        return order[..., : tokens - self.keep.shape[-1]]

    def map(self, function: Callable[[Tensor], Tensor]) -> Group:
        """The same group with every tensor replaced."""
        others = {name: getattr(self, name) for name in ("token_mask", "targets", "keep")}
        changed = {name: None if x is None else function(x) for name, x in others.items()}
        extra = {name: function(x) for name, x in self.extra.items()}
        hidden = None if self.hidden is None else tuple(function(x) for x in self.hidden)
        parts = self._each(lambda group: group.map(function))
        return Group(
            function(self.x), self.role, **changed, extra=extra, lengths=self.lengths, hidden=hidden, parts=parts
        )

    def _each(self, function: Callable[[Group], Group]) -> dict[str, Group]:
        return {name: function(group) for name, group in self.parts.items()}

    def part(self, first: int, last: int) -> Group:
        """As `Batch.part`."""
        parts = self._each(lambda group: group.part(first, last))
        # `places` finds the hidden ones again
        group = replace(replace(self, hidden=None, parts={}).map(lambda x: x[:, first:last]), parts=parts)
        if self.lengths is not None:
            group.lengths = self.lengths[:, first:last]
        return group

    def rows(self, present: Present, outer: Present | None) -> Group:
        """The samples of `present` out of those of `outer`, which this holds; None stands for all samples."""
        if present is outer:
            return self
        parts = self._each(lambda group: group.rows(present, outer))
        # `places` looks for the hidden ones again
        group = replace(replace(self, hidden=None, parts={}).map(lambda x: present.of(x, 1, outer)), parts=parts)
        places = present.places(outer)
        if self.lengths is not None and places is not None:
            group.lengths = self.lengths[:, places]
        return group


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

    def part(self, first: int, last: int) -> Views:
        """As `Batch.part`."""
        return Views([group.part(first, last) for group in self.groups])

    def rows(self, present: Present, outer: Present | None) -> Views:
        """As `Group.rows`."""
        return Views([group.rows(present, outer) for group in self.groups])


def with_extra(views: Views, samples: Sequence[Sequence[View]]) -> Views:
    """The views of B samples as a collator has made them, with `Group.extra` [V, B, ...] of their `extra`.

    What the collator has put there itself (padded, where shapes differ) stays. The loader does this for every modality.
    """
    import numpy as np
    import torch

    for start, group in views.numbered():
        members = range(start, start + group.x.shape[0])
        for name in samples[0][start].extra:
            if name not in group.extra:
                rows = [[np.asarray(sample[i].extra[name]) for sample in samples] for i in members]
                group.extra[name] = torch.from_numpy(np.array(rows))
    return views


def join_views(parts: Mapping[str, Views], roles: Sequence[str]) -> Views:
    """Views of several modalities at once, for a tower that reads them as one sequence: of each role view i of the one
    with view i of the others, without what a masker hides or drops. Raises ValueError where a role's views are not of
    one shape, or not as many."""
    groups = []
    for role in roles:
        own = {name: [group for group in views.groups if group.role == role] for name, views in parts.items()}
        if any(len(of) != 1 for of in own.values()) or len({len(of[0].x) for of in own.values()}) > 1:
            counts = ", ".join(f"{name} {[tuple(group.x.shape) for group in of]}" for name, of in own.items())
            raise ValueError(f"views of the role {role!r} are not as many of one shape in each modality: {counts}")
        bare = {name: replace(of[0], token_mask=None, hidden=None, keep=None) for name, of in own.items()}
        groups.append(Group(next(iter(bare.values())).x, role, parts=bare))
    return Views(groups)


def stack_views(samples: Sequence[Sequence[View]], seeds: Sequence[int] = ()) -> Views:
    """A collator of arrays, tensors and numbers: the views of B samples -> a group [V, B, ...] a role.

    Raises ValueError where views of a role differ in shape.
    """
    import torch

    roles = [view.role for view in samples[0]]
    groups = []
    for role in dict.fromkeys(roles):
        numbers = [i for i, own in enumerate(roles) if own == role]
        arrays = [[torch.as_tensor(sample[i].data) for sample in samples] for i in numbers]
        if len(shapes := {tuple(x.shape) for row in arrays for x in row}) > 1:
            raise ValueError(f"views of the role {role!r} differ in shape: {sorted(shapes)}")
        groups.append(Group(torch.stack([torch.stack(row) for row in arrays]), role))
    return Views(groups)


WHOLE_SHARD, REST_OF_SHARD = "(whole shard)", "(rest of the shard)"
"""In place of a sample's key: its shard cannot be read; or all that follows the damage in one, however much it is."""


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
    """B samples."""

    views: dict[str, Views]
    """By modality."""
    keys: list[str]
    skipped: list[Skipped] = field(default_factory=list)
    """The samples that were passed over on the way."""
    measures: list[dict[str, Mapping[str, float]]] = field(default_factory=list)
    """What the augmentations measured of the samples, {modality: {measure: value}} each; of a run's first ones."""
    sets: Mapping[str, int] = field(default_factory=dict)
    """How many of the samples come from each set of the source."""
    presence: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    """Of each modality or field that a sample may lack (`data.optional`) which samples have it, [B] on the host. The
    modality's views are of these samples alone, in their order, or of one filler where there is none."""
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    """What belongs to a sample and not to a view (`data.fields`), [B, ...] each; zeros where one is absent."""
    teacher: dict[str, dict[str, Views]] = field(default_factory=dict)
    """Teacher's name -> modality -> what it takes in place of `views`, where that differs (`Teacher.reader`)."""

    def __len__(self) -> int:
        return len(self.keys)

    def part(self, first: int, last: int) -> Batch:
        """Some of its samples. Raises ValueError where samples may lack a modality."""
        if self.presence:
            raise ValueError("views of samples that lack a modality are not numbered as the samples are")
        views = {name: views.part(first, last) for name, views in self.views.items()}
        fields = {name: x[first:last] for name, x in self.fields.items()}
        teacher = {id: {m: x.part(first, last) for m, x in own.items()} for id, own in self.teacher.items()}
        return Batch(views, self.keys[first:last], fields=fields, teacher=teacher)

    @property
    def absences(self) -> dict[str, int]:
        """How many samples lack each modality that they may lack."""
        return {name: int((~mask).sum()) for name, mask in self.presence.items()}

    def to(self, where: device | str) -> Batch:
        """The same batch on another device."""
        return self._map(lambda x: x.to(where, non_blocking=True))

    def record_stream(self, stream: Stream) -> None:
        """Keep the tensors' memory until the work that `stream` has by now is done."""

        def record(x: Tensor) -> Tensor:
            x.record_stream(stream)
            return x

        self._map(record)

    def pin_memory(self) -> Batch:
        """The same batch in pinned memory; the loader calls this by its name."""
        return self._map(lambda x: x.pin_memory())

    def share_memory(self) -> None:
        """Move the tensors, in place, to memory that another process can open. Raises RuntimeError where it is full."""
        self._map(lambda x: x.share_memory_())  # type: ignore[no-untyped-call]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        views = {name: views.map(function) for name, views in self.views.items()}
        fields = {name: function(x) for name, x in self.fields.items()}
        teacher = {
            name: {modality: views.map(function) for modality, views in own.items()}
            for name, own in self.teacher.items()
        }
        return replace(self, views=views, fields=fields, teacher=teacher)
