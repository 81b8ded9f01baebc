"""The whole method in one module: student, teachers, fusion, heads and losses; a batch in, losses out.

outputs = objective.represent(batch, progress)     # student, teacher, fusion
losses = objective.losses(outputs)                 # terms, metrics, total
losses.total.backward()
objective.before_optimizer(progress)               # a teacher with `update: before_optimizer` moves
optimizer.step()
objective.after_step(outputs, progress)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from distill_core.batch import Batch, Views, join_views
from distill_core.contracts.balance import Balance
from distill_core.contracts.masker import Masker
from distill_core.contracts.nested import needs_of
from distill_core.contracts.teacher import Teacher
from distill_core.errors import UserError, did_you_mean
from distill_core.interfaces import Augmentation, Backbone, FusionHead, Head, Loss, losses_with_paths
from distill_core.outputs import Features, Fused, NamedFusion, Outputs, Progress, gather_rows
from distill_core.plan import DEFAULT_FUSION, DEFAULT_TEACHER, Needs, Plan, TeacherPlan, joined
from distill_core.presence import Presence
from distill_core.system.distributed import gather_array, rank


@dataclass(slots=True)
class Losses:
    """0-dim tensors: `total` is the sum of weight * term, and of the balance's penalties, if the recipe has one."""

    total: Tensor
    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]
    weights: dict[str, float | Tensor]
    """Of each term, the balance's factor included; without a gradient."""


class Objective(nn.Module):
    """Student backbones, teachers, fusion, heads and losses of one recipe. Parameter names are recipe paths:

    `backbone.NAME.*`, `fusion.*`, `fusions.NAME.*`, `heads.NAME.*`, `loss.ID.*`, `balance.*`; of a teacher's copies the
    same below `teacher.NAME`.
    """

    def __init__(
        self,
        backbone: Mapping[str, Backbone],
        plan: Plan,
        needs: Sequence[Needs] = (),
        *,
        loss: Mapping[str, Loss] = MappingProxyType({}),
        fusion: FusionHead | None = None,
        fusions: Mapping[str, FusionHead] = MappingProxyType({}),
        heads: Mapping[str, Head] = MappingProxyType({}),
        maskers: Mapping[str, Masker] = MappingProxyType({}),
        balance: Balance | None = None,
        augment: Mapping[str, Augmentation] = MappingProxyType({}),
        wire: torch.dtype | None = None,
    ) -> None:
        """`needs`: what losses and all else need of the towers; `fusions`: those besides `fusion`, by name; `maskers`:
        by modality; `augment`: of the modalities whose batches are to be finished here (`Augmentation.on_device`);
        `wire`: the dtype in which what losses read of other ranks travels, None for its own."""
        super().__init__()
        self.wire = wire
        self.augment, self.maskers = dict(augment), dict(maskers)
        self.plan = plan
        self.backbone = nn.ModuleDict(backbone)
        self.joint = {name: joined(name) for name in backbone if len(joined(name)) > 1}
        """Joint tower -> the modalities that it reads."""
        self.fusion = fusion
        self.heads = nn.ModuleDict(heads)
        self.fusions = nn.ModuleDict(fusions)
        self.loss = nn.ModuleDict(loss)
        self.balance = balance
        self.needs, needed = needs, Needs.union(needs)
        self.tokens_of = {name: tuple(sorted(needed.tokens.get(name, ()))) for name in backbone}
        self.layers_of = {
            name: _layers_needed([(n.layers.get(name, ()), n.tokens.get(name, ())) for n in needs]) for name in backbone
        }
        self.teacher_tokens_of = {
            teacher: {m: _among(own, needed.teacher.get(teacher, {}).get(m, ())) for m, own in known.views.items()}
            for teacher, known in plan.teachers.items()
        }
        """Teacher -> modality -> views whose tokens are read, numbered among the teacher's own."""
        self.fusions_read = {
            loss.config.fusion for loss in loss.values() if needs_of(type(loss), loss.config, plan).fused
        }
        self.frozen: list[nn.Module] = []
        self.teacher = nn.ModuleDict()

    def add_teacher(self, name: str, make: Callable[[str, TeacherPlan, nn.Module], Teacher]) -> None:
        """Build a teacher of the plan; one that copies another stands after it."""
        plan = self.plan.teachers[name]
        attention = Needs.union(self.needs).attention.get(name, {})
        attention_of = {modality: _among(own, attention.get(modality, ())) for modality, own in plan.views.items()}
        layers_of = {}
        for modality, own in plan.views.items():
            read = [(n.teacher_layers.get(name, {}), n.teacher.get(name, {})) for n in self.needs]
            needed = _layers_needed([(layers.get(modality, ()), views.get(modality, ())) for layers, views in read])
            layers_of[modality] = {layer: _among(own, views) for layer, views in needed.items()}
        self.teacher[name] = make(name, replace(plan, layers_of=layers_of, attention_of=attention_of), self)

    def represent(self, batch: Batch, progress: Progress, *, teachers: bool = True) -> Outputs:
        """Encode the batch with student and, unless told otherwise, teachers, and fuse the student's features.

        Without teachers the masks are those that the batch has.
        """
        prepared, teacher = self.prepare(batch) if teachers else (self.on_device(batch), {})
        return self.encode(prepared, teacher, progress)

    def prepare(self, batch: Batch) -> tuple[Batch, dict[str, dict[str, Features]]]:
        """The batch as the towers take it, with the masks that maskers choose; and the teachers' features."""
        batch = self.on_device(batch)
        teacher = self.represent_teachers(batch)
        return self.mask(batch, teacher), teacher

    def encode(self, batch: Batch, teacher: dict[str, dict[str, Features]], progress: Progress) -> Outputs:
        """Encode a prepared batch with the student, and fuse its features."""
        for module in dict.fromkeys(self.backbone.values()):
            cast(Backbone, module).before_step(progress)
        batch = self.repeated(batch)
        student = {name: self.represent_student(batch, name) for name in self.backbone}
        return self.fuse(batch, student, teacher, progress)

    @torch.no_grad()
    def on_device(self, batch: Batch) -> Batch:
        """The batch as the towers take it: what augmentations and backbones do on the device that trains."""
        return self._with_joint_views(
            replace(batch, views={name: self.finished(name, x) for name, x in batch.views.items()})
        )

    @torch.no_grad()
    def finished(self, modality: str, views: Views) -> Views:
        """`on_device`, of one modality."""
        if modality in self.augment:
            views = self.augment[modality].on_device(views)
        return cast(Backbone, self.backbone[modality]).on_device(views) if modality in self.backbone else views

    def _with_joint_views(self, batch: Batch) -> Batch:
        """The batch with the views of joint towers: of those samples that have all of their modalities."""
        views, presence = dict(batch.views), dict(batch.presence)
        for name, parts in self.joint.items():
            masks = {part: batch.presence[part] for part in parts if part in batch.presence}
            here = Presence({part: mask[None] for part, mask in masks.items()})
            all_of_them = here.of(parts)
            own = {
                part: views[part] if all_of_them is None else views[part].rows(all_of_them, here.of([part]))
                for part in parts
            }
            views[name] = join_views(own, tuple(dict.fromkeys(self.plan.modalities[name].roles)))
            if masks:
                presence[name] = np.logical_and.reduce([*masks.values()])
        return replace(batch, views=views, presence=presence)

    @torch.no_grad()
    def represent_teachers(self, batch: Batch) -> dict[str, dict[str, Features]]:
        """Each teacher's features of the views that it encodes, numbered among themselves; {} without a teacher."""
        return {name: teacher.encode(batch, self.teacher_tokens_of[name]) for name, teacher in self.teachers.items()}

    @torch.no_grad()
    def mask(self, batch: Batch, teacher: Mapping[str, Mapping[str, Features]]) -> Batch:
        """The batch with the masks that maskers choose when they have seen the teachers' features."""
        views = dict(batch.views)
        for name, masker in self.maskers.items():
            own = {id: features[name] for id, features in teacher.items() if name in features}
            views[name] = masker.chosen(views[name], own)
        return replace(batch, views=views)

    def with_masks(self, batch: Batch, parts: Sequence[Batch]) -> Batch:
        """The batch with the masks of its parts."""
        views = dict(batch.views)
        for name, masker in self.maskers.items():
            views[name] = masker.with_masks(views[name], [part.views[name] for part in parts])
        return replace(batch, views=views)

    def repeated(self, batch: Batch) -> Batch:
        """The batch as the student sees it: each view once with each of its masks."""
        return replace(batch, views={name: self.repeated_views(name, views) for name, views in batch.views.items()})

    def repeated_views(self, modality: str, views: Views) -> Views:
        """`repeated`, of one modality."""
        return self.maskers[modality].repeated(views) if modality in self.maskers else views

    def represent_student(self, batch: Batch, modality: str) -> Features:
        """The student's features of one modality."""
        features: Features = self.backbone[modality](
            batch.views[modality],
            tokens_of=self.tokens_of[modality],
            masked=True,
            layers_of=self.layers_of[modality],
        )
        return features

    def fuse(
        self, batch: Batch, student: dict[str, Features], teacher: dict[str, dict[str, Features]], progress: Progress
    ) -> Outputs:
        """Fuse the student's features, where a loss reads them: those of the samples that have all that is fused."""
        presence = presence_of(batch)
        if presence is not None:
            for side in (student, *teacher.values()):
                for name, features in side.items():
                    features.present = presence.of([name])
        outputs = Outputs(
            batch.views, student, teacher, {}, self.fusion, progress, self.ema, batch.keys, batch.fields, presence,
            heads=dict(self.heads.items()),
        )  # fmt: skip
        if self.fusion is not None and DEFAULT_FUSION in self.fusions_read:
            outputs.fused = self._fused(self.fusion, outputs)
        outputs.fusions = {
            name: NamedFusion(head, self._fused(head, outputs) if name in self.fusions_read else {})
            for name, head in self.named_fusions.items()
        }
        return outputs

    def _fused(self, fusion: FusionHead, outputs: Outputs) -> dict[str, Fused]:
        whole = self._read_by(fusion, outputs)
        made: dict[str, Fused] = fusion(dict(whole.student))
        for fused in made.values():
            fused.present = whole.present
        return made

    def losses(self, outputs: Outputs) -> Losses:
        """All terms, named `ID` (or `ID/term` where a loss has several), and their weighted sum."""
        losses = self.named_losses
        parts = {id: self._read_by(loss, outputs) for id, loss in losses.items()}
        gather_rows((rows for id, loss in losses.items() for rows in loss.gathers(parts[id])), self.wire)
        terms: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        weights: dict[str, float | Tensor] = {}
        total: Tensor | None = None
        for id, loss in losses.items():
            own, more = loss(parts[id])
            weight = loss.config.weight.value(outputs.progress)
            for name, term in own.items():
                if parts[id].present is not None:
                    term = term * parts[id].weight
                full_name = id if len(own) == 1 else f"{id}/{name}"
                terms[full_name], weights[full_name] = term, weight
                weighted = weight * term
                total = weighted if total is None else total + weighted
            metrics |= {f"{id}/{name}": value for name, value in more.items()}
        if total is None:
            raise UserError("the recipe's losses gave no term")
        if self.balance is not None:
            total, factors = self._balanced(self.balance, terms, outputs)
            weights = {name: weights[name] * factors[_loss_of(name)] for name in terms}
            metrics |= {f"balance/{id}": factor for id, factor in factors.items()}
        if outputs.presence is not None:
            own = outputs.presence.shares()
            metrics |= {f"present/{name}": torch.tensor(share) for name, share in own.items()}
        return Losses(total, terms, metrics, weights)

    def _balanced(
        self, balance: Balance, terms: Mapping[str, Tensor], outputs: Outputs
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total, and each loss's factor, detached."""
        losses, sums = self.named_losses, _by_loss(terms)
        factors, penalties = balance(sums, outputs)
        parts = []
        for id, value in sums.items():
            weight = losses[id].config.weight.value(outputs.progress)
            part = factors[id] * value
            parts.append(weight * (part + penalties[id] if id in penalties else part))
        return torch.stack(parts).sum(), {id: factors[id].detach() for id in sums}

    def _read_by(self, component: Loss | FusionHead, outputs: Outputs) -> Outputs:
        """The outputs of the samples that have all that it needs, with the fusion that it reads."""
        if isinstance(component, Loss):
            outputs = outputs.reading(component.config.fusion)
        if outputs.presence is None:
            return outputs
        needs = needs_of(type(component), component.config, self.plan)
        if needs.fused and isinstance(fusion := outputs.fusion, FusionHead):
            of_fusion = needs_of(type(fusion), fusion.config, self.plan)
            return outputs.having(self._names(needs) | self._names(of_fusion), fused=True)
        return outputs.having(self._names(needs))

    def _names(self, needs: Needs) -> frozenset[str]:
        """The modalities and fields that a sample must have; what names no modality reads all of them."""
        return (needs.named or frozenset(self.plan.modalities)) | frozenset(needs.fields)

    def before_optimizer(self, progress: Progress, finite: Tensor | None = None) -> None:
        """Called between the backward pass and the optimiser; `finite` as in `after_step`."""
        for teacher in self.teachers.values():
            teacher.before_optimizer(progress, finite)

    def after_step(
        self, outputs: Outputs, progress: Progress, finite: Tensor | None = None, losses: Losses | None = None
    ) -> None:
        """Called after the optimiser: the losses' own state, that of the balance by the `losses` of the step, then
        teachers that follow the new student.

        Where `finite`, a 0-dim bool on the device, is False, nothing changes; the host does not read it.
        """
        for loss in self.named_losses.values():
            if type(loss).after_step is not Loss.after_step or loss.nested():
                with _undone_unless(finite, loss):
                    loss.after_step(self._read_by(loss, outputs), progress)
        if self.balance is not None and losses is not None:
            with _undone_unless(finite, self.balance):
                sums = _by_loss({name: term.detach() for name, term in losses.terms.items()})
                self.balance.after_step(sums, progress)
        for teacher in self.teachers.values():
            teacher.after_step(progress, finite)

    @property
    def named_losses(self) -> dict[str, Loss]:
        """By id, without those inside others."""
        return {id: cast(Loss, loss) for id, loss in self.loss.items()}

    @property
    def named_fusions(self) -> dict[str, FusionHead]:
        """The recipe's `fusions`, by name."""
        return {name: cast(FusionHead, head) for name, head in self.fusions.items()}

    @property
    def teachers(self) -> dict[str, Teacher]:
        """By name, in the recipe's order."""
        return {name: cast(Teacher, module) for name, module in self.teacher.items()}

    def ema(self, module: nn.Module, teacher: str = DEFAULT_TEACHER) -> nn.Module:
        """A teacher's copy of one of a loss's `teacher_modules`, of a head, or of the fusion. Raises KeyError where
        there is none."""
        path = self._paths_of_copied().get(id(module))
        copied = self.teachers[teacher].copy_of(path) if teacher in self.teacher and path is not None else None
        if copied is not None:
            return copied
        raise KeyError(f"the recipe has no teacher {teacher!r} with a copy of this module")

    def _paths_of_copied(self) -> dict[int, str]:
        """Identity -> path of the fusion, of the heads and of the losses' `teacher_modules`."""
        paths = {id(head): f"heads.{name}" for name, head in self.heads.items()}
        paths |= {
            id(getattr(loss, head)): f"{path}.{head}"
            for path, loss in self.losses_with_paths()
            for head in loss.teacher_modules
        }
        named = {id(head): f"fusions.{name}" for name, head in self.fusions.items()}
        return {**paths, **named, **({} if self.fusion is None else {id(self.fusion): "fusion"})}

    def losses_with_paths(self) -> Iterator[tuple[str, Loss]]:
        """(path, loss) of every loss, each before those inside it."""
        return losses_with_paths(self.named_losses)

    def train(self, mode: bool = True) -> Objective:
        """As torch's, but frozen parts stay in evaluation mode: no dropout, no moving statistics."""
        super().train(mode)
        for module in self.frozen:
            module.train(False)
        return self

    def _own_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """All but the teachers'."""
        return [(name, p) for name, p in self.named_parameters() if not name.startswith("teacher.")]

    def unknown_parts(self, paths: Iterable[str]) -> Iterator[tuple[str, str]]:
        """(path, message) of those that name no part of the model with parameters that could be trained."""
        names = [name.split(".") for name, _ in self._own_parameters()]
        prefixes = sorted({".".join(parts[:i]) for parts in names for i in range(1, len(parts) + 1)})
        for path in paths:
            if path not in prefixes:
                near = [p for p in prefixes if p.count(".") == path.count(".")]
                yield path, f"{path!r} names no part of the model{did_you_mean(path, near)}"

    def freeze(self, paths: Sequence[str]) -> None:
        """Leave the parts under these paths as they are. Raises `UserError` for a path that names nothing."""
        for _, message in self.unknown_parts(paths):
            raise UserError(f"freeze: {message}")
        modules = dict(self.named_modules())
        self.frozen = [modules[path] for path in paths if path in modules]
        self.train(self.training)
        for name, parameter in self._own_parameters():
            if any(_under(name, path) for path in paths):
                parameter.requires_grad_(False)

    def trainable(
        self, freeze: Sequence[str], factors: Mapping[str, float], decays: Mapping[str, float] | None = None
    ) -> list[tuple[str, nn.Parameter, float]]:
        """Freezes, and returns (name, parameter, learning-rate factor) of what is trained; `freeze` and `factors` go by
        path prefix.

        `decays`: backbone -> a factor for each unit that comes after a parameter. Raises `UserError` for a path that
        names nothing, and for a backbone without units.
        """
        self.freeze(freeze)
        for _, message in self.unknown_parts(factors):
            raise UserError(f"train.lr_factors: {message}")
        layers = dict(entry for path, decay in (decays or {}).items() for entry in self._layers(path, decay))
        trained = []
        for name, parameter in self._own_parameters():
            if parameter.requires_grad:
                best = max((path for path in factors if _under(name, path)), key=len, default=None)
                factor = factors[best] if best is not None else 1.0
                trained.append((name, parameter, factor * layers.get(name, 1.0)))
        if not trained:
            raise UserError("freeze: everything is frozen; leave something to train")
        return trained

    def _layers(self, path: str, decay: float) -> Iterator[tuple[str, float]]:
        """(name, factor) of a backbone's parameters. Raises `UserError` where it has no units."""
        backbone = self.backbone[path.removeprefix("backbone.")] if path in self.decaying() else None
        if not isinstance(backbone, Backbone):
            known = did_you_mean(path, self.decaying())
            raise UserError(f"train.lr_decay: {path!r} is no backbone with units, as a transformer's blocks{known}")
        units = backbone.units()
        depth = {id(p): i for i, unit in enumerate(units, 1) for p in unit.parameters()}
        for name, parameter in backbone.named_parameters():
            after = name.split(".")[0] in backbone.after_units
            at = depth.get(id(parameter), len(units) + 1 if after else 0)
            yield f"{path}.{name}", decay ** (len(units) + 1 - at)

    def decaying(self) -> list[str]:
        """The paths that `train.lr_decay` may name: backbones with units."""
        return [f"backbone.{name}" for name, module in self.backbone.items() if cast(Backbone, module).units()]


def _loss_of(term: str) -> str:
    """The id of the loss that a term is of."""
    return term.partition("/")[0]


def _by_loss(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each loss's sum of its terms."""
    by_loss: dict[str, list[Tensor]] = {}
    for name, term in terms.items():
        by_loss.setdefault(_loss_of(name), []).append(term)
    return {id: own[0] if len(own) == 1 else torch.stack(own).sum() for id, own in by_loss.items()}


@contextmanager
def _undone_unless(finite: Tensor | None, part: Loss | Balance) -> Iterator[None]:
    """Where `finite` is False, what the block changes of the part's buffers and scalars is changed back.

    Raises `UserError` where it changes a larger parameter, of which no copy is made.
    """
    if finite is None:
        yield
        return
    scalars = {name for name, p in part.named_parameters() if p.numel() == 1}
    moving = scalars | {name for name, _ in part.named_buffers()}
    before = {name: tensor.detach().clone() for name, tensor in _tensors(part).items() if name in moving}
    others = [(name, p, p._version) for name, p in part.named_parameters() if p.numel() > 1]
    yield
    for name, parameter, version in others:
        if parameter._version != version:
            raise UserError(
                f"{part.kind} {part.name!r}: after_step changes the parameter {name!r}, which has more than one "
                "element; hold what it moves in a buffer"
            )
    after = _tensors(part)  # looked up again: a buffer may be another tensor now
    with torch.no_grad():
        for name, old in before.items():
            after[name].copy_(torch.where(finite, after[name], old))


def _tensors(part: nn.Module) -> dict[str, Tensor]:
    return {**dict(part.named_parameters()), **dict(part.named_buffers())}


def _under(name: str, path: str) -> bool:
    return name == path or name.startswith(path + ".")


def presence_of(batch: Batch) -> Presence | None:
    """Which samples of the step have what, of all ranks, which must all ask; None where no modality is optional."""
    if not batch.presence:
        return None
    every = gather_array(np.stack(list(batch.presence.values())))  # [R, names, B]
    return Presence({name: every[:, i] for i, name in enumerate(batch.presence)}, rank())


def _among(own: Sequence[int], views: Iterable[int]) -> tuple[int, ...]:
    """These views, numbered among a teacher's own."""
    return tuple(own.index(view) for view in sorted(views))


def _layers_needed(read: Iterable[tuple[Sequence[int], Sequence[int]]]) -> dict[int, tuple[int, ...]]:
    """Layer -> views, of the layers and the views that each component reads."""
    needed: dict[int, set[int]] = {}
    for layers, views in read:
        for layer in layers:
            needed.setdefault(layer, set()).update(views)
    return {layer: tuple(sorted(views)) for layer, views in sorted(needed.items())}
