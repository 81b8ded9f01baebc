"""YAML -> `Recipe`: every error at `file:line: path: message`, all of a file at once.

What the components need of one another is checked here, before any data or weights are touched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import nn

from distill_core.contracts.component import ComponentConfig
from distill_core.errors import RecipeErrors, UserError, did_you_mean
from distill_core.plan import MissingModality, ModalityPlan, Plan
from distill_core.recipe.compatibility import unmet
from distill_core.recipe.document import Document, Path, located, read_document, read_file
from distill_core.recipe.messages import messages
from distill_core.recipe.named import recipe_file
from distill_core.recipe.sections import EvaluateConfig, Frame, Node, Recipe, TrainConfig
from distill_core.recipe.splits import split_problems
from distill_core.registry import Registry
from distill_core.teacher import TeacherConfig

SLOTS: tuple[tuple[Path, str], ...] = (
    (("augment", "*"), "augmentation"),
    (("backbone", "*"), "backbone"),
    (("fusion",), "fusion"),
    (("loss", "#"), "loss"),
    (("data", "source"), "source"),
    (("train", "optimizer"), "optimizer"),
    (("train", "schedule"), "schedule"),
    (("evaluate", "source"), "source"),
    (("evaluate", "tasks", "#", "source"), "source"),
    (("evaluate", "tasks", "#"), "task"),
    (("tracking",), "tracker"),
    (("weights", "#"), "weights"),
)
"""The places of components, and their kinds: `*` stands for any key, `#` for any item."""

DEFAULTS: dict[Path, str] = {
    ("train", "optimizer"): TrainConfig.model_fields["optimizer"].default["name"],
    ("train", "schedule"): TrainConfig.model_fields["schedule"].default["name"],
    ("tracking",): Frame.model_fields["tracking"].default["name"],
}
"""The component of a place where options are given without a name."""

OPTIONAL: tuple[Path, ...] = (("teacher",), ("evaluate",), ("evaluate", "tasks"), ("weights",), ("freeze",))
"""Sections that `null` and `none` empty."""

Section = TypeVar("Section", bound=ComponentConfig)

Override = str | tuple[str, str]
"""`path=value`, or that and where it was written."""


def load_recipe(
    file: str | FilePath,
    *,
    registry: Registry,
    overrides: Sequence[Override] = (),
    allow_unset: bool = False,
) -> Recipe:
    """Read and check a recipe: a file, or the name of one that a plugin brings.

    Raises `RecipeErrors` with all that is wrong.

    `overrides` are `path=value` strings, each with the place it was written at where that is not the command line.
    `allow_unset` turns unset `${NAME}` into warnings.
    """
    file = recipe_file(file)
    return parse_recipe(
        read_file(file, "recipe"),
        str(file),
        registry=registry,
        overrides=overrides,
        allow_unset=allow_unset,
        default_name=file.stem,
    )


def parse_recipe(
    text: str,
    file: str,
    *,
    registry: Registry,
    overrides: Sequence[Override] = (),
    allow_unset: bool = False,
    default_name: str = "run",
) -> Recipe:
    """As `load_recipe`, from text."""
    document = read_document(text, file)
    if "recipe" in document.data and not {"backbone", "loss"} & document.data.keys():
        raise RecipeErrors([f"{file}: is a study, and no recipe: distill ablate {file}"])
    resolver = _Resolver(document, registry, allow_unset)
    resolver.write_out()
    failed: list[str] = []
    for override in overrides:
        try:
            resolver.change(*((override,) if isinstance(override, str) else override))
        except RecipeErrors as error:
            failed.extend(error.lines)
    if failed:
        raise RecipeErrors(failed)
    document.data.setdefault("name", default_name)
    return resolver.resolve()


# attributes of torch's containers, which a module below them cannot be named after
_TAKEN = frozenset(dir(nn.ModuleDict()))


class _Resolver:
    def __init__(self, document: Document, registry: Registry, allow_unset: bool) -> None:
        self.document = document
        self.registry = registry
        self.allow_unset = allow_unset
        self.errors: list[tuple[str, str]] = []  # (where it was written, line)
        self.nodes: dict[Path, Node] = {}
        self.unset: dict[Path, str] = {}
        self.replaced: dict[Path, dict[str, Any]] = {}  # components in whose place a change named another

    def change(self, assignment: str, origin: str | None = None) -> None:
        """Apply one override. Raises `RecipeErrors`."""
        path, before = self.document.set(assignment, origin)
        named = isinstance(self._get(path), str)
        self.write_out()  # so that the next one finds loss.1.weight where `loss.1` was a bare name
        self.replaced.pop(path, None)
        if named and isinstance(before, dict) and isinstance(self._get(path), dict):
            self.replaced[path] = before

    def error(self, path: Path, message: str, at: Path | None = None) -> None:
        """`at`: the part that is to blame, where the message speaks of what is above it."""
        origin = self.document.origin(at or path)
        if not origin.startswith("--set"):  # what the command line changed there is likely to be to blame
            below = [where for part, where in self.document.origins.items() if part[: len(path)] == path]
            changed = dict.fromkeys(where for where in below if where.startswith("--set"))
            message += f" (with {', '.join(changed)})" if changed else ""
        self.errors.append((origin, self._line(path, message, at)))

    def resolve(self) -> Recipe:
        warnings = []
        for path, name in self.document.expand():
            message = f"the environment variable {name} is not set; set it, or give a value with --set"
            self.unset[path] = message
            if self.allow_unset:
                warnings.append(self._line(path, message))
            else:
                self.error(path, message)
        self.write_out()
        frame = self._frame()
        self._components()
        plan = self._plan()
        self._compatibility(plan)
        self._whole()
        self._raise()
        assert frame is not None
        recipe = self._recipe(frame, plan, [*warnings, *self._left_behind()])
        if recipe.freeze or recipe.train.lr_factors:
            unchecked = self._parts(recipe)
            self._raise()
            recipe = replace(recipe, warnings=(*recipe.warnings, *unchecked))
        return recipe

    def _raise(self) -> None:
        """All errors so far, in the order of the document."""
        if self.errors:
            order = {line: i for i, line in enumerate(self.document.origins.values())}
            found = sorted(set(self.errors), key=lambda x: (order.get(x[0], -1), x[1]))
            raise RecipeErrors([line for _, line in found])

    def _left_behind(self) -> Iterable[str]:
        """A line for each component that a bare name replaced, and that had options the new one has too.

        The new one has its own defaults: an option of the same name may mean another thing (a scale, a width).
        """
        for path, before in self.replaced.items():
            node = self.nodes.get(path)
            if node is None:
                continue
            now = node.config.model_dump(mode="json", by_alias=True)
            shared = {key: value for key, value in before.items() if key in now and now[key] != value}
            if shared:
                options = ", ".join(f"{key}: {json.dumps(value)}" for key, value in shared.items())
                yield self._line(
                    path,
                    f"{node.cls.name!r} starts from its own defaults, without the recipe's {options} of "
                    f"{before['name']!r}; write {{name: {node.cls.name}, {options}}} to give it the same",
                )

    def _line(self, path: Path, message: str, at: Path | None = None) -> str:
        return f"{located(self.document.origin(at or path), path)}: {message}"

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
        for pattern, kind in SLOTS:
            paths: list[Path] = [()]
            for part in pattern:
                if part == "*":
                    paths = [
                        (*p, key) for p in paths for key in (self._get(p) if isinstance(self._get(p), dict) else ())
                    ]
                elif part == "#":
                    paths = [
                        (*p, i)
                        for p in paths
                        for i in range(len(self._get(p)) if isinstance(self._get(p), list) else 0)
                    ]
                else:
                    paths = [(*p, part) for p in paths]
            for path in paths:
                yield path, kind

    def _has(self, path: Path) -> bool:
        above = self._get(path[:-1])
        if isinstance(above, list):
            return isinstance(path[-1], int) and path[-1] < len(above)
        return isinstance(above, dict) and path[-1] in above

    def write_out(self) -> None:
        """`none` for a component or a section is `null`; a bare name is `{name: NAME}`."""
        for path in [*(path for path, _ in self._places()), *OPTIONAL]:
            value, above = self._get(path), self._get(path[:-1])
            if isinstance(value, str) and value.lower() == "none":
                above[path[-1]] = None
            elif isinstance(value, str) and path not in OPTIONAL and "${" not in value:
                above[path[-1]] = {"name": value}
            elif isinstance(value, dict) and path in DEFAULTS:
                value.setdefault("name", DEFAULTS[path])
        for section in ("augment", "backbone"):
            if isinstance(self._get((section,)), dict):
                self.document.data[section] = {k: v for k, v in self.document.data[section].items() if v is not None}
        for path in OPTIONAL[1:]:
            if self._has(path) and self._get(path) is None:
                del self._get(path[:-1])[path[-1]]

    def _frame(self) -> Frame | None:
        try:
            return Frame.model_validate_json(json.dumps(self.document.data))
        except ValidationError as error:
            self._translate(error, (), Frame)
            return None

    def _translate(self, error: ValidationError, base: Path, model: type[ComponentConfig]) -> None:
        for path, message in messages(error, base, model, self._has, self.unset, plain=model is Frame):
            self.error(path, message)

    def _components(self) -> None:
        for path, kind in self._places():
            value = self._get(path)
            if value is None:
                continue
            if not isinstance(value, dict):
                continue  # the frame's check has said what it should be
            options = dict(value)
            name, given_id = options.pop("name", None), options.pop("id", None)
            own = options.pop("source", None) if kind == "task" else None
            if own is not None and not isinstance(own, dict):
                self.error((*path, "source"), f"should be a data source, as {{name: ...}}, got {own!r}")
            if not isinstance(name, str):
                self.error(path, f"needs a name: a component of kind {kind}, as {{name: ...}}")
                continue
            if given_id is not None and not _is_word(given_id):
                self.error((*path, "id"), f"an id is a word of letters, digits, - and _, got {given_id!r}")
            try:
                entry = self.registry.get(kind, name)
            except KeyError as error:
                self.error(path, error.args[0], (*path, "name"))
                continue
            try:
                config = entry.cls.Config.model_validate_json(json.dumps(options))
            except ValidationError as error:
                self._translate(error, path, entry.cls.Config)
                continue
            dotted = ".".join(str(part) for part in path)
            source = self.nodes.get((*path, "source"))
            self.nodes[path] = Node(
                dotted, given_id or name, entry.cls, config, entry.package, given_id is not None, source
            )
        for section in ("loss", "tasks", "weights"):
            seen: dict[str, Path] = {}
            for path, node in self.nodes.items():
                if path[-2:-1] == (section,):
                    if node.id in seen and section != "weights":
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
            try:
                spec = backbone.cls.spec(backbone.config)  # type: ignore[attr-defined]
            except UserError as error:
                self.error(("backbone", name), str(error))
                continue
            seen = tuple(i for i, r in enumerate(roles) if isinstance(views, list) and r in views)
            if not has_teacher or (isinstance(taught, list) and name not in taught):
                seen = ()
            if len([r for i, r in enumerate(roles) if i == 0 or r != roles[i - 1]]) != len(set(roles)):
                self.error(
                    path, f"{node.cls.name!r} makes views in the order {', '.join(roles)}; each role must be together"
                )
                continue
            modalities[name] = ModalityPlan(
                roles, seen, spec.width, spec.dim, spec.has_tokens, spec.can_mask, spec.class_tokens, spec.dense,
                node.config, node.cls.shapes(node.config),  # type: ignore[attr-defined]
            )  # fmt: skip
        fusion = isinstance(self._get(("fusion",)), dict)
        return Plan(modalities, has_teacher, fusion, set(modalities) == self._modalities())

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
            for name in here if isinstance(here, dict) else ():
                if not _is_word(name):
                    self.error((one, name), "a modality is a word of letters, digits, - and _")
        for path, node in self.nodes.items():
            try:
                needs = node.cls.needs(node.config, plan)
                problems = list(node.cls.problems(node.config, plan))
                if path[0] == "backbone" and path[1] in plan.modalities:
                    problems += node.cls.view_problems(node.config, plan.modalities[str(path[1])])  # type: ignore[attr-defined]
            except MissingModality as error:
                name = error.name
                if name not in self._modalities():
                    self.error(
                        path,
                        f"{node.id!r} needs a modality {name!r}{did_you_mean(name, list(self._modalities()))}",
                    )
                continue
            for problem in [*unmet(node.cls.name, needs, plan, self._modalities()), *problems]:
                self.error(path, problem)

    def _whole(self) -> None:
        """What sections need of one another. Options that are wrong by themselves are taken for their defaults."""
        train, evaluate = (self._get((section,)) for section in ("train", "evaluate"))
        if isinstance(train, dict) and train.get("steps") is None:
            source = self.nodes.get(("data", "source"))
            if train.get("epochs") is None:
                self.error(("train",), "give `steps` or `epochs`")
            elif source is not None and not source.cls.knows_size(source.config):  # type: ignore[attr-defined]
                self.error(
                    ("train", "epochs"),
                    f"{source.cls.name!r} does not say how many samples it has to train on: give `data.source.samples` "
                    "where it has that option, or `train.steps`",
                )
        best = self._get(("train", "checkpoint", "best"))
        if best is not None and not (isinstance(evaluate, dict) and evaluate.get("every") is not None):
            self.error(("train", "checkpoint", "best"), "needs `evaluate.every`: scores on the validation split")
        for path, message in split_problems(self.nodes, _valid(EvaluateConfig, evaluate)):
            self.error(path, message)
        losses = self._get(("loss",))
        if isinstance(losses, list) and losses and all(loss is None for loss in losses):
            self.error(("loss",), "no loss is left")
        for name in _valid(TeacherConfig, self._get(("teacher",))).modalities or ():
            if name not in self._modalities():
                self.error(("teacher", "modalities"), f"no modality {name!r}")
        components = self._component_paths()
        for at, part in self._part_paths():
            name = part if part in components else ".".join(part.split(".")[: 1 if part.startswith("fusion.") else 2])
            if name not in components:
                self.error(at, f"{part!r} names no part of the model{did_you_mean(part, components)}")

    def _component_paths(self) -> list[str]:
        """The paths of the parts that a model is made of, as far as the document names them."""
        backbones, losses = self._get(("backbone",)), self._get(("loss",))
        found = [f"backbone.{name}" for name in backbones] if isinstance(backbones, dict) else []
        for loss in losses if isinstance(losses, list) else ():
            found += [f"loss.{loss.get('id') or loss.get('name')}"] if isinstance(loss, dict) else []
        return [*found, *(["fusion"] if self._get(("fusion",)) is not None else []), "backbone", "loss"]

    def _part_paths(self) -> Iterator[tuple[Path, str]]:
        """(place in the recipe, path of a part of the model) of `freeze` and `train.lr_factors`."""
        frozen, factors = self._get(("freeze",)), self._get(("train", "lr_factors"))
        for i, part in enumerate(frozen if isinstance(frozen, list) else ()):
            if isinstance(part, str):
                yield ("freeze", i), part
        for part in factors if isinstance(factors, dict) else ():
            yield ("train", "lr_factors", part), part

    def _parts(self, recipe: Recipe) -> list[str]:
        """Check the paths of `freeze` and `lr_factors` against the model, built without memory. Returns warnings."""
        from distill_core.recipe.build import build_objective

        try:
            with torch.device("meta"):
                objective = build_objective(recipe)
        except Exception as error:  # a component of a plugin may need memory
            why = next(iter(str(error).splitlines()), "")
            return [
                "freeze, train.lr_factors: their paths are checked only when training starts, for the model cannot be "
                f"built without weights: {type(error).__name__}: {why}"
            ]
        for at, part in self._part_paths():
            for _, message in objective.unknown_parts([part]):
                self.error(at, message)
        if not self.errors:
            try:
                objective.trainable(recipe.freeze, {})
            except UserError as error:
                self.error(("freeze",), str(error).removeprefix("freeze: "))
        return []

    def _recipe(self, frame: Frame, plan: Plan, warnings: Sequence[str]) -> Recipe:
        def all_of(*prefix: str) -> list[Node]:
            return [node for path, node in self.nodes.items() if path[:-1] == prefix]

        def named(section: str) -> dict[str, Node]:
            return {str(path[1]): node for path, node in self.nodes.items() if path[0] == section}

        default = {}
        for path, kind in (
            (("train", "optimizer"), "optimizer"),
            (("train", "schedule"), "schedule"),
            (("tracking",), "tracker"),
        ):
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
        source, evaluate_source = self.nodes["data", "source"], self.nodes.get(("evaluate", "source"))
        tasks = all_of("evaluate", "tasks")
        scored = {
            "source": evaluate_source.dump() if evaluate_source else None,
            "tasks": [node.dump() for node in tasks],
        }
        return Recipe(
            name=frame.name,
            seed=frame.seed,
            tags=frame.tags,
            augment=named("augment"),
            backbone=named("backbone"),
            fusion=self.nodes.get(("fusion",)),
            loss=all_of("loss"),
            teacher=frame.teacher,
            data=frame.data.model_copy(update={"source": source.dump()}),
            source=source,
            train=frame.train.model_copy(update={"optimizer": optimizer.dump(), "schedule": schedule.dump()}),
            optimizer=optimizer,
            schedule=schedule,
            evaluate=frame.evaluate.model_copy(update=scored),
            evaluate_source=evaluate_source,
            tasks=tasks,
            tracking=default["tracking"],
            weights=all_of("weights"),
            freeze=frame.freeze,
            plan=plan,
            file=self.document.name,
            warnings=tuple(warnings),
        )


def _valid(model: type[Section], options: Any) -> Section:
    """A section with those of its options that are right by themselves; the others have their defaults."""
    right = {}
    for name, value in options.items() if isinstance(options, dict) else ():
        with suppress(ValidationError):
            model.model_validate_json(json.dumps({name: value}))
            right[name] = value
    return model.model_validate_json(json.dumps(right))


def _is_word(value: Any) -> bool:
    """Whether it can name a part of a path, of a score, and of a torch module."""
    return isinstance(value, str) and bool(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", value)) and value not in _TAKEN
