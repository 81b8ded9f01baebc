"""The student's views whose patches are compared with a teacher's of the same crops (iBOT, Gram anchoring).

`config` has the options `modality`, `teacher`, `role` (of the student's views) and `target_role` (of the teacher's).
"""

from __future__ import annotations

from typing import Any

from distill_core import Needs, Plan


def view_pairs(config: Any, plan: Plan) -> tuple[tuple[int, int], ...]:
    """(the student's view, the teacher's), by the plan's numbers."""
    m = plan.modalities[config.modality]
    return tuple(zip(m.views(config.role), m.views(config.target_role or config.role), strict=False))


def pair_needs(config: Any, plan: Plan) -> Needs:
    """The patches of both, all of the student's, and as many of the teacher's views as of the student's."""
    m, pairs = config.modality, view_pairs(config, plan)
    students = {m: tuple(s for s, _ in pairs)}
    count = max(1, len(plan.modalities[m].views(config.role)))
    return Needs(
        tokens=students,
        whole=students,
        teacher={config.teacher: {m: tuple(t for _, t in pairs)}},
        views={m: {config.role: 1, config.target_role or config.role: count}},
        embeddings=(),
    )
