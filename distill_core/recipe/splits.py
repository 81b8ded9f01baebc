"""The splits of a recipe's data: it can be trained on; what is scored and learned from is there, and is not both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distill_core.contracts.slot import Slot
from distill_core.errors import KeyPath
from distill_core.recipe.sections import EvaluateConfig


def split_problems(slots: Mapping[KeyPath, Slot[Any]], evaluate: EvaluateConfig) -> Iterator[tuple[KeyPath, str]]:
    """(place in the recipe, message), where the sources can tell; `slots` are the recipe's components by place."""

    def lacks(source: KeyPath, split: str) -> str | None:
        slot = slots.get(source)
        have = slot.cls.splits(slot.config) if slot is not None else None
        if have is None or split in have:
            return None
        where = ".".join(str(part) for part in source)
        return f"{where} has no split {split!r} (it has {', '.join(have)}); name one that it has"

    training: KeyPath = ("data", "source")
    if (slot := slots.get(training)) is not None:
        if not slot.cls.trainable:
            yield (
                training,
                f"{slot.cls.name!r} has no shards, so nothing can be trained on it; it is for evaluations: name it as "
                "`evaluate.source`, or as a task's `source`",
            )
        elif message := lacks(training, "train"):
            yield training, f"{message.partition(';')[0]}; give it one to train on"
    shared: KeyPath = ("evaluate", "source") if ("evaluate", "source") in slots else ("data", "source")
    tasks = [path for path in slots if path[:-1] == ("evaluate", "tasks")]
    scored = [("split", evaluate.split)]
    if evaluate.every is not None:
        scored.append(("validation", evaluate.validation))
    for path in tasks:
        if message := lacks((*path, "source"), evaluate.split):
            yield ("evaluate", "split"), message
        slot = slots[path]
        for split in slot.cls.reads(slot.config):
            if message := lacks((*path, "source") if slot.config.source is not None else shared, split):
                yield path, f"{slot.cls.name!r} learns from the split {split!r}: {message}"
            for option in (option for option, other in scored if other == split):
                yield (
                    ("evaluate", option),
                    f"{slot.id!r} learns from the split {split!r} that it would be scored on: it would find every "
                    "sample again; score another split, or cut this one into folds with the task's `learn: null`",
                )
    if all(slots[path].config.source is not None for path in tasks):
        return
    for option, split in scored:
        if message := lacks(shared, split):
            yield ("evaluate", option), f"{message}, give it one, or leave out evaluate.tasks"
