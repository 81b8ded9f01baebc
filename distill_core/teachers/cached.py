"""A teacher whose features were computed before, for every position of the run.

A folder holds `index.json` and chunks: safetensors files of `rows` positions each, of which the first is chunk 0. For
P positions, and the N <= P samples of them that have modality m, a chunk holds

    seeds             [P]           `Visit.seed_of_sample`: which sample it is, with which views
    passed            [P]           True where another sample was passed over
    m/present         [P]           True where the sample has m
    m/pooled          [N, V, D]
    m/class_tokens    [N, V, C, W]  where there are some
    m/tokens/v        [sum of L, W] of view v, where they are read; with m/masks/v [sum of L] and m/lengths/v [N]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from distill_core.batch import Batch, Group, Sample, View, Views
from distill_core.contracts.slot import Slot
from distill_core.contracts.teacher import Teacher, TeacherReader, Visit
from distill_core.errors import BadSample, DataError, UserError
from distill_core.interfaces import Collator
from distill_core.outputs import Features
from distill_core.plan import TeacherPlan

Array = NDArray[Any]
OPEN = 8
"""Chunks that a process holds open."""


class Index(BaseModel):
    """What `index.json` says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = 1
    positions: int
    """Of the run, from 0, that are complete."""
    rows: int
    """Positions of a chunk."""
    weights: str
    """`Teacher.digest` of the teacher that encoded."""
    tokens: dict[str, list[int]]
    """Modality -> views whose tokens it has, numbered among the teacher's."""
    made_with: dict[str, Any]
    """All else that the features depend on."""


def index_file(folder: str | Path) -> Path:
    """Where the index of a cache stands."""
    return Path(folder).expanduser() / "index.json"


def chunk_file(folder: str | Path, number: int) -> Path:
    """Where a chunk of a cache stands."""
    return Path(folder).expanduser() / f"{number:08d}.safetensors"


def read_index(folder: str | Path, teacher: str) -> Index:
    """Raises `UserError` where there is none, or one that cannot be read."""
    file = index_file(folder)
    try:
        return Index.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(
            f"{file}: there is no cache of the teacher {teacher!r}. Write it: distill teach RECIPE; or leave out "
            "`cache`"
        ) from None
    except (OSError, ValueError, ValidationError) as error:
        raise UserError(f"{file}: cannot be read as the index of a cache: {error}") from error


def of_run(slot: Slot[Teacher]) -> Slot[Teacher]:
    """What a run builds for a teacher: with the option `cache` one that only reads."""
    if slot.config.cache is None:
        return slot
    return Slot(CachedTeacher, slot.config, slot.id, slot.package, slot.place)


class CachedTeacher(Teacher):
    """Stands in for a teacher that does not change, without its towers."""

    name = "cached"

    _digest: str | None = None

    def prepare(self) -> Sequence[str]:
        """Read the index."""
        index = read_index(self.config.cache, self.id)
        self._digest = index.weights
        return [f"teacher {self.id}: {self.config.cache} holds its features of {index.positions} positions"]

    def digest(self) -> str | None:
        """That of the teacher that encoded: a run may continue with that one, and the other way round."""
        return self._digest

    @classmethod
    def reader(
        cls, config: Any, name: str, plan: TeacherPlan, collators: Mapping[str, Collator]
    ) -> TeacherReader | None:
        """Reads the chunks."""
        return CachedRows(config.cache, read_index(config.cache, name).rows, tuple(plan.views))

    def encode(self, batch: Batch, tokens_of: Mapping[str, Sequence[int]]) -> dict[str, Features]:
        """What was read, in fp32."""
        features = {}
        for modality, views in batch.teacher[self.id].items():
            group = views.groups[0]
            extra, needed = group.extra, tokens_of.get(modality, ())
            features[modality] = Features(
                group.x.float(),
                {view: extra[f"tokens/{view}"][0].float() for view in needed},
                {view: extra[f"masks/{view}"][0] for view in needed if f"masks/{view}" in extra},
                extra["class_tokens"].float() if "class_tokens" in extra else None,
            )
        return features


@dataclass(slots=True)
class Row:
    """Features of one sample: `pooled` [V, D], `class_tokens` [V, C, W], and of each view with tokens those [L, W] and
    their mask [L]."""

    pooled: Array
    class_tokens: Array | None = None
    tokens: dict[int, tuple[Array, Array]] = field(default_factory=dict)


@dataclass(frozen=True)
class CachedRows:
    """A `TeacherReader` of a cache whose chunks have so many rows."""

    folder: str
    rows: int
    modalities: tuple[str, ...]

    @property
    def collators(self) -> Mapping[str, Collator]:
        """The same for all."""
        return dict.fromkeys(self.modalities, stack_rows)

    def __call__(self, sample: Sample, views: Mapping[str, list[View]], visit: Visit) -> dict[str, list[View]]:
        """One view a modality, whose data is a `Row`.

        Raises `DataError` where the cache has another sample at the position, `BadSample` where it has so because the
        teacher could not read this one.
        """
        number, row = divmod(visit.position, self.rows)
        chunk = _open(str(chunk_file(self.folder, number)))
        if chunk.seeds[row] != visit.seed_of_sample:
            if chunk.passed[row]:
                raise BadSample("could not be used when the teacher's cache was written")
            raise DataError(
                f"{chunk.file}: holds another sample than {visit.key!r} ({sample.get('__url__')}), which pass "
                f"{visit.epoch} has at position {visit.position}: a shard or a sample that could be read when the "
                "cache was written cannot be read now. Make it readable and resume the run, or train without `cache`"
            )
        return {m: [View(chunk.row(m, row))] for m in self.modalities if m in views}


class Chunk:
    """One open file. Raises `DataError` where it cannot be read."""

    def __init__(self, file: str) -> None:
        from safetensors import SafetensorError, safe_open

        self.file = file
        open_file: Any = safe_open  # which has no types
        try:
            self._handle = open_file(file, framework="np")
        except (OSError, SafetensorError) as error:
            raise DataError(f"{file}: cannot be read: {error}. Write it again: distill teach RECIPE") from error
        self.names = set(self._handle.keys())
        small = [name for name in self.names if "/" not in name or name.split("/")[1] in ("present", "lengths")]
        whole = {name: self._handle.get_tensor(name) for name in small}
        self.seeds, self.passed = whole["seeds"], whole["passed"]
        self._row = {n.split("/")[0]: np.cumsum(x) - 1 for n, x in whole.items() if n.endswith("/present")}
        self._ends = {name: np.cumsum(x) for name, x in whole.items() if "/lengths/" in name}

    def row(self, modality: str, position: int) -> Row:
        """Of the sample at a position of this chunk, which has the modality."""
        n = int(self._row[modality][position])
        row = Row(self._part(f"{modality}/pooled", n, n + 1)[0])
        if (name := f"{modality}/class_tokens") in self.names:
            row.class_tokens = self._part(name, n, n + 1)[0]
        start = f"{modality}/lengths/"
        for name, ends in self._ends.items():
            if name.startswith(start):
                view, first, last = name.removeprefix(start), int(ends[n - 1]) if n else 0, int(ends[n])
                tokens, masks = (self._part(f"{modality}/{x}/{view}", first, last) for x in ("tokens", "masks"))
                row.tokens[int(view)] = tokens, masks
        return row

    def _part(self, name: str, first: int, last: int) -> Array:
        part: Array = self._handle.get_slice(name)[first:last]
        return part


_open = lru_cache(maxsize=OPEN)(Chunk)


def stack_rows(samples: list[list[View]], seeds: Sequence[int] = ()) -> Views:
    """One group: x is `pooled` [V, B, D]; `extra` holds class_tokens [V, B, C, W], and of view v tokens/v [1, B, L, W],
    and masks/v [1, B, L] where some are padding."""
    rows: list[Row] = [views[0].data for views in samples]
    extra: dict[str, Array] = {}
    if rows[0].class_tokens is not None:
        extra["class_tokens"] = np.stack([row.class_tokens for row in rows if row.class_tokens is not None], axis=1)
    for view in rows[0].tokens:
        own = [row.tokens[view] for row in rows]
        length = max(len(mask) for _, mask in own)
        tokens = np.zeros((1, len(own), length, own[0][0].shape[-1]), own[0][0].dtype)
        masks = np.zeros((1, len(own), length), bool)
        for i, (x, mask) in enumerate(own):
            tokens[0, i, : len(x)], masks[0, i, : len(x)] = x, mask
        extra[f"tokens/{view}"] = tokens
        if not masks.all():
            extra[f"masks/{view}"] = masks
    pooled = torch.from_numpy(np.stack([row.pooled for row in rows], axis=1))
    return Views([Group(pooled, extra={name: torch.from_numpy(array) for name, array in extra.items()})])


def packed(
    features: Mapping[str, Sequence[Features]], present: Mapping[str, Array], seeds: Array, passed: Array
) -> bytes:
    """A chunk's file, in fp16: of each modality the features of its samples, in parts along the batch.

    Raises `UserError` where a value is not finite in fp16.
    """
    from safetensors.numpy import save

    arrays: dict[str, Array] = {"seeds": seeds, "passed": passed}
    for m, parts in features.items():
        arrays[f"{m}/present"] = present[m]
        if not parts:  # no sample of the chunk has it
            continue
        arrays[f"{m}/pooled"] = np.concatenate([_half(x.pooled.transpose(0, 1), m) for x in parts])
        if parts[0].class_tokens is not None:
            own = [x.class_tokens.transpose(0, 1) for x in parts if x.class_tokens is not None]
            arrays[f"{m}/class_tokens"] = np.concatenate([_half(x, m) for x in own])
        for view in parts[0].tokens:
            masks = [_mask(x, view) for x in parts]
            lengths = [mask.shape[1] - mask[:, ::-1].argmax(1) for mask in masks]  # up to the last real token
            real = [np.arange(mask.shape[1]) < n[:, None] for mask, n in zip(masks, lengths, strict=True)]
            tokens = [_half(x.tokens[view], m)[r] for x, r in zip(parts, real, strict=True)]
            arrays[f"{m}/tokens/{view}"] = np.concatenate(tokens)
            arrays[f"{m}/masks/{view}"] = np.concatenate([mask[r] for mask, r in zip(masks, real, strict=True)])
            arrays[f"{m}/lengths/{view}"] = np.concatenate(lengths).astype(np.int32)
    return save({name: np.ascontiguousarray(x) for name, x in arrays.items()})


def _half(x: torch.Tensor, modality: str) -> Array:
    half = x.detach().to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise UserError(f"the teacher's features of {modality!r} hold values that are not finite in fp16")
    return half.cpu().numpy()


def _mask(features: Features, view: int) -> Array:
    """[B, L]."""
    if (mask := features.masks.get(view)) is not None:
        return mask.cpu().numpy()
    return np.ones(features.tokens[view].shape[:2], bool)
