"""What depends on the device, as data: the rows of `defaults.csv`, and before them those that `tune` measured here.

A row is a rule: for calls of `op` on `device` (a kind, or "any") that meet every condition of `when`, try `backends` in
this order. Or it gives `numbers`: of an op, the coefficients of its own cost model, by which it then orders its
backends; of a part of one (`numbers_for`), sizes that it works with. The first row that holds decides. `model` limits a
row to devices of that name. `source` says whether it was measured (`evidence`: on what), estimated (from bytes,
products and launches), or is a matter of correctness, which goes before what was measured here.

A condition is `name=value`, `name=low..high`, `name=low..` or `name=..high`, bounds included; a name is an attribute of
the op's inputs, or of the tensor that a part works on.
"""

from __future__ import annotations

import csv
import os
import re
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill_kernels.machine import device_name, once

SHIPPED = Path(__file__).with_name("defaults.csv")
COLUMNS = ("op", "device", "model", "when", "backends", "numbers", "source", "evidence", "why")


class Condition(NamedTuple):
    """`low <= inputs.name <= high`; both are the same string where the attribute is one."""

    name: str
    low: Any
    high: Any


class Rule(NamedTuple):
    """A row that applies to an op on a device."""

    when: str
    conditions: tuple[Condition, ...]
    backends: tuple[str, ...]  # best first; empty where there are `numbers`
    numbers: dict[str, float]
    source: str  # measured, estimated or correctness
    why: str

    def holds(self, inputs: Any) -> bool:
        """Whether `inputs` meet every condition."""
        for name, low, high in self.conditions:  # noqa: SIM110  (torch.compile traces no generator here)
            if not low <= getattr(inputs, name) <= high:
                return False
        return True


class Row(NamedTuple):
    """A row of a table."""

    op: str  # or the part of one
    device: str  # a kind, or "any"
    model: str
    rule: Rule
    fields: tuple[str, ...]  # as written, in the order of `COLUMNS`


def parse_conditions(text: str) -> tuple[Condition, ...]:
    """Of a `when`, separated by spaces. Raises ValueError for what is no condition."""
    conditions = []
    for part in text.split():
        match = re.fullmatch(r"(\w+)=(?:(\d*)\.\.(\d*)|(\w+))", part)
        if match is None:
            raise ValueError(f"{part!r} is no condition: name=value, name=low..high, name=low.. or name=..high")
        name, low, high, value = match.groups()
        if value is None:
            conditions.append(Condition(name, int(low or 0), int(high or sys.maxsize)))
        else:
            exact = int(value) if value.isdigit() else value
            conditions.append(Condition(name, exact, exact))
    return tuple(conditions)


def parse_numbers(text: str) -> dict[str, float]:
    """Of a `numbers`: name=number, separated by spaces."""
    return {name: float(number) for name, number in (part.split("=") for part in text.split())}


def shape_class(names: str, inputs: Any) -> str:
    """Conditions that `inputs` meet, and others like them: each name's value, or with `name<=` the range up to the next
    power of two."""
    parts = []
    for name in names.split():
        value = getattr(inputs, name.removesuffix("<="))
        if name.endswith("<="):
            high = 1 << (max(value, 1) - 1).bit_length()
            parts.append(f"{name.removesuffix('<=')}={high // 2 + 1 if high > 1 else 0}..{high}")
        else:
            parts.append(f"{name}={value if isinstance(value, str) else int(value)}")
    return " ".join(parts)


# Cached as constants, because under torch.compile a choice is traced.
@once
def shipped(op: str, device: str) -> tuple[Rule, ...]:
    """The package's rules for an op on a device ("cpu", "cuda:0"), in order."""
    return _for_device(_read(SHIPPED), op, device)


@once
def required(op: str, device: str) -> tuple[Rule, ...]:
    """Those of the package's rules that are a matter of correctness."""
    return tuple(rule for rule in shipped(op, device) if rule.source == "correctness")


@once
def measured_here(op: str, device: str) -> tuple[Rule, ...]:
    """Those that `tune` wrote for this device; none where it never ran."""
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        return ()  # tensors that only say so: no card was measured
    return _for_device(measured_rows(table_path(where)), op, device)


@once
def measured_rows(path: Path) -> tuple[Row, ...]:
    """Of a table that `tune` wrote; none, with a warning, where it is damaged: then no row is to be trusted."""
    problem = why_not_readable(path)
    if problem is not None:
        ignore(path, problem)
        return ()
    return _read(path) if path.exists() else ()


def why_not_readable(path: Path) -> str | None:
    """What is wrong with a table; None for a good one, and where there is none."""
    try:
        if path.exists():
            _read(path)
    except (ValueError, csv.Error, OSError) as error:
        return str(error)
    return None


def ignore(path: Path, reason: str) -> None:
    """Warn that a measured table is not used."""
    warnings.warn(
        f"{path}: {reason}. It is ignored, and `auto` goes by the defaults of the package: "
        "delete it, or run `distill kernels --tune` again",
        stacklevel=2,
    )


def numbers_for(part: str, tensor: Tensor) -> dict[str, float]:
    """The sizes that a part of an op works with on tensors like this one. Raises ValueError where no rule holds."""
    device = str(tensor.device)
    for rules in (measured_here(part, device), shipped(part, device)):
        for rule in rules:
            if rule.holds(tensor):
                return rule.numbers
    raise ValueError(f"no row of {SHIPPED.name} has numbers for {part} on {device}")


def _for_device(rows: tuple[Row, ...], op: str, device: str) -> tuple[Rule, ...]:
    kinds, models = (torch.device(device).type, "any"), ("", _model(device))
    return tuple(row.rule for row in rows if row.op == op and row.device in kinds and row.model in models)


@once
def _read(path: Path) -> tuple[Row, ...]:
    """All rows of a table. Raises ValueError that names the line for what is no rule."""
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.reader(file, strict=True)
        if tuple(next(table, ())) != COLUMNS:
            raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
        for fields in table:
            try:
                rows.append(_parse(fields))
            except ValueError as error:
                raise ValueError(f"line {table.line_num} is no rule ({error})") from error
    return tuple(rows)


def _parse(fields: list[str]) -> Row:
    op, device, model, when, backends, numbers, source, _, why = fields
    if not (backends or numbers):
        raise ValueError("it has neither backends nor numbers")
    names, why = tuple(backends.split()), f"{source}: {why}"
    rule = Rule(when, parse_conditions(when), names, parse_numbers(numbers), source, why)
    return Row(op, device, model, rule, tuple(fields))


@once
def _model(device: str) -> str:
    where = torch.device(device)
    return device_name(where) if where.type != "cuda" or torch.cuda.is_available() else ""


def table_path(device: torch.device) -> Path:
    """The file of what `tune` measured, with the columns of `defaults.csv`.

    One for each device's name and versions of the packages that kernels come from. It lies in
    `$DISTILL_KERNEL_TABLES`, or in the user's cache folder.
    """
    packages = [f"{name}{release}" for name in ("torch", "triton", "xformers") if (release := _release(name))]
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join([device.type, device_name(device), *packages]))
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill" / "kernels"
    return Path(os.environ.get("DISTILL_KERNEL_TABLES") or default) / f"{slug}.csv"


def _release(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
