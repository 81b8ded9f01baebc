"""What a recipe holds: its sections, with their options and defaults, and the places that take components.

A recipe is a flat list of sections; each place that takes a component holds `{name: NAME, ...its options}`.
`distill_core.recipe.resolve` makes it from YAML.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import Field, field_validator

from distill_core.contracts.component import Component, ComponentConfig
from distill_core.errors import UserError
from distill_core.plan import Needs, Plan
from distill_core.teacher import TeacherConfig

NodeDict = dict[str, Any]
Positive = Annotated[int, Field(gt=0)]


class DataConfig(ComponentConfig):
    """Shards -> batches."""

    source: NodeDict
    """Where the shards come from: a component of kind `source`."""
    batch_size: Positive = 64
    """Samples a step on each rank."""
    workers: Annotated[int, Field(ge=0)] = 1
    """Loader processes on each rank; 0 loads in the training process."""
    shuffle: Annotated[int, Field(ge=0)] = 1000
    """Samples in each worker's shuffle buffer; 0 keeps the shards' order."""
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
    """Stop (saved, with an error) where more than this share of the samples that a loader worker goes through cannot be
    used, those of unreadable shards included. Judged by a pass, and by no less than 10 shards and 1,000 samples."""


class CheckpointConfig(ComponentConfig):
    """When to save, and what to keep."""

    every: Positive | None = 1000
    """Steps between checkpoints; null saves only at the end (and when interrupted)."""
    keep: Positive = 2
    """How many of the last checkpoints to keep."""
    best: str | None = None
    """Validation score whose best checkpoint is kept as well, as `student/retrieval/M`; null keeps none."""


class TrainConfig(ComponentConfig):
    """The loop."""

    steps: Positive | None = None
    """Optimiser steps; where `epochs` is given too, this wins (so that --set train.steps=3 makes a trial)."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Length of the run in passes over the training data."""
    optimizer: NodeDict = {"name": "adamw"}  # noqa: RUF012
    """A component of kind `optimizer`."""
    schedule: NodeDict = {"name": "warmup_cosine"}  # noqa: RUF012
    """A component of kind `schedule`."""
    lr_factors: dict[str, Annotated[float, Field(ge=0)]] = {}  # noqa: RUF012
    """Factors of the learning rate by component path, as {backbone.text: 0.1}; the longest path wins."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the forward pass under autocast; weights and teacher stay fp32, and so do the embeddings that losses
    read and the built-in losses' logits."""
    matmul_precision: Literal["high", "highest"] = "high"
    """Of products of fp32 tensors on CUDA, as `torch.set_float32_matmul_precision` names them: `high` runs them on
    tensor cores (torch's in TF32, the losses' logits and the built-in attention in three TF32 products, which keep
    fp32's precision); `highest` in fp32, without tensor cores. Products of bf16 tensors are not concerned."""
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    """Scale the gradients down where their global L2 norm is above this value."""
    device: str = "auto"
    """`auto` (CUDA when there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    threads: Positive | None = None
    """CPU threads of torch; null leaves a core to the loader's workers when there are any."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite stops the run, or skips the step and counts it."""
    max_nonfinite: Positive = 20
    """With `nonfinite: skip`: so many skipped steps in a row stop the run all the same."""
    log_every: Positive = 10
    """Steps between rows of metrics.jsonl."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save, and what to keep."""

    @field_validator("device")
    @classmethod
    def _is_device(cls, name: str) -> str:
        """Whether there is such a device shows when it is used: a recipe may be checked on another machine."""
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
    source: NodeDict | None = None
    """Where evaluation data comes from; null takes `data.source`."""
    batch_size: Positive = 256
    """Items encoded at once."""
    tasks: list[NodeDict | str | None] = []  # noqa: RUF012
    """Components of kind `evaluation`; a task may have a `source` of its own."""


class Frame(ComponentConfig):
    """The sections of a recipe; places of components are checked by the registry's classes afterwards."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The run folder's name."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of weights, shuffling and views."""
    tags: dict[str, str | int | float] = {}  # noqa: RUF012
    """What the run belongs to, as {study: NAME, variant: NAME}: the context of all that the tracker gets."""
    augment: Annotated[dict[str, NodeDict | str | None], Field(min_length=1)]
    """Modality -> a component of kind `augmentation`."""
    backbone: Annotated[dict[str, NodeDict | str | None], Field(min_length=1)]
    """Modality -> a component of kind `backbone`."""
    fusion: NodeDict | None = None
    """A component of kind `fusion`."""
    loss: Annotated[list[NodeDict | str | None], Field(min_length=1)]
    """Components of kind `loss`; their terms are added up, each times its weight."""
    teacher: TeacherConfig | None = None
    """The teacher's options; null trains without one."""
    data: DataConfig
    """The training data."""
    train: TrainConfig
    """The loop, the optimiser and its schedule."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Tasks, their data, and when they run; null evaluates nothing."""
    tracking: NodeDict | None = {"name": "aim"}  # noqa: RUF012
    """A component of kind `tracker`; null keeps only metrics.jsonl."""
    weights: list[NodeDict | str | None] = []  # noqa: RUF012
    """Components of kind `weights`: weights to start from, applied in order."""
    freeze: list[str] = []  # noqa: RUF012
    """Component paths that are not trained, as [backbone.text]."""


@dataclass(frozen=True)
class Node:
    """A component's place in a recipe: its class and validated options."""

    path: str = field(compare=False)
    id: str
    cls: type[Component]
    config: Any
    package: str
    explicit_id: bool = False
    source: Node | None = None
    """An evaluation task's own data."""

    def build(self, *arguments: Any) -> Any:
        """The component; a ValueError of its constructor becomes a `UserError` that names its path."""
        try:
            return self.cls(self.config, *arguments)  # type: ignore[call-arg]
        except ValueError as error:
            raise UserError(f"{self.path}: {self.cls.name}: {error}") from error

    def dump(self) -> dict[str, Any]:
        """As a recipe would write it, with every default."""
        head = {"name": self.cls.name, **({"id": self.id} if self.explicit_id else {})}
        tail = {"source": self.source.dump()} if self.source else {}
        return {**head, **self.config.model_dump(mode="json", by_alias=True), **tail}


@dataclass(frozen=True)
class Recipe:
    """A validated recipe. Component places hold `Node`s; sections hold their options, with every default filled in."""

    name: str
    seed: int
    tags: Mapping[str, str | int | float]
    augment: Mapping[str, Node]
    backbone: Mapping[str, Node]
    fusion: Node | None
    loss: Sequence[Node]
    teacher: TeacherConfig | None
    data: DataConfig
    source: Node
    train: TrainConfig
    optimizer: Node
    schedule: Node
    evaluate: EvaluateConfig
    evaluate_source: Node | None
    tasks: Sequence[Node]
    tracking: Node | None
    weights: Sequence[Node]
    freeze: Sequence[str]
    plan: Plan
    file: str = field(default="", compare=False)
    warnings: Sequence[str] = field(default=(), compare=False)

    def needs(self) -> list[tuple[Node, Needs]]:
        """What the fusion and each loss need."""
        nodes = [*([self.fusion] if self.fusion else []), *self.loss]
        return [(node, node.cls.needs(node.config, self.plan)) for node in nodes]

    def untrained_embeddings(self) -> frozenset[str]:
        """The modalities whose embedding no loss trains: what their projection was at first is what it stays."""
        trained: set[str] = set()
        for node in self.loss:
            needs = node.cls.needs(node.config, self.plan)
            trained |= set((needs.named or self.plan.modalities) if needs.embeddings is None else needs.embeddings)
        return frozenset(self.plan.modalities) - trained

    def components(self) -> list[Node]:
        """Every component that it is made of, but the tracker."""
        some = [self.fusion, self.source, self.optimizer, self.schedule, self.evaluate_source]
        return [
            *self.augment.values(),
            *self.backbone.values(),
            *self.loss,
            *(node for node in some if node is not None),
            *self.tasks,
            *(node.source for node in self.tasks if node.source is not None),
            *self.weights,
        ]

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe with every default, as plain data."""

        def one(node: Node | None) -> dict[str, Any] | None:
            return node.dump() if node is not None else None

        return {
            "name": self.name,
            "seed": self.seed,
            "tags": dict(self.tags),
            "augment": {name: one(node) for name, node in self.augment.items()},
            "backbone": {name: one(node) for name, node in self.backbone.items()},
            "fusion": one(self.fusion),
            "loss": [one(node) for node in self.loss],
            "teacher": self.teacher.model_dump(mode="json") if self.teacher else None,
            "data": self.data.model_dump(mode="json"),
            "train": self.train.model_dump(mode="json"),
            "evaluate": self.evaluate.model_dump(mode="json"),
            "tracking": one(self.tracking),
            "weights": [one(node) for node in self.weights],
            "freeze": list(self.freeze),
        }

    def to_yaml(self) -> str:
        """The resolved recipe as YAML; loading it again gives the same recipe."""
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Path -> (what it was, what it is), of the options in which two of `Recipe.to_dict` differ.

    Of a component in another's place the names alone; a list of another length as a whole.
    """
    return {path: pair for key in {**before, **now} for path, pair in _changes(before.get(key), now.get(key), key)}


def _changes(before: Any, now: Any, path: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if before == now:
        return
    lists = isinstance(before, list) and isinstance(now, list) and len(before) == len(now)
    if lists and all(isinstance(item, Mapping) for item in [*before, *now]):
        for i, (a, b) in enumerate(zip(before, now, strict=True)):
            yield from _changes(a, b, f"{path}.{i}")
    elif not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        yield path, (before, now)
    elif before.get("name") != now.get("name"):
        yield f"{path}.name", (before.get("name"), now.get("name"))
    else:
        for key in {**before, **now}:
            yield from _changes(before.get(key), now.get(key), f"{path}.{key}")


class _Dumper(yaml.SafeDumper):
    def represent_data(self, data: Any) -> yaml.Node:
        node = super().represent_data(data)
        small = isinstance(data, list) and all(not isinstance(item, dict | list) for item in data)
        if isinstance(node, yaml.SequenceNode) and small:
            node.flow_style = True
        return node


def _represent_float(dumper: _Dumper, value: float) -> yaml.Node:
    text = repr(value)
    if text in ("inf", "-inf", "nan"):
        text = text.replace("inf", ".inf").replace("nan", ".nan")
    # PyYAML reads 1e-05 as a string, ours as a number: write it so that both agree
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _represent_float)
