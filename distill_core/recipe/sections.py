"""A recipe: its sections, their options and defaults, and the slots that take components.

`distill_core.recipe.resolve` makes it from YAML.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BaseModel, Field, PrivateAttr, field_validator

from distill_core.contracts.balance import Balance
from distill_core.contracts.component import Component, ComponentConfig
from distill_core.contracts.hook import Hook
from distill_core.contracts.masker import Masker
from distill_core.contracts.nested import needs_of, slots_in
from distill_core.contracts.optimizer import Optimizer
from distill_core.contracts.schedule import NotNegative, Scheduled, step_of
from distill_core.contracts.shared import MayShare, SharedSlot
from distill_core.contracts.slot import NullIsDefault, Slot, Unnamed, default_component
from distill_core.contracts.source import DataSource
from distill_core.contracts.task import Task
from distill_core.contracts.teacher import Teacher
from distill_core.contracts.tracker import Tracker
from distill_core.contracts.weights import WeightLoader
from distill_core.data.fields import FieldConfig
from distill_core.errors import KeyPath, UserError
from distill_core.gradients import GradientLimit
from distill_core.interfaces import Augmentation, Backbone, Collator, FusionHead, Head, JointAugmentation, Loss
from distill_core.outputs import Progress
from distill_core.plan import DEFAULT_FUSION, DEFAULT_TEACHER, Needs, Plan, joined
from distill_core.recipe.document import write_data
from distill_core.recipe.plans import Parts, is_raw, plan_of

Positive = Annotated[int, Field(gt=0)]


class DataConfig(ComponentConfig):
    """The training data: its source, batches and loader."""

    source: Slot[DataSource]
    """Where the shards come from."""
    weights: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """Share of the samples that come from each set of the source, as {photographs: 3, drawings: 1}; each set is then
    read in passes of its own. Null reads every sample once a pass."""
    batches: Literal["mixed", "one_set"] = "mixed"
    """`one_set`: all samples of a step, over all ranks, come from the same set."""
    fields: dict[str, FieldConfig] = {}  # noqa: RUF012
    """What losses read of a sample beside its views, as {label: {member: cls, dtype: int64}}."""
    optional: tuple[str, ...] = ()
    """Modalities and fields that a sample may lack, as [text]: a loss that needs one is computed over the samples that
    have it. A sample that lacks another is skipped and counted."""
    batch_size: Positive = 64
    """Samples a step on each rank; a resumed run keeps the size over all ranks, whatever their number."""
    workers: Annotated[int, Field(ge=0)] = 1
    """Loader processes on each rank; 0 loads in the training process."""
    streams: Positive = 256
    """Places of the data that are read in turns; so many shards are in use at a time."""
    shuffle: Annotated[int, Field(ge=0)] = 10_000
    """Samples, of all streams, that are shuffled among one another; they take no memory. 0 keeps the data's order."""
    prefetch: Positive = 4
    """Batches that each worker keeps ready."""
    stall_warning: Annotated[float, Field(gt=0)] = 60.0
    """Seconds without a batch after which a line names the worker and the shard that are waited for; again each time
    the wait has doubled."""
    retries: Annotated[int, Field(ge=0)] = 3
    """How often a shard that cannot be read is tried again, after 1, 4, 16, ... seconds. Then it is skipped, counted
    and named in skipped.jsonl; the next pass tries it again."""
    timeout: Annotated[float, Field(gt=0)] = 60
    """Seconds for which a URL or `pipe:COMMAND` may send nothing before it counts as failed."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Stop (saved, with an error) when more than this share of a rank's samples cannot be used, including those of
    unreadable shards. Judged over a pass, and over at least 1,000 samples."""
    shard_cache: Annotated[float, Field(gt=0)] = 50.0
    """Gigabytes that copies of shards may take in the cache: those that are URLs, commands or compressed. `streams` of
    them are in use at a time."""


class CheckpointConfig(ComponentConfig):
    """When to save, and what to keep."""

    every: Positive | None = 1000
    """Steps between checkpoints; null saves only at the end (and when interrupted)."""
    keep: Positive = 2
    """How many of the last checkpoints to keep."""
    best: str | None = None
    """Validation score whose best checkpoint is kept as well, as `student/retrieval/M`; null keeps none."""


class ParallelConfig(ComponentConfig):
    """How a step is laid out on the hardware; results do not depend on it but for rounding."""

    shard: Positive | Literal["all"] = 1
    """Over how many ranks each tower's weights, gradients, optimiser state and teacher are split: 1 holds all of them
    on every rank. Groups of so many ranks hold copies of one another."""
    weight_precision: Literal["fp32", "bf16"] = "fp32"
    """Of the towers' weights while a unit computes with them, over several ranks: bf16 halves what is gathered, and
    computes norms and residuals in bf16 too. The weights that are updated stay fp32."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """What each unit of the student computes a second time in the backward pass, in place of holding it: all
    (`full`), or all but matrix products (`selective`)."""
    micro_batch: Positive | None = None
    """Samples of a rank whose activations are held at a time: embeddings of the whole batch come first, and each sample
    is encoded a second time for its gradient (GradCache; the same gradients). For losses that read embeddings alone;
    null encodes the batch at once."""
    compile: bool = False
    """Compile each unit with torch.compile, as one graph: each block of a tower, the fusion, each loss. Fewer passes
    over memory and fewer launches, after a start of a minute or more. What has no unit (a tower of another package, a
    loss over a ring) runs as it is."""


class TrainConfig(ComponentConfig):
    """The training loop: length, optimiser, precision, and when to log and save."""

    steps: Positive | None = None
    """Optimiser steps; takes precedence over `epochs` (so that --set train.steps=3 makes a trial run)."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Length of the run in passes over the training data."""
    optimizer: Slot[Optimizer] = default_component("adamw")
    """What updates the weights."""
    schedule: Scheduled[NotNegative] = default_component("warmup_cosine")
    """The learning rate's course over the run: a factor of the optimiser's `lr`."""
    lr_factors: dict[str, Annotated[float, Field(ge=0)]] = {}  # noqa: RUF012
    """Factors of the learning rate by component path, as {backbone.text: 0.1}; the longest path wins."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the forward pass under autocast; weights and teacher stay fp32, and so do the embeddings that losses
    read and the built-in losses' logits."""
    parallel: ParallelConfig = ParallelConfig()
    """How a step is laid out on the hardware."""
    matmul_precision: Literal["high", "highest"] = "high"
    """Of products of fp32 tensors on CUDA, as `torch.set_float32_matmul_precision` names them: `high` runs them on
    tensor cores (torch's in TF32, the losses' logits and the built-in attention in three TF32 products, which keep
    fp32's precision); `highest` in fp32, without tensor cores. Products of bf16 tensors are not concerned."""
    gather_precision: Literal["fp32", "bf16"] = "fp32"
    """Of embeddings, and their gradients, while they travel between ranks: bf16 halves the bytes, and rounds all but a
    rank's own rows to 8 bits."""
    lr_decay: dict[str, Annotated[float, Field(gt=0, le=1)]] = {}  # noqa: RUF012
    """Layer-wise decay of the learning rate in backbones, as {backbone.image: 0.75}: this factor once more for each
    block that comes after a parameter."""
    clip_grad: Annotated[float, Field(gt=0)] | GradientLimit | None = None
    """Scale the gradients down where their L2 norm is above this value: a number is for the norm of all of them,
    {by: parameter, max: 3.0} for each parameter's own."""
    device: str = "auto"
    """`auto` (CUDA when there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    threads: Positive | None = None
    """CPU threads of torch; null leaves a core to the loader's workers when there are any."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite stops the run, or skips the step and counts it."""
    max_nonfinite: Positive = 20
    """With `nonfinite: skip`: stop the run after this many skipped steps in a row."""
    log_every: Positive = 10
    """Steps between rows of metrics.jsonl."""
    stall_warning: Annotated[float, Field(gt=0)] = 600.0
    """Seconds in the same step (with its validation and checkpoint) after which a line names the rank that is stuck and
    where, and its stack is written to RUN/stalls; again each time they have doubled."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save, and what to keep."""

    @field_validator("device")
    @classmethod
    def _is_device(cls, name: str) -> str:
        """Whether the device exists is checked when it is used: a recipe may be checked on another machine."""
        try:
            known = name == "auto" or torch.device(name).type != "meta"
        except RuntimeError:
            known = False
        if not known:
            raise ValueError(f"{name!r} is no device; take auto, cpu, cuda, or one of several as cuda:1")
        return name


class EvaluateConfig(ComponentConfig):
    """What is scored, when, on which data."""

    every: Positive | None = None
    """Steps between evaluations on `validation` while training; null evaluates only at the end."""
    validation: str = "validation"
    """The split used while training, and to choose the best checkpoint."""
    split: str = "test"
    """The split of the evaluation at the end."""
    source: Slot[DataSource] | None = None
    """Where evaluation data comes from; null takes `data.source`."""
    batch_size: Positive = 256
    """Items encoded at once."""
    tasks: Annotated[list[Slot[Task]], NullIsDefault()] = []  # noqa: RUF012
    """What is scored; a task may have a `source` of its own."""


class StageConfig(ComponentConfig):
    """Changes of the recipe from a point of the run on."""

    at: Annotated[float, Field(gt=0)]
    """The point: a part of the run below 1, or a number of steps above 1."""
    set: dict[str, Any]
    """path -> value, as `--set` takes them, on top of the stages before: {loss.1.weight: 0.5}."""

    @field_validator("at")
    @classmethod
    def _inside(cls, at: float) -> float:
        if at == 1 or (at > 1 and not at.is_integer()):
            raise ValueError("a part of the run below 1, or a whole number of steps above 1")
        return at


class Recipe(ComponentConfig):
    """Everything that defines a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The run folder's name."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of weights, shuffling and views."""
    tags: dict[str, str | int | float] = {}  # noqa: RUF012
    """What the run belongs to, as {study: NAME, variant: NAME}; sent to the tracker as context."""
    augmentations: Annotated[dict[str, Slot[Augmentation | JointAugmentation]], Field(alias="augment", min_length=1)]
    """Modality -> how its views are made; `image+text` -> how those of both are made at once, where one depends on the
    other, of what their own entries make."""
    backbone: Annotated[dict[str, Slot[Backbone]], Field(min_length=1), MayShare()]
    """Modality -> what encodes its views; {same: NAME} for the tower of another modality, the same weights, with
    `own: [PART]` for parts of it that are not shared."""
    masker: Annotated[dict[str, Slot[Masker]], NullIsDefault()] = {}  # noqa: RUF012
    """Modality -> which tokens of its views the student sees."""
    fusion: Slot[FusionHead] | None = None
    """What combines the modalities' features; named `default`, which losses read unless they name another."""
    fusions: Annotated[dict[str, Slot[FusionHead]], NullIsDefault()] = {}  # noqa: RUF012
    """Further fusions, by the name that a loss's option `fusion` gives."""
    heads: Annotated[dict[str, Slot[Head]], NullIsDefault()] = {}  # noqa: RUF012
    """Modules beside towers and fusion, by the name under which losses and tasks call them."""
    loss: Annotated[list[Slot[Loss]], Field(min_length=1)]
    """The losses; their terms are added up, each times its weight."""
    balance: Slot[Balance] | None = None
    """What weighs the losses against one another, on top of their weights; null: their weights alone."""
    teacher: Annotated[Slot[Teacher] | None, Unnamed("ema")] = None
    """The teacher named `default`, which losses read unless they name another; options without a name are those of
    `ema`. Null trains without one."""
    teachers: Annotated[dict[str, Slot[Teacher]], NullIsDefault()] = {}  # noqa: RUF012
    """Further teachers, by the name that a loss's option `teacher` gives."""
    data: DataConfig
    """The training data."""
    train: TrainConfig
    """The loop, the optimiser and its schedule."""
    evaluate: Annotated[EvaluateConfig, NullIsDefault()] = EvaluateConfig()
    """Tasks, their data, and when they run; null evaluates nothing."""
    tracking: Slot[Tracker] | None = default_component("aim")
    """Where metrics go beside metrics.jsonl; null keeps only that."""
    weights: Annotated[list[Slot[WeightLoader]], NullIsDefault()] = []  # noqa: RUF012
    """Weights to start from, applied in order."""
    freeze: Annotated[list[str], NullIsDefault()] = []  # noqa: RUF012
    """Component paths that are not trained, as [backbone.text]."""
    hooks: Annotated[list[Slot[Hook]], NullIsDefault()] = []  # noqa: RUF012
    """What stands around each training step: other ways to the gradients, work before and after it."""
    stages: Annotated[list[StageConfig], NullIsDefault()] = []  # noqa: RUF012
    """Changes from points of the run on, in order. What two stages share keeps its weights."""

    _later: tuple[Recipe, ...] = PrivateAttr(default=())
    _warnings: tuple[str, ...] = PrivateAttr(default=())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What could not be checked, or may be a mistake."""
        return self._warnings

    def with_warnings(self, *lines: str) -> Recipe:
        """The same recipe, with these warnings."""
        recipe = self.model_copy()
        recipe._warnings = lines
        return recipe

    def with_stages(self, *recipes: Recipe) -> Recipe:
        """The same recipe, with the recipe of each of its stages."""
        recipe = self.model_copy()
        recipe._later = recipes
        return recipe

    def stage(self, progress: Progress) -> int:
        """How many of its stages a run has reached."""
        return sum(progress.step >= step_of(stage.at, progress) for stage in self.stages)

    def of_stage(self, number: int) -> Recipe:
        """The recipe from stage `number` on, counted from 1; 0 is the recipe itself, which holds before them."""
        return (self, *self._later)[number]

    def __eq__(self, other: object) -> bool:
        """Whether they describe the same run; warnings do not count."""
        return isinstance(other, Recipe) and all(getattr(self, f) == getattr(other, f) for f in Recipe.model_fields)

    @cached_property
    def plan(self) -> Plan:
        """What is known of it before anything is built. Raises `UserError` where a backbone cannot tell its widths."""
        parts = Parts(
            augment=self.augment,
            joint=self.joint,
            backbone=self.backbone,
            masker=self.masker,
            fusions=self.all_fusions,
            heads=self.heads,
            teachers=self.all_teachers,
            fields=self.data.fields,
            optional=self.data.optional,
        )
        return plan_of(parts, _refuse)

    @property
    def augment(self) -> dict[str, Slot[Augmentation]]:
        """Modality -> its own augmentation."""
        return {name: cast(Slot[Augmentation], slot) for name, slot in self._augmentations(Augmentation)}

    @property
    def joint(self) -> dict[str, Slot[JointAugmentation]]:
        """`image+text` -> the augmentation of these modalities at once."""
        return {name: cast(Slot[JointAugmentation], slot) for name, slot in self._augmentations(JointAugmentation)}

    def build_augmentations(self) -> tuple[dict[str, Augmentation], dict[str, JointAugmentation]]:
        """`augment` and `joint`, built. Raises `UserError`."""
        augment = {name: node.build() for name, node in self.augment.items()}
        return augment, {
            key: node.build({name: augment[name] for name in joined(key)}) for key, node in self.joint.items()
        }

    def _augmentations(self, interface: type[Component]) -> Iterator[tuple[str, Slot[Any]]]:
        return ((name, slot) for name, slot in self.augmentations.items() if issubclass(slot.cls, interface))

    @property
    def towers(self) -> list[str]:
        """The modalities that a tower encodes."""
        return [name for name, slot in self.backbone.items() if not is_raw(slot)]

    def collators(self) -> dict[str, Collator]:
        """How the views of each modality are collated."""
        own = {name: slot for name, slot in self.backbone.items() if len(joined(name)) == 1}
        return {name: slot.cls.collator(slot.config) for name, slot in own.items()}

    def maskers(self) -> dict[str, Masker]:
        """By modality, built."""
        return {name: slot.build(name, self.plan) for name, slot in self.masker.items()}

    @property
    def all_fusions(self) -> dict[str, Slot[FusionHead]]:
        """By name, that of the section `fusion` first."""
        return {**({DEFAULT_FUSION: self.fusion} if self.fusion is not None else {}), **self.fusions}

    @property
    def all_teachers(self) -> dict[str, Slot[Teacher]]:
        """By name, that of the section `teacher` first."""
        return {**({DEFAULT_TEACHER: self.teacher} if self.teacher is not None else {}), **self.teachers}

    def needs(self) -> list[tuple[Slot[Any], Needs]]:
        """What the fusions, the heads and each loss need, with what is inside them, and each masker."""
        slots: list[Slot[Any]] = [*self.all_fusions.values(), *self.heads.values(), *self.loss]
        of_maskers = [(slot, slot.cls.reads(slot.config, name, self.plan)) for name, slot in self.masker.items()]
        return [*((slot, needs_of(slot.cls, slot.config, self.plan)) for slot in slots), *of_maskers]

    def untrained_embeddings(self) -> frozenset[str]:
        """The modalities whose embedding no loss trains: their projection keeps its initial weights. Not those that are
        frozen as a whole (`freeze: [backbone.text]`), whose weights have been loaded."""
        trained: set[str] = set()
        for slot in self.loss:
            needs = needs_of(slot.cls, slot.config, self.plan)
            trained |= set((needs.named or self.plan.modalities) if needs.embeddings is None else needs.embeddings)
        frozen = {name for name in self.plan.modalities if f"backbone.{name}" in self.freeze}
        known = {self._tower(name) for name in trained | frozen}
        return frozenset(name for name in self.plan.modalities if self._tower(name) not in known)

    def _tower(self, modality: str) -> str:
        """The modality whose tower encodes it: another one where they share it as a whole."""
        slot = self.backbone.get(modality)
        return slot.same if isinstance(slot, SharedSlot) and not slot.own else modality

    def slots(self) -> list[Slot[Any]]:
        """Every component that it is made of, those inside other components' options too, in the recipe's order."""
        return list(slots_in(self))

    def schedules(self) -> dict[str, Scheduled[Any]]:
        """Path -> each option that moves over the run, the learning rate's schedule aside."""
        return {path: option for path, option in _schedules(self) if path != "train.schedule"}

    def to_dict(self) -> dict[str, Any]:
        """The recipe with every default, as plain data."""
        return self.model_dump(mode="json", by_alias=True)

    def to_yaml(self) -> str:
        """The recipe as YAML, with every default; loading it again gives the same recipe."""
        return write_data(self.to_dict())


def _schedules(value: Any, path: str = "") -> Iterator[tuple[str, Scheduled[Any]]]:
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Scheduled):
        if value.moves:
            yield path, value
    elif isinstance(value, Slot):
        yield from _schedules(value.config, path)
    elif isinstance(value, BaseModel):
        inside = ((field.alias or name, getattr(value, name)) for name, field in type(value).model_fields.items())
    elif isinstance(value, Mapping):
        inside = value.items()
    elif isinstance(value, list | tuple):
        inside = enumerate(value)
    for key, item in inside:
        yield from _schedules(item, f"{path}.{key}" if path else str(key))


def _refuse(place: KeyPath, line: str) -> None:
    raise UserError(f"{'.'.join(map(str, place))}: {line}")
