"""Static compatibility: what components need of one another, against what a recipe has."""

from __future__ import annotations

from collections.abc import Iterator

from distill_core.errors import did_you_mean
from distill_core.plan import Needs, Plan


def unmet(name: str, needs: Needs, plan: Plan, modalities: set[str]) -> Iterator[str]:
    """A line for each need of component `name` that the recipe does not meet.

    `plan` lacks a modality whose own entries are wrong; `modalities` has all that the recipe names.
    """
    who = repr(name)
    if needs.teacher and not plan.teacher:
        yield f"{who} needs a teacher; this recipe has none"
    if needs.fused and not plan.fusion:
        yield f"{who} needs fused views; this recipe has no fusion"
    names = needs.named
    for missing in sorted(names - modalities):
        yield f"{who} needs a modality {missing!r}{did_you_mean(missing, sorted(modalities))}"
    for name in sorted(names & set(plan.modalities)):
        modality = plan.modalities[name]
        if (needs.tokens.get(name) or needs.teacher_tokens.get(name)) and not modality.has_tokens:
            yield f"{who} needs tokens of {name!r}; its backbone gives none"
        if max(needs.tokens.get(name, ()), default=-1) >= len(modality.roles):
            last = max(needs.tokens[name])
            yield f"{who} needs the tokens of view {last} of {name!r}; it has {len(modality.roles)} views"
        unseen = sorted(set(needs.teacher_tokens.get(name, ())) - set(modality.teacher_views))
        if unseen and plan.teacher:
            yield f"{who} needs the teacher's tokens of view {unseen[0]} of {name!r}; the teacher does not see it"
        if name in needs.masked and not modality.can_mask:
            yield f"{who} needs masked views of {name!r}; its backbone cannot hide tokens"
        if plan.teacher and name in needs.teacher and not modality.teacher_views:
            yield f"{who} needs a teacher of {name!r}; this recipe's teacher sees none of its views"
        for role, number in needs.views.get(name, {}).items():
            have = len(modality.views(role))
            if have < number:
                yield f"{who} needs {number} {role} view(s) of {name!r}; its augmentation makes {have}"
