"""Losses over the embeddings of a whole batch, gradients through a few of its samples at a time.

GradCache (Gao, Zhang, Han & Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021,
section 3): encode all samples without a graph; compute the losses once, and their gradients with respect to the
embeddings; then encode a few samples again, and take those gradients on into the towers. Gradients are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from distill_core.batch import Batch
from distill_core.errors import UserError
from distill_core.objective import Objective
from distill_core.outputs import Features, Fused, NamedFusion, Progress, Selected
from distill_core.system.sharded import gradients_stay


class GradientCache:
    """One step's. `outputs` are the whole batch's, for the losses; after their backward pass comes `backward`."""

    def __init__(
        self,
        objective: Objective,
        batch: Batch,
        progress: Progress,
        size: int,
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """`size`: samples that have a graph at a time; `context`: inside which the towers run (autocast)."""
        self.objective, self.progress, self.context = objective, progress, context
        self.parts = [batch.part(first, first + size) for first in range(0, len(batch), size)]
        self._random: list[_Random] = []
        made, masked = [], list[Batch]()
        with torch.no_grad(), context():
            for part in self.parts:
                self._random.append(_Random.now())
                prepared, teacher = objective.prepare(part)
                made.append(objective.encode(prepared, teacher, progress))
                masked.append(objective.with_masks(part, [prepared]))
        self.parts = masked
        batch = objective.with_masks(batch, masked)
        student = {name: _joined([part.student[name] for part in made]) for name in made[0].student}
        of_teachers = {
            of: {name: _joined([part.teacher[of][name] for part in made]) for name in features}
            for of, features in made[0].teacher.items()
        }
        fused = {name: _joined_fused([part.fused[name] for part in made]) for name in made[0].fused}
        named = {
            of: replace(fusion, fused={m: _joined_fused([p.fusions[of].fused[m] for p in made]) for m in fusion.fused})
            for of, fusion in made[0].fusions.items()
        }
        self._leaves = _leaves(student, fused, named)
        for leaf in self._leaves:
            leaf.requires_grad_()
        self.outputs = replace(
            made[0],
            # of the whole batch finished only where a loss reads them: the towers read those of the parts
            views=Selected(
                batch.views, lambda name, own: objective.repeated_views(name, objective.finished(name, own))
            ),
            keys=batch.keys,
            fields=batch.fields,
            student=student,
            teacher=of_teachers,
            fused=fused,
            fusions=named,
        )

    def backward(self) -> None:
        """Take the gradients of the embeddings on into towers and fusion, and clear them: those of another loss may
        follow. Over ranks they are averaged once."""
        gradients, start = [leaf.grad for leaf in self._leaves], 0
        for leaf in self._leaves:
            leaf.grad = None
        for number, (part, random) in enumerate(zip(self.parts, self._random, strict=True)):
            with gradients_stay(self.objective, number < len(self.parts) - 1):
                with random.again(), self.context():
                    made = self.objective.represent(part, self.progress, teachers=False)
                pairs = [
                    (tensor, gradient[:, start : start + len(part)])
                    for tensor, gradient in zip(_leaves(made.student, made.fused, made.fusions), gradients, strict=True)
                    if gradient is not None and tensor.requires_grad
                ]
                torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
            start += len(part)


def _leaves(
    student: Mapping[str, Features], fused: Mapping[str, Fused], named: Mapping[str, NamedFusion]
) -> list[Tensor]:
    """What has a gradient, [V, B, ...] each."""
    every = [fused, *(fusion.fused for fusion in named.values())]
    classes = [features.class_tokens for features in student.values() if features.class_tokens is not None]
    return [
        *(features.pooled for features in student.values()),
        *classes,
        *(x.pooled for of in every for x in of.values()),
    ]


def _joined(parts: list[Features]) -> Features:
    """Embeddings of all samples; no tokens."""
    classes = [part.class_tokens for part in parts if part.class_tokens is not None]
    return Features(
        torch.cat([part.pooled for part in parts], 1), class_tokens=torch.cat(classes, 1) if classes else None
    )


def _joined_fused(parts: list[Fused]) -> Fused:
    if any(part.tokens is not None for part in parts):
        raise UserError(
            "train.parallel.micro_batch: the fusion gives tokens, which are not kept for the losses; take null"
        )
    return Fused(torch.cat([part.pooled for part in parts], 1))


@dataclass(frozen=True)
class _Random:
    """The states of torch's generators, so that a second pass drops what the first one dropped."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls) -> _Random:
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None)

    @contextmanager
    def again(self) -> Iterator[None]:
        after = _Random.now()
        self._set()
        try:
            yield
        finally:
            after._set()

    def _set(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


def batch_statistics(objective: Objective) -> Iterator[str]:
    """The modules of student and fusion that compute with statistics of their batch: a few samples have others."""
    for name, module in objective.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and name.startswith(
            ("backbone.", "fusion.", "fusions.")
        ):
            yield name
