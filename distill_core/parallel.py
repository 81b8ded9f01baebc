"""How the units of a model are laid out on the hardware (`train.parallel`)."""

from __future__ import annotations

from typing import cast

from distill_core.interfaces import Backbone
from distill_core.objective import Objective


def compile_units(objective: Objective, backend: str = "inductor") -> int:
    """Have torch compile each unit of student and teacher when it is first called; returns their number.

    In place, so that names of parameters stay. A unit that is not one graph raises torch's error, which names the line.
    """
    towers = [*objective.backbone.values(), *(objective.teacher.backbone.values() if objective.teacher else ())]
    units = [unit for tower in towers for unit in cast(Backbone, tower).units()]
    for unit in units:
        unit.compile(backend=backend, fullgraph=True)
    return len(units)
