"""The schedule's contract, the built-in schedules, and `Scheduled`: an option that is a number or a schedule."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Generic, TypeVar, get_args

from pydantic import Field, GetCoreSchemaHandler, ValidationError, ValidatorFunctionWrapHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema
from pydantic_core.core_schema import ValidationInfo

from distill_core.contracts.component import Component, ComponentConfig
from distill_core.contracts.slot import JSON_KEY, Context, Slot, resolve_slot
from distill_core.errors import option_message
from distill_core.outputs import Progress

Number = TypeVar("Number")
Point = Annotated[float, Field(ge=0)]
"""A point of a run: a part of it from 0 to 1, or a number of steps above 1."""
NotNegative = Annotated[float, Field(ge=0)]


class Schedule(Component, ABC):
    """The course of a number over a run: of the learning rate's factor, a loss's weight, a teacher's momentum, ..."""

    kind = "schedule"

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def value(self, progress: Progress) -> float:
        """The number at a step. It depends on `progress` alone, so that a resumed run continues with the same."""


class WarmupCosineConfig(ComponentConfig):
    """Linear warm-up, then a cosine."""

    warmup: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] = 2000
    """Warm-up steps, or a part of the run below 1."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The value at the end."""


class WarmupCosine(Schedule):
    """(step + 1) / warmup up to 1, then a half cosine to `final`: factors of a learning rate."""

    name = "warmup_cosine"
    Config = WarmupCosineConfig

    def value(self, progress: Progress) -> float:
        """The warm-up takes 1 at its last step, the cosine would reach `final` at the end of the run."""
        step, steps = progress.step, progress.steps
        warmup_option = self.config.warmup
        warmup = round(warmup_option * steps) if warmup_option < 1 else int(warmup_option)
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(steps - warmup, 1)
        return float(self.config.final + (1 - self.config.final) * (1 + math.cos(math.pi * done)) / 2)


class ConstantConfig(ComponentConfig):
    """Linear warm-up, then flat."""

    warmup: Annotated[int, Field(ge=0)] = 0
    """Warm-up steps."""


class Constant(Schedule):
    """(step + 1) / warmup up to 1, then 1: factors of a learning rate."""

    name = "constant"
    Config = ConstantConfig

    def value(self, progress: Progress) -> float:
        """After the warm-up, 1."""
        return min((progress.step + 1) / self.config.warmup, 1.0) if self.config.warmup else 1.0


class CourseConfig(ComponentConfig):
    """From one value to another between two points of a run. A point is a part of the run from 0 to 1, or a number of
    steps above 1."""

    start: float
    """The value up to `after`."""
    end: float
    """The value from `until` on."""
    after: Point = 0.0
    """The point at which it begins to move."""
    until: Point = 1.0
    """The point at which it has reached `end`."""

    @model_validator(mode="after")
    def _ordered(self) -> CourseConfig:
        if (self.after <= 1) == (self.until <= 1) and self.after > self.until:
            raise ValueError(f"after {self.after} is later than until {self.until}")
        return self


class Ramp(Schedule):
    """A straight line from `start` to `end`."""

    name = "ramp"
    Config: ClassVar[type[ComponentConfig]] = CourseConfig
    examples = ({"start": 0.04, "end": 0.07, "until": 0.3}, {"start": 1.0, "end": 0.0, "after": 10})

    def value(self, progress: Progress) -> float:
        """On the line, and flat on both sides of it."""
        start, end = self.config.start, self.config.end
        return float(start + (end - start) * _done(self.config, progress))


class Cosine(Schedule):
    """Half a cosine from `start` to `end`: slow at both ends."""

    name = "cosine"
    Config: ClassVar[type[ComponentConfig]] = CourseConfig
    examples = ({"start": 0.996, "end": 1.0}, {"start": 0.04, "end": 0.4, "after": 0.1, "until": 0.9})

    def value(self, progress: Progress) -> float:
        """On the cosine, and flat on both sides of it."""
        start, end = self.config.start, self.config.end
        return float(end - (end - start) * (math.cos(math.pi * _done(self.config, progress)) + 1) / 2)


def _done(config: CourseConfig, progress: Progress) -> float:
    """How much of the way between its points a run has come, 0 to 1."""
    first, last = (step_of(point, progress) for point in (config.after, config.until))
    if progress.step >= last:
        return 1.0
    return (progress.step - first) / (last - first) if progress.step > first else 0.0


def step_of(point: float, progress: Progress) -> float:
    """A point of the run (`Point`) in steps."""
    return point * progress.steps if point <= 1 else point


class StepsConfig(ComponentConfig):
    """Values, and the points at which one follows another: a part of the run from 0 to 1, or a number of steps above
    1."""

    values: Annotated[tuple[float, ...], Field(min_length=2)]
    """The values, in order."""
    at: Annotated[tuple[Point, ...], Field(min_length=1)]
    """Where the second begins, the third, ..."""

    @model_validator(mode="after")
    def _ordered(self) -> StepsConfig:
        if len(self.values) != len(self.at) + 1:
            raise ValueError(
                f"{len(self.values)} values need {len(self.values) - 1} points in `at`, got {len(self.at)}"
            )
        if any((a <= 1) == (b <= 1) and a >= b for a, b in pairwise(self.at)):
            raise ValueError("the points in `at` must rise")
        return self


class Steps(Schedule):
    """One value after another, each from its point of the run on."""

    name = "steps"
    Config = StepsConfig
    examples = ({"values": [1.0, 0.1, 0.01], "at": [0.5, 0.8]}, {"values": [0.0, 1.0], "at": [3]})

    def value(self, progress: Progress) -> float:
        """That of the last point that the run has reached."""
        reached = sum(progress.step >= step_of(point, progress) for point in self.config.at)
        return float(self.config.values[reached])


class Scheduled(Generic[Number]):
    """An option that is read anew each step: a number, or a schedule, as `{name: ramp, start: 0, end: 1}`.

    `Scheduled[Annotated[float, Field(ge=0)]]` is the type of the option: no value of a schedule may break its bounds.
    `Scheduled(1.0)` is a default; `Scheduled.by(Ramp, start=0.0, end=1.0)` one that moves.
    """

    def __init__(self, source: float | Slot[Schedule]) -> None:
        self.source = source
        # no cached_property, which torch.compile does not trace in Python 3.11
        self._schedule = source.build() if isinstance(source, Slot) else None

    @classmethod
    def by(cls, schedule: type[Schedule], **options: Any) -> Scheduled[Number]:
        """The schedule with these options."""
        return cls(Slot(schedule, schedule.Config(**options)))

    @property
    def moves(self) -> bool:
        """Whether it is a schedule, not a number."""
        return isinstance(self.source, Slot)

    def value(self, progress: Progress) -> float:
        """The number at this step: a pure function of `progress`."""
        if self._schedule is not None:
            return self._schedule.value(progress)
        assert not isinstance(self.source, Slot)
        return self.source

    def dump(self) -> float | dict[str, Any]:
        """As a recipe would write it."""
        return self.source.dump() if isinstance(self.source, Slot) else self.source

    def __eq__(self, other: object) -> bool:
        """Two of the same course; a number where it is this one throughout."""
        return self.source == (other.source if isinstance(other, Scheduled) else other)

    def __hash__(self) -> int:
        return hash(self.source)

    def __repr__(self) -> str:
        return f"Scheduled({self.source!r})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        number = handler.generate_schema(*get_args(source) or (float,))
        return core_schema.with_info_wrap_validator_function(
            _validate,
            number,
            serialization=core_schema.plain_serializer_function_ser_schema(Scheduled.dump),
            metadata={"pydantic_js_functions": [_json_schema]},
        )


def _json_schema(schema: CoreSchema, handler: Any) -> dict[str, Any]:
    return {"anyOf": [handler(schema), {JSON_KEY: Schedule.kind}]}


LENGTHS = (100, 100_000)
"""Steps of the runs at 101 points of which a schedule's values are compared with the bounds of its option."""


def _validate(value: Any, check: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Scheduled[Any]:
    if isinstance(value, Scheduled):
        return value
    if not isinstance(value, str | Mapping):
        return Scheduled(check(value))
    name = value if isinstance(value, str) else value.get("name")
    if isinstance(info.context, Context) and isinstance(name, str):
        try:
            info.context.registry.get(Schedule.kind, name)
        except KeyError as error:
            message = f"must be a number or a schedule; there is {error.args[0]}"
            raise PydanticCustomError("unknown_schedule", "{message}", {"message": message}) from error
    slot = resolve_slot((Schedule,), value, info.context)
    scheduled: Scheduled[Any] = Scheduled(slot)
    for steps in LENGTHS:
        for i in range(101):
            reached = scheduled.value(Progress(i * steps // 100, steps))
            try:
                check(reached)
            except ValidationError as error:
                what = option_message(error.errors(include_url=False)[0])
                message = f"the schedule {slot.cls.name!r} takes the value {reached:g}; it {what}"
                raise PydanticCustomError("out_of_bounds", "{message}", {"message": message}) from error
    return scheduled
