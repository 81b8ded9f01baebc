"""Recipe: YAML -> validated objects, with every error at `file:line: path: message`, all of a file at once.

A recipe is a flat list of sections; each place that takes a component holds `{name: NAME, ...its options}`. What the
components need of one another is checked here, before any data or weights are touched.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from distill_core.components import Component, ComponentConfig, ModalityPlan, Needs, Plan
from distill_core.document import Document, Path, read_document
from distill_core.errors import RecipeErrors, UserError, did_you_mean
from distill_core.registry import Registry

NodeDict = dict[str, Any]
Positive = Annotated[int, Field(gt=0)]


class TeacherConfig(ComponentConfig):
    """The teacher: an exponential moving average of the student's backbones (and of losses' `teacher_modules`)."""

    momentum: Annotated[float, Field(ge=0, le=1)] = 0.999
    """teacher = momentum * teacher + (1 - momentum) * student, each step."""
    momentum_end: Annotated[float, Field(ge=0, le=1)] | None = None
    """Move the momentum to this value along a cosine over the run; null keeps it fixed."""
    update: Literal["before_optimizer", "after_optimizer"] = "after_optimizer"
    """Average in the student's weights from before or after this step's optimiser update."""
    views: tuple[str, ...] = ("global",)
    """Roles of the views that the teacher encodes."""
    modalities: tuple[str, ...] | None = None
    """Modalities with a teacher; null means all."""


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
    """bf16 runs the forward pass under autocast; weights, teacher, logits and losses stay fp32."""
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    """Clip the gradients' global L2 norm to this value."""
    device: str = "auto"
    """`auto` (CUDA when there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    threads: Positive | None = None
    """CPU threads of torch; null leaves a core to the loader's workers when there are any."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite stops the run, or skips the step and counts it."""
    log_every: Positive = 10
    """Steps between rows of metrics.jsonl."""
    checkpoint: CheckpointConfig = CheckpointConfig()


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
    """Components of kind `evaluation`."""


class _Frame(ComponentConfig):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The run folder's name."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of weights, shuffling and views."""
    augment: Annotated[dict[str, NodeDict | str | None], Field(min_length=1)]
    """Modality -> a component of kind `augmentation`."""
    backbone: Annotated[dict[str, NodeDict | str | None], Field(min_length=1)]
    """Modality -> a component of kind `backbone`."""
    fusion: NodeDict | None = None
    """A component of kind `fusion`."""
    loss: Annotated[list[NodeDict | str | None], Field(min_length=1)]
    """Components of kind `loss`; their terms are added up, each times its weight."""
    teacher: TeacherConfig | None = None
    data: DataConfig
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: NodeDict | None = {"name": "aim"}  # noqa: RUF012
    """A component of kind `tracker`; null keeps only metrics.jsonl."""
    init: list[NodeDict | str | None] = []  # noqa: RUF012
    """Components of kind `init`: weights to start from, applied in order."""
    freeze: list[str] = []  # noqa: RUF012
    """Component paths that are not trained, as [backbone.text]."""


@dataclass(frozen=True)
class Node:
    """A component's place in a recipe: its class and validated options."""

    path: str
    id: str
    cls: type[Component]
    config: Any
    package: str
    explicit_id: bool = False

    def build(self, *arguments: Any) -> Any:
        """The component; a ValueError of its constructor becomes a `UserError` that names its path."""
        try:
            return self.cls(self.config, *arguments)  # type: ignore[call-arg]
        except ValueError as error:
            raise UserError(f"{self.path}: {self.cls.name}: {error}") from error

    def dump(self) -> dict[str, Any]:
        """As a recipe would write it, with every default."""
        head = {"name": self.cls.name, **({"id": self.id} if self.explicit_id else {})}
        return {**head, **self.config.model_dump(mode="json", by_alias=True)}


@dataclass(frozen=True)
class Recipe:
    """A validated recipe. Sections hold pydantic configs; component places hold `Node`s."""

    name: str
    seed: int
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
    init: Sequence[Node]
    freeze: Sequence[str]
    plan: Plan
    file: str = ""
    warnings: Sequence[str] = field(default=(), compare=False)

    def needs(self) -> list[tuple[Node, Needs]]:
        """What the fusion and each loss need."""
        nodes = [*([self.fusion] if self.fusion else []), *self.loss]
        return [(node, node.cls.needs(node.config, self.plan)) for node in nodes]

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe with every default, as plain data."""

        def one(node: Node | None) -> dict[str, Any] | None:
            return node.dump() if node is not None else None

        train = self.train.model_dump(mode="json") | {"optimizer": one(self.optimizer), "schedule": one(self.schedule)}
        evaluate = self.evaluate.model_dump(mode="json") | {
            "source": one(self.evaluate_source),
            "tasks": [one(node) for node in self.tasks],
        }
        return {
            "name": self.name,
            "seed": self.seed,
            "augment": {name: one(node) for name, node in self.augment.items()},
            "backbone": {name: one(node) for name, node in self.backbone.items()},
            "fusion": one(self.fusion),
            "loss": [one(node) for node in self.loss],
            "teacher": self.teacher.model_dump(mode="json") if self.teacher else None,
            "data": self.data.model_dump(mode="json") | {"source": one(self.source)},
            "train": train,
            "evaluate": evaluate,
            "tracking": one(self.tracking),
            "init": [one(node) for node in self.init],
            "freeze": list(self.freeze),
        }

    def to_yaml(self) -> str:
        """The resolved recipe as YAML; loading it again gives the same recipe."""
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


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

_SLOTS: tuple[tuple[Path, str], ...] = (
    (("augment", "*"), "augmentation"),
    (("backbone", "*"), "backbone"),
    (("fusion",), "fusion"),
    (("loss", "#"), "loss"),
    (("data", "source"), "source"),
    (("train", "optimizer"), "optimizer"),
    (("train", "schedule"), "schedule"),
    (("evaluate", "source"), "source"),
    (("evaluate", "tasks", "#"), "evaluation"),
    (("tracking",), "tracker"),
    (("init", "#"), "init"),
)


def load_recipe(
    file: str | FilePath,
    *,
    registry: Registry,
    overrides: Sequence[str] = (),
    allow_unset: bool = False,
) -> Recipe:
    """Read and check a recipe. Raises `RecipeErrors` with all that is wrong.

    `overrides` are `path=value` strings. `allow_unset` turns unset `${NAME}` into warnings.
    """
    path = FilePath(file)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise RecipeErrors([f"{file}: no such recipe{did_you_mean(path.name, near)}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeErrors([f"{file}: cannot be read: {error}"]) from error
    return parse_recipe(
        text, str(file), registry=registry, overrides=overrides, allow_unset=allow_unset, default_name=path.stem
    )


def parse_recipe(
    text: str,
    file: str,
    *,
    registry: Registry,
    overrides: Sequence[str] = (),
    allow_unset: bool = False,
    default_name: str = "run",
) -> Recipe:
    """As `load_recipe`, from text."""
    document = read_document(text, file)
    failed: list[str] = []
    for override in overrides:
        try:
            document.set(override)
        except RecipeErrors as error:
            failed.extend(error.lines)
    if failed:
        raise RecipeErrors(failed)
    document.data.setdefault("name", default_name)
    return _Resolver(document, registry, allow_unset).resolve()


class _Resolver:
    def __init__(self, document: Document, registry: Registry, allow_unset: bool) -> None:
        self.document = document
        self.registry = registry
        self.allow_unset = allow_unset
        self.errors: list[tuple[Path, str]] = []
        self.nodes: dict[Path, Node] = {}
        self.broken: set[Path] = set()

    def error(self, path: Path, message: str) -> None:
        self.errors.append((path, message))

    def resolve(self) -> Recipe:
        warnings = []
        for path, name in self.document.expand():
            message = f"the environment variable {name} is not set; set it, or give a value with --set"
            if self.allow_unset:
                warnings.append(self._line(path, message))
            else:
                self.error(path, message)
        self._remove_none()
        frame = self._frame()
        self._components()
        plan = self._plan()
        self._compatibility(plan)
        if frame is not None:
            self._whole(frame)
        if self.errors or frame is None:
            order = {line: i for i, line in enumerate(self.document.origins.values())}
            lines = [(self.document.origin(path), self._line(path, message)) for path, message in self.errors]
            raise RecipeErrors([line for _, line in sorted(set(lines), key=lambda x: (order.get(x[0], -1), x[1]))])
        return self._recipe(frame, plan, warnings)

    def _line(self, path: Path, message: str) -> str:
        dotted = ".".join(str(part) for part in path)
        return f"{self.document.origin(path)}: {dotted}: {message}" if dotted else f"{self.document.name}:1: {message}"

    def _get(self, path: Path) -> Any:
        node = self.document.data
        for part in path:
            if isinstance(node, dict):
                node = node.get(part)
            elif isinstance(node, list) and isinstance(part, int) and part < len(node):
                node = node[part]
            else:
                return None
        return node

    def _places(self) -> Iterable[tuple[Path, str]]:
        for pattern, kind in _SLOTS:
            paths: list[Path] = [()]
            for part in pattern:
                if part == "*":
                    paths = [(*p, key) for p in paths for key in (self._get(p) if isinstance(self._get(p), dict) else ())]
                elif part == "#":
                    paths = [
                        (*p, i) for p in paths for i in range(len(self._get(p)) if isinstance(self._get(p), list) else 0)
                    ]
                else:
                    paths = [(*p, part) for p in paths]
            for path in paths:
                yield path, kind

    def _remove_none(self) -> None:
        """`none` for a component or a section is `null`; a bare name is `{name: NAME}`."""
        for path in [*(path for path, _ in self._places()), ("teacher",), ("evaluate",)]:
            value, above = self._get(path), self._get(path[:-1])
            if isinstance(value, str) and value.lower() == "none":
                above[path[-1]] = None
            elif isinstance(value, str) and path != ("teacher",):
                above[path[-1]] = {"name": value}
        for section in ("augment", "backbone"):
            if isinstance(self._get((section,)), dict):
                self.document.data[section] = {k: v for k, v in self.document.data[section].items() if v is not None}
        for optional in ("evaluate", "init", "freeze"):
            if optional in self.document.data and self.document.data[optional] is None:
                del self.document.data[optional]

    def _frame(self) -> _Frame | None:
        try:
            return _Frame.model_validate_json(json.dumps(self.document.data))
        except ValidationError as error:
            self._translate(error, (), _Frame)
            return None

    def _translate(self, error: ValidationError, base: Path, model: type[ComponentConfig]) -> None:
        for item in error.errors(include_url=False):
            # union branches add their type's name to the location; only what is in the document is a path
            path: Path = base
            for part in item["loc"]:
                if self._get((*path, part)) is not None or item["type"] in ("missing", "extra_forbidden"):
                    path = (*path, part)
            if item["type"] == "extra_forbidden":
                known = _options(model, path[len(base) : -1])
                self.error(path, f"unknown option {path[-1]!r}{did_you_mean(str(path[-1]), known)}")
            elif item["type"] == "missing":
                self.error(path, "is required and not given")
            else:
                given = item["input"]
                shown = f", got {given!r}" if isinstance(given, str | int | float | bool) or given is None else ""
                message = item["msg"].removeprefix("Value error, ")
                if "list[" in str(item["loc"]) or item["type"].startswith(("string_type", "none_required")):
                    pass
                self.error(path, message + shown)

    def _components(self) -> None:
        for path, kind in self._places():
            value = self._get(path)
            if value is None:
                continue
            if not isinstance(value, dict):
                self.broken.add(path)  # the frame's check has said what it should be
                continue
            options = dict(value)
            name, given_id = options.pop("name", None), options.pop("id", None)
            if not isinstance(name, str):
                self.error(path, f"needs a name: a component of kind {kind}, as {{name: ...}}")
                self.broken.add(path)
                continue
            if given_id is not None and (not isinstance(given_id, str) or not given_id or "." in given_id):
                self.error((*path, "id"), f"an id is a word without dots, got {given_id!r}")
            try:
                entry = self.registry.get(kind, name)
            except KeyError as error:
                self.error(path, error.args[0])
                self.broken.add(path)
                continue
            try:
                config = entry.cls.Config.model_validate_json(json.dumps(options))
            except ValidationError as error:
                self._translate(error, path, entry.cls.Config)
                self.broken.add(path)
                continue
            dotted = ".".join(str(part) for part in path)
            self.nodes[path] = Node(dotted, given_id or name, entry.cls, config, entry.package, given_id is not None)
        for section in ("loss", "tasks", "init"):
            seen: dict[str, Path] = {}
            for path, node in self.nodes.items():
                if path[-2:-1] == (section,):
                    if node.id in seen and section != "init":
                        self.error(path, f"a second {node.id!r}: give it an `id:` of its own")
                    seen[node.id] = path

    def _plan(self) -> Plan:
        teacher = self._get(("teacher",))
        has_teacher = isinstance(teacher, dict)
        views = teacher.get("views", ["global"]) if has_teacher else []
        taught = teacher.get("modalities") if has_teacher else []
        modalities = {}
        for path, node in self.nodes.items():
            if path[0] != "augment" or ("backbone", path[1]) not in self.nodes:
                continue
            name, backbone = str(path[1]), self.nodes["backbone", path[1]]
            roles = node.cls.roles(node.config)  # type: ignore[attr-defined]
            dims = backbone.cls.dims(backbone.config)  # type: ignore[attr-defined]
            seen = tuple(i for i, r in enumerate(roles) if isinstance(views, list) and r in views)
            if not has_teacher or (isinstance(taught, list) and name not in taught):
                seen = ()
            modalities[name] = ModalityPlan(roles, seen, dims.width, dims.dim, dims.has_tokens)
        fusion = isinstance(self._get(("fusion",)), dict)
        return Plan(modalities, has_teacher, fusion)

    def _modalities(self) -> set[str]:
        sections = (self._get(("augment",)), self._get(("backbone",)))
        return {str(key) for section in sections if isinstance(section, dict) for key in section}

    def _compatibility(self, plan: Plan) -> None:
        for one, other in (("augment", "backbone"), ("backbone", "augment")):
            here, there = self._get((one,)), self._get((other,))
            if isinstance(here, dict) and isinstance(there, dict):
                for name in here:
                    if name not in there:
                        self.error((one, name), f"{name!r} has no entry in {other}; a modality needs both")
        for path, node in self.nodes.items():
            try:
                needs = node.cls.needs(node.config, plan)
                problems = list(node.cls.problems(node.config, plan))
            except KeyError as error:
                # a component asks for a modality that the plan lacks
                name = str(error.args[0])
                if name not in self._modalities():
                    self.error(path, f"{node.id!r} needs a modality {name!r}{did_you_mean(name, list(self._modalities()))}")
                continue
            for problem in [*self._unmet(node, needs, plan), *problems]:
                self.error(path, problem)

    def _unmet(self, node: Node, needs: Needs, plan: Plan) -> Iterable[str]:
        who = repr(node.cls.name)
        if needs.teacher and not plan.teacher:
            yield f"{who} needs a teacher; this recipe has none"
        if needs.fused and not plan.fusion:
            yield f"{who} needs fused views; this recipe has no fusion"
        names = {*needs.modalities, *needs.tokens, *needs.teacher_tokens, *needs.views}
        for name in sorted(names - self._modalities()):
            yield f"{who} needs a modality {name!r}{did_you_mean(name, sorted(self._modalities()))}"
        for name in sorted(names & set(plan.modalities)):
            modality = plan.modalities[name]
            if (needs.tokens.get(name) or needs.teacher_tokens.get(name)) and not modality.has_tokens:
                yield f"{who} needs tokens of {name!r}; its backbone gives none"
            if max(needs.tokens.get(name, ()), default=-1) >= len(modality.roles):
                yield f"{who} needs the tokens of view {max(needs.tokens[name])} of {name!r}; it has {len(modality.roles)}"
            if needs.teacher and plan.teacher and name in needs.modalities and not modality.teacher_views:
                yield f"{who} needs a teacher of {name!r}; this recipe's teacher sees none of its views"
            for role, number in needs.views.get(name, {}).items():
                have = len(modality.views(role))
                if have < number:
                    yield f"{who} needs {number} {role} view(s) of {name!r}; its augmentation makes {have}"

    def _whole(self, frame: _Frame) -> None:
        if frame.train.steps is None and frame.train.epochs is None:
            self.error(("train",), "give `steps` or `epochs`")
        if frame.train.checkpoint.best is not None and frame.evaluate.every is None:
            self.error(("train", "checkpoint", "best"), "needs `evaluate.every`: scores on the validation split")
        if not any(node is not None for node in frame.loss):
            self.error(("loss",), "no loss is left")
        for name in frame.teacher.modalities or () if frame.teacher else ():
            if name not in self._modalities():
                self.error(("teacher", "modalities"), f"no modality {name!r}")

    def _recipe(self, frame: _Frame, plan: Plan, warnings: Sequence[str]) -> Recipe:
        def all_of(*prefix: str) -> list[Node]:
            return [node for path, node in self.nodes.items() if path[:-1] == prefix]

        def named(section: str) -> dict[str, Node]:
            return {str(path[1]): node for path, node in self.nodes.items() if path[0] == section}

        default = {}
        for path, kind in ((("train", "optimizer"), "optimizer"), (("train", "schedule"), "schedule"), (("tracking",), "tracker")):
            node = self.nodes.get(path)
            given = self._get(path[:-1]) or {}
            if node is None and path[-1] not in given:
                name = getattr(frame.train, path[-1])["name"] if path[0] == "train" else frame.tracking["name"]  # type: ignore[index]
                entry = self.registry.entries.get((kind, name))
                if entry is not None:
                    node = Node(".".join(path), name, entry.cls, entry.cls.Config(), entry.package)
                elif kind != "tracker":
                    raise RecipeErrors([self._line(path, f"no {kind} named {name!r}")])
            default[path[-1]] = node
        optimizer, schedule = default["optimizer"], default["schedule"]
        if optimizer is None or schedule is None:
            raise RecipeErrors([self._line(("train",), "needs an optimizer and a schedule")])
        return Recipe(
            name=frame.name,
            seed=frame.seed,
            augment=named("augment"),
            backbone=named("backbone"),
            fusion=self.nodes.get(("fusion",)),
            loss=all_of("loss"),
            teacher=frame.teacher,
            data=frame.data,
            source=self.nodes["data", "source"],
            train=frame.train,
            optimizer=optimizer,
            schedule=schedule,
            evaluate=frame.evaluate,
            evaluate_source=self.nodes.get(("evaluate", "source")),
            tasks=all_of("evaluate", "tasks"),
            tracking=default["tracking"],
            init=all_of("init"),
            freeze=frame.freeze,
            plan=plan,
            file=self.document.name,
            warnings=tuple(warnings),
        )


def _options(model: Any, path: Path) -> list[str]:
    """The option names of the (nested) config at `path` inside `model`."""
    for part in path:
        annotation = getattr(model, "model_fields", {}).get(part)
        model = annotation.annotation if annotation is not None else None
        for choice in getattr(model, "__args__", ()):
            if hasattr(choice, "model_fields"):
                model = choice
    return list(getattr(model, "model_fields", {})) + (["name", "id"] if not path and model is not _Frame else [])
