"""Weights named as the public COSMOS checkpoints name them (open_clip's CLIP layout plus token maps and poolers)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill_core import DEFAULT_TEACHER, ComponentConfig, LoadReport, Objective, UserError, WeightLoader, read_tensors
from distill_cosmos.losses import CrossModalDistillation
from distill_vl.contrastive import Contrastive

StateDict = Mapping[str, Tensor]
TEACHER = f"teacher.{DEFAULT_TEACHER}."

_FUSION = {
    "visual.attn_cross_pool.": "fusion.pooler.image.",
    "text_attn_cross_pool.": "fusion.pooler.text.",
    "image_token_mapping.": "fusion.token_map.image.",
    "text_token_mapping.": "fusion.token_map.text.",
}
_TOWERS = {
    "visual.": "backbone.image.",
    "transformer.": "backbone.text.transformer.",
    "token_embedding.": "backbone.text.token_embedding.",
    "ln_final.": "backbone.text.ln_final.",
    "positional_embedding": "backbone.text.positional_embedding",
    "text_projection": "backbone.text.text_projection",
}


@dataclass(frozen=True)
class Counts:
    """How many tensors were loaded, and the teacher's keys that nothing uses (their shapes were checked)."""

    student: int
    teacher: int
    unused: tuple[str, ...]


def own_name(key: str, objective: Objective) -> str | None:
    """A public key -> the objective's parameter name (of the student), or None for a key that is not known."""
    scales = {"logit_scale": Contrastive, "distill_logit_scale": CrossModalDistillation}
    if key in scales:
        ids = [id for id, loss in objective.loss.items() if isinstance(loss, scales[key])]
        return f"loss.{ids[0]}.logit_scale" if ids else None
    for names in (_FUSION, _TOWERS):
        for prefix, ours in names.items():
            if key.startswith(prefix):
                return ours + key[len(prefix) :]
    return None


@torch.no_grad()
def load_state_dict(objective: Objective, states: Mapping[str, StateDict]) -> Counts:
    """Load `{"student": ..., "teacher": ...}` strictly; nothing is changed when anything is wrong.

    Raises `UserError` with every key that is missing, unknown or of a wrong shape. The teacher's scales, poolers and
    token maps are not used by anything: their names and shapes are checked against the student's, and reported.
    """
    own = {name: p for name, p in objective.named_parameters() if not name.startswith("teacher.")}
    teacher = {name: p for name, p in objective.named_parameters() if name.startswith(TEACHER)}
    problems: list[str] = []
    copies: list[tuple[Tensor, Tensor]] = []
    unused: list[str] = []
    counts = {"student": 0, "teacher": 0}
    for who in ("student", "teacher"):
        if who not in states:
            problems.append(f"no {who!r} weights")
            continue
        used = set()
        for raw, value in states[who].items():
            key = raw.removeprefix("module.")
            name = own_name(key, objective)
            if name is None or name not in own:
                problems.append(f"{who}: {raw}: not a key of this model")
                continue
            used.add(name)
            target = own[name] if who == "student" else teacher.get(TEACHER + name)
            expected = own[name]
            if value.shape != expected.shape:
                problems.append(f"{who}: {raw}: shape {list(value.shape)}, this model has {list(expected.shape)}")
            elif target is None:
                unused.append(raw)
            else:
                copies.append((target, value))
                counts[who] += 1
        parameters = own if who == "student" else {name.removeprefix(TEACHER): p for name, p in teacher.items()}
        public = {name: key for key, name in public_names(objective).items()}
        problems += [f"{who}: {public.get(name, name)}: missing" for name in parameters if name not in used]
    if problems:
        listed = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise UserError("the checkpoint does not fit this model:\n  " + "\n  ".join(listed))
    for destination, value in copies:
        destination.copy_(value)
    return Counts(counts["student"], counts["teacher"], tuple(unused))


def public_state_dict(objective: Objective) -> dict[str, dict[str, Tensor]]:
    """The objective's weights under their public names; the teacher has those of its backbones only."""
    own = {name: p.detach() for name, p in objective.named_parameters()}
    names = public_names(objective)
    student = {key: own[name] for key, name in names.items()}
    teacher = {key: own[TEACHER + name] for key, name in names.items() if TEACHER + name in own}
    return {"student": student, "teacher": teacher}


def public_names(objective: Objective) -> dict[str, str]:
    """public key -> the student's parameter name."""
    own = [name for name, _ in objective.named_parameters()]
    result = {}
    for key in ("logit_scale", "distill_logit_scale"):
        name = own_name(key, objective)
        if name is not None:
            result[key] = name
    for name in own:
        for prefixes in (_FUSION, _TOWERS):
            for theirs, ours in prefixes.items():
                if name.startswith(ours):
                    result[theirs + name[len(ours) :]] = name
    return result


class PublicCheckpointConfig(ComponentConfig):
    """A file of the public COSMOS release."""

    file: str
    """A torch file that holds `student` and `teacher` state dicts."""


class PublicCheckpoint(WeightLoader):
    """Start student and teacher from a public COSMOS checkpoint."""

    name = "cosmos_checkpoint"
    Config = PublicCheckpointConfig
    examples = ({"file": "no-such-file.pt"},)

    def apply(self, objective: Objective) -> LoadReport:
        """Raises `UserError` for a file that is missing, unsafe or does not fit."""
        states = read_tensors(Path(self.config.file))
        if not isinstance(states, dict):
            raise UserError(f"{self.config.file}: holds no `student` and `teacher` state dicts")
        counts = load_state_dict(objective, states)
        line = (
            f"{self.config.file}: {counts.student} student and {counts.teacher} teacher tensors; "
            f"{len(counts.unused)} teacher tensors that nothing uses"
        )
        return LoadReport(line, frozenset(name for name, _ in objective.named_parameters()))
