"""What depends on the device, as data: the rows of `defaults.csv`, and before them those that `tune` measured here.

A row is a rule: for calls of `op` on `device` (a kind, or "any") that meet every condition of `when`, try `backends` in
this order. Or it gives `numbers`: of an op, the coefficients of its own cost model, by which it then orders its
backends; of a part of one (`numbers_for`), sizes that it works with. The first row that holds decides. `model` limits a
row to devices of that name. `source` says whether it was measured (`evidence`: on what), estimated (from bytes,
products and launches), or is a matter of correctness.

A condition is `name=value`, `name=low..high`, `name=low..` or `name=..high`, bounds included; a name is an attribute of
the op's inputs, or of the tensor that a part works on.
"""

from __future__ import annotations

import csv
import os
import re
import sys
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

    conditions: tuple[Condition, ...]
    backends: tuple[str, ...]  # best first; empty where there are `numbers`
    numbers: dict[str, float]
    why: str

    def holds(self, inputs: Any) -> bool:
        """Whether `inputs` meet every condition."""
        for name, low, high in self.conditions:  # noqa: SIM110  (torch.compile traces no generator here)
            if not low <= getattr(inputs, name) <= high:
                return False
        return True


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
    return _rules(SHIPPED, op, device)


@once
def measured_here(op: str, device: str) -> tuple[Rule, ...]:
    """Those that `tune` wrote for this device; none where it never ran."""
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        return ()  # tensors that only say so: no card was measured
    path = table_path(where)
    return _rules(path, op, device) if path.exists() else ()


def numbers_for(part: str, tensor: Tensor) -> dict[str, float]:
    """The sizes that a part of an op works with on tensors like this one. Raises ValueError where no rule holds."""
    device = str(tensor.device)
    for rules in (measured_here(part, device), shipped(part, device)):
        for rule in rules:
            if rule.holds(tensor):
                return rule.numbers
    raise ValueError(f"no row of {SHIPPED.name} has numbers for {part} on {device}")


def _rules(path: Path, op: str, device: str) -> tuple[Rule, ...]:
    kind = torch.device(device).type
    rules = []
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        if tuple(table.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has other columns than {', '.join(COLUMNS)}: run `distill kernels --tune` again")
        for row in table:
            if row["op"] == op and row["device"] in (kind, "any") and row["model"] in ("", _model(device)):
                rules.append(
                    Rule(
                        parse_conditions(row["when"]),
                        tuple(row["backends"].split()),
                        parse_numbers(row["numbers"]),
                        f"{row['source']}: {row['why']}",
                    )
                )
    return tuple(rules)


@once
def _model(device: str) -> str:
    where = torch.device(device)
    return device_name(where) if where.type != "cuda" or torch.cuda.is_available() else ""


def table_path(device: torch.device) -> Path:
    """The file of what `tune` measured, one per device name and torch version, with the columns of `defaults.csv`.

    It lies in `$DISTILL_KERNEL_TABLES`, or in the user's cache folder.
    """
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", f"{device.type}-{device_name(device)}-torch{torch.__version__}")
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill" / "kernels"
    return Path(os.environ.get("DISTILL_KERNEL_TABLES") or default) / f"{slug}.csv"
