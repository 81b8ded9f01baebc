"""Paths of parts of the model: in `freeze`, `train.lr_factors`, `train.lr_decay`, a shared backbone's `own` and what
teachers copy (`of`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distill_core.contracts.shared import SharedSlot, build_all, unknown_parts
from distill_core.errors import KeyPath, UserError, did_you_mean
from distill_core.recipe.build import build_objective, without_memory
from distill_core.recipe.draft import Draft, Problem
from distill_core.recipe.plans import teacher_place
from distill_core.recipe.sections import Recipe


def unknown_paths(draft: Draft) -> Iterator[Problem]:
    """Paths that name no part of the model, as far as the document tells its parts."""
    backbones = [f"backbone.{name}" for name in draft.names("backbone")]
    shared = {
        f"backbone.{path[1]}": slot
        for path, slot in draft.slots.items()
        if path[:1] == ("backbone",) and isinstance(slot, SharedSlot) and not slot.own
    }
    for part in draft.train.lr_decay:
        if part in shared:
            yield ("train", "lr_decay", part), _elsewhere(part, shared[part])
        elif part not in backbones:
            yield ("train", "lr_decay", part), f"{part!r} is no backbone{did_you_mean(part, backbones)}"
    losses = [slot.id for path, slot in draft.slots.items() if path[:-1] == ("loss",)]
    parts = [*backbones, *(f"loss.{name}" for name in losses)]
    parts += [f"{kind}.{name}" for kind in ("fusions", "heads") for name in draft.names(kind)]
    single = [part for part in ("fusion", "balance") if draft.document.get((part,)) is not None]
    parts += [*single, "backbone", "fusions", "heads", "loss"]
    losses_are_wrong = draft.is_wrong("loss")
    for teacher, slot in draft.teachers.items():
        for path in (slot.cls.parts(slot.config) if slot is not None else None) or ():
            if path.startswith("loss.") and path.split(".")[1] not in losses and not losses_are_wrong:
                near = did_you_mean(path.split(".")[1], losses)
                yield (*teacher_place(teacher), "of"), f"{path!r} names no loss of this recipe{near}"
    for at, part in _listed(draft.document.get(("freeze",)), draft.train.lr_factors):
        whole = ".".join(part.split(".")[:2])
        if whole in shared:
            yield at, _elsewhere(whole, shared[whole])
            continue
        depth = 1 if part.startswith(("fusion.", "balance.")) else 2
        name = part if part in parts else ".".join(part.split(".")[:depth])
        if name not in parts and not (losses_are_wrong and part.startswith("loss.")):
            yield at, f"{part!r} names no part of the model{did_you_mean(part, parts)}"


def _elsewhere(part: str, slot: SharedSlot[Any]) -> str:
    return f"the tower of {part!r} is that of another modality: name backbone.{slot.same}"


def _listed(freeze: Any, factors: Mapping[str, float]) -> Iterator[tuple[KeyPath, str]]:
    """(place in the recipe, path of a part of the model)."""
    for i, part in enumerate(freeze if isinstance(freeze, list) else ()):
        if isinstance(part, str):
            yield ("freeze", i), part
    for part in factors:
        yield ("train", "lr_factors", part), part


def unknown_paths_of_model(recipe: Recipe) -> Iterator[Problem]:
    """Those that name nothing in the model itself, or nothing that they could be of. Raises `NeedsMemory`."""
    own = {m: slot for m, slot in recipe.backbone.items() if isinstance(slot, SharedSlot) and slot.own}
    train = recipe.train
    copied = [slot for slot in recipe.all_teachers.values() if slot.cls.parts(slot.config)]
    if not (recipe.freeze or train.lr_factors or train.lr_decay or own or copied):
        return
    with without_memory():
        towers = build_all(recipe.backbone, {slot.same for slot in own.values()})
    wrong: list[Problem] = [
        (("backbone", m, "own"), line) for m, slot in own.items() for line in unknown_parts(slot, towers[slot.same])
    ]
    if wrong:  # the model cannot be built
        yield from wrong
        return
    try:
        with without_memory():
            objective = build_objective(recipe)
    except UserError as error:  # a teacher's, whose `of` names nothing
        yield (), str(error)
        return
    for at, part in _listed(recipe.freeze, train.lr_factors):
        wrong += [(at, line) for _, line in objective.unknown_parts([part])]
    for part in train.lr_decay:
        if part not in objective.decaying():
            line = f"{part!r} has no units, as a transformer's blocks: its rate cannot decay by them"
            wrong.append((("train", "lr_decay", part), line))
    if not wrong:
        try:
            objective.trainable(recipe.freeze, {})
        except UserError as error:
            wrong.append((("freeze",), str(error).removeprefix("freeze: ")))
    yield from wrong
