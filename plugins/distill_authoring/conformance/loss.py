"""Checks of losses: terms, gradients, padding, state, and equality over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from distill_authoring.conformance.inputs import (
    BATCH,
    PROGRESS,
    Fit,
    example_outputs,
    fits,
    leaves,
    losses_in,
    of_some,
    on,
    part,
    richest,
)
from distill_authoring.conformance.modules import (
    close,
    finite,
    generic,
    require_gradients,
    require_lets_draw,
    require_state_dict,
    require_units,
    tensors,
    unmoved,
    untouched,
)
from distill_authoring.conformance.ranks import on_two_ranks
from distill_authoring.conformance.suite import Case, NotApplicable, checks, require
from distill_core import ConformanceCase, Features, Fused, Outputs, Rows, Scheduled, counted
from distill_core.tools import places_in

KIND = "loss"


def ready(case: Case, **options: Any) -> tuple[Fit, Any, Outputs]:
    """The richest plan, a loss on it whose weights have left their initial values, and the outputs of a step."""
    fit = richest(case)
    module = generic(case.cls(case.config, fit.plan))
    return fit, module, outputs_for(case, fit, module, **options)


def call(module: Any, outputs: Outputs, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(terms, metrics), with torch's random numbers fixed by `seed`."""
    torch.manual_seed(seed)
    result = module(outputs)
    require(
        isinstance(result, tuple) and len(result) == 2 and all(isinstance(part, dict) for part in result),
        "`forward` must return ({term: tensor}, {metric: tensor})",
    )
    return result[0], result[1]


def total(module: Any, outputs: Outputs, seed: int = 0) -> Tensor:
    """The sum of the terms."""
    return torch.stack([term.float() for term in call(module, outputs, seed)[0].values()]).sum()


def outputs_for(case: Case, fit: Fit, module: Any, **options: Any) -> Outputs:
    """The outputs of a step, as far as this loss needs them."""
    return example_outputs(fit, case.inputs, case.config, module, ids=ids(case), **options)


def ids(case: Case) -> tuple[str, ...]:
    """The modalities whose views must be integer ids: none where the loss accepts floats or does not read views.

    Nothing declares it, so each choice is tried; torch refuses a wrong dtype with any of the errors caught here. If
    every choice fails, the first error is raised: it is then the finding of each check.
    """
    if "ids" not in case.memo:
        fit = richest(case)
        names = tuple(fit.plan.modalities)
        errors: list[Exception] = []
        for choice in ((), *((name,) for name in names), names):
            module = case.cls(case.config, fit.plan)
            try:
                call(module, example_outputs(fit, case.inputs, case.config, module, ids=choice))
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                errors.append(error)
            else:
                case.memo["ids"] = choice
                break
        else:
            raise errors[0]
    return cast(tuple[str, ...], case.memo["ids"])


@checks(KIND)
def terms(case: Case) -> None:
    """Terms and metrics are finite 0-dim tensors, metrics detached; on several plans, also for a single sample."""
    for fit in fits(case):
        with on(fit):
            _terms(case, fit)


def _terms(case: Case, fit: Fit) -> None:
    module = case.cls(case.config, fit.plan)
    for batch in (BATCH, 1):
        terms, metrics = call(module, outputs_for(case, fit, module, batch=batch))
        require(terms, "`forward` returns no term")
        for what, values in (("term", terms), ("metric", metrics)):
            for name, value in values.items():
                require(isinstance(value, Tensor) and value.ndim == 0, f"the {what} {name!r} must be a 0-dim tensor")
                require(finite([value]), f"the {what} {name!r} is {float(value)} for a batch of {batch}")
        for name, value in terms.items():
            require(_wide(value), f"the term {name!r} is {value.dtype}: compute it in fp32 or wider")
        attached = [name for name, value in metrics.items() if value.requires_grad]
        require(not attached, f"the metric(s) {', '.join(attached)} keep the graph: .detach() them")


def _wide(value: Tensor) -> bool:
    return torch.promote_types(value.dtype, torch.float32) == value.dtype


@checks(KIND)
def inputs_untouched(case: Case) -> None:
    """`forward` and `after_step` do not change the outputs, which other losses read, and seed no global generator."""
    fit = replace(richest(case), padding="all")
    module: Any = generic(case.cls(case.config, fit.plan)).train()
    outputs = outputs_for(case, fit, module)
    losses = dict(losses_in(module))
    heads = {at + name: outputs.ema(getattr(losses[at], name)) for at in losses for name in losses[at].teacher_modules}
    with ExitStack() as stack:
        for name, head in heads.items():
            stack.enter_context(unmoved(head, f"the loss, in the teacher's copy of {name!r},"))
        with untouched(outputs, "outputs", "`forward`"), unmoved(module, "`forward`"):
            call(module, outputs)
        _require_memo(outputs, "`forward`")
        value = total(module, outputs)
        if value.requires_grad:
            value.backward()  # type: ignore[no-untyped-call]
        with untouched(outputs, "outputs", "`after_step`"):
            module.after_step(outputs, PROGRESS)
        _require_memo(outputs, "`after_step`")
    with torch.no_grad(), untouched(outputs, "outputs", "`forward`"):
        call(module, outputs)
    require_lets_draw(lambda: module(outputs_for(case, fit, module)))


def _require_memo(outputs: Outputs, who: str) -> None:
    """The cached `rows`, which other losses read, equal newly computed ones."""
    parts: list[tuple[str, Features | Fused]] = [
        *((f"student[{name!r}]", f) for name, f in outputs.student.items()),
        *(
            (f"teacher[{teacher!r}][{name!r}]", f)
            for teacher, side in outputs.teacher.items()
            for name, f in side.items()
        ),
        *((f"fused[{name!r}]", f) for name, f in outputs.fused.items()),
    ]
    for where, computed in parts:
        if "rows" in vars(computed):
            fresh = replace(computed)
            for what in ("embedding", "gathered"):
                require(
                    torch.equal(getattr(computed, what), getattr(fresh, what)),
                    f"{who} changes outputs.{where}.{what} in place: other losses read it too",
                )


@checks(KIND)
def padding(case: Case) -> None:
    """The values of padded tokens, the student's and the teacher's, have no effect on any term."""
    applicable = False
    for fit in (replace(richest(case), padding="all"), *fits(case)):
        with on(fit), torch.no_grad():
            module = generic(case.cls(case.config, fit.plan))
            outputs = outputs_for(case, fit, module)
            if any(f.masks for side in (outputs.student, *outputs.teacher.values()) for f in side.values()):
                applicable = True
                expected = call(module, outputs)[0]
                altered = call(module, outputs_for(case, fit, module, fill=9.0))[0]
                changed = [name for name in expected if not close([expected[name]], [altered[name]])]
                require(
                    not changed,
                    f"padded tokens change the term(s) {', '.join(changed)}: use features.masks, True where a token is "
                    "real",
                )
    if not applicable:
        raise NotApplicable("it reads no padded tokens")


@checks(KIND)
def gradients(case: Case) -> None:
    """A finite gradient reaches every parameter, and the student's features."""
    fit, module, outputs = ready(case)
    terms = call(module, outputs)[0]
    detached = [name for name, term in terms.items() if not term.requires_grad]
    require(not detached, f"the term(s) {', '.join(detached)} carry no gradient: something detaches them")
    value = torch.stack([term.float() for term in terms.values()]).sum()
    require_gradients(module, value, "the terms")
    gradients_of_student = [x.grad for x in leaves(outputs) if x.grad is not None]
    require(
        gradients_of_student and any(bool((x != 0).any()) for x in gradients_of_student),
        "no gradient reaches the student: something detaches it",
    )
    require(finite(gradients_of_student), "the student's gradient is not finite")
    with torch.no_grad():
        for name in fit.plan.modalities:
            altered = outputs_for(case, fit, module)
            for x in leaves(altered, name):
                x += 0.3 * torch.randn_like(x)
            reached = any(x.grad is not None and bool((x.grad != 0).any()) for x in leaves(outputs, name))
            require(
                reached or close([total(module, altered)], [value], 1e-5),
                f"the terms depend on the student's {name!r}, and no gradient reaches it: something detaches it "
                "(to keep a part from learning, a recipe freezes it)",
            )


@checks(KIND)
def embeddings(case: Case) -> None:
    """`Needs.embeddings` names the modalities whose embedding (`pooled`) the loss trains; others are not scored."""
    if richest(case).needs.fused:
        raise NotApplicable("it reads fused views: which embeddings it trains depends on the fusion")
    fit, module, outputs = ready(case)
    pooled = {name: features.pooled for name, features in outputs.student.items()}
    gradients = torch.autograd.grad(total(module, outputs), list(pooled.values()), allow_unused=True)
    trained = {name for name, x in zip(pooled, gradients, strict=True) if x is not None and bool((x != 0).any())}
    declared = fit.needs.named if fit.needs.embeddings is None else set(fit.needs.embeddings)
    idle, undeclared = sorted(declared - trained), sorted(trained - declared if declared or fit.needs.named else ())
    require(
        not idle,
        f"no gradient reaches the embedding of {', '.join(idle)}: leave it out of Needs.embeddings (None means all "
        "modalities that are named)",
    )
    require(not undeclared, f"it trains the embedding of {', '.join(undeclared)}: name it in Needs.embeddings")


@checks(KIND)
def purity(case: Case) -> None:
    """`forward` called twice on the same outputs returns the same, and changes no state; only `after_step` may."""
    fit = richest(case)
    module = case.cls(case.config, fit.plan)
    outputs = outputs_for(case, fit, module)
    original = {name: value.clone() for name, value in module.state_dict().items()}
    first_terms, second_terms = (call(module, outputs)[0] for _ in range(2))
    require(first_terms.keys() == second_terms.keys(), "the same outputs give different terms the second time")
    changed = [
        name for name in first_terms if not torch.allclose(first_terms[name], second_terms[name], rtol=1e-4, atol=1e-5)
    ]
    require(not changed, f"{', '.join(changed)} changes when `forward` is called again: keep no state in it")
    moved = [name for name, value in module.state_dict().items() if not torch.equal(value, original[name])]
    require(not moved, f"`forward` changes {', '.join(moved)}; change state in `after_step`")


@checks(KIND)
def after_step(case: Case) -> None:
    """`after_step` runs and leaves finite state, from which the loss continues; its state dict holds all of it."""
    fit = richest(case)

    def build() -> nn.Module:
        module: nn.Module = case.cls(case.config, fit.plan)
        return module

    module: Any = build()
    outputs = outputs_for(case, fit, module)
    value = total(module, outputs)
    if value.requires_grad:
        value.backward()  # type: ignore[no-untyped-call]
    module.after_step(outputs, PROGRESS)  # with gradients enabled, as the trainer calls it
    attached = [name for name, x in module.state_dict(keep_vars=True).items() if x.grad_fn is not None]
    require(
        not attached,
        f"`after_step` leaves {', '.join(attached)} in the step's graph: decorate it with @torch.no_grad()",
    )
    require(
        finite(x for x in module.state_dict().values() if x.is_floating_point()),
        "its state is not finite after `after_step`",
    )
    require(
        finite(call(module, outputs_for(case, fit, module, seed=20))[0].values()),
        "the terms after `after_step` are not finite",
    )

    def run(loss: nn.Module) -> list[Tensor]:
        return list(call(loss, outputs_for(case, fit, loss))[0].values())

    def build_stepped() -> nn.Module:
        loss: Any = build()
        step = outputs_for(case, fit, loss, seed=torch.initial_seed())
        call(loss, step)
        loss.after_step(step, PROGRESS)
        return loss  # type: ignore[no-any-return]

    require_state_dict(build_stepped, run, build)


@checks(KIND)
def nested(case: Case) -> None:
    """Losses in its options are modules at the options' paths; their `weight` counts, and `after_step` reaches them."""
    slots = {".".join(path): slot for path, slot in places_in(case.config) if slot.cls.kind == KIND}
    if not slots:
        raise NotApplicable("there is no loss in its options")
    _, module, outputs = ready(case)
    inside = module.nested()
    for path, slot in slots.items():
        require(
            type(inside.get(path)) is slot.cls,
            f"the loss of the option {path!r} must be the module of that path: self.{path.split('.')[0]} = ..., a "
            "nn.ModuleList of a list, a nn.ModuleDict of a mapping",
        )
    expected = total(module, outputs)
    for path, inner in inside.items():
        config = inner.config
        moved: list[bool] = []
        inner.config = config.model_copy(update={"weight": Scheduled(3.0)})
        heavier = total(module, outputs)
        inner.config = config
        require(
            not close([expected], [heavier], 1e-6),
            f"the option `weight` of the loss {path!r} changes no term: take its terms from self.{path}.weighted(...)",
        )
        inner.after_step = lambda *_, moved=moved: moved.append(True)
        module.after_step(outputs, PROGRESS)
        require(moved, f"`after_step` does not call that of the loss {path!r}: its state would never move")


def _all(module: Any, what: str) -> bool:
    """Whether this holds of a loss and of all those inside it."""
    return all(getattr(loss, what) for _, loss in losses_in(module))


@checks(KIND)
def teacher_modules(case: Case) -> None:
    """Each name in `teacher_modules` is a module of the loss, with parameters."""
    if not case.cls.teacher_modules:
        raise NotApplicable("it has no teacher_modules")
    fit = richest(case)
    module = case.cls(case.config, fit.plan)
    for name in case.cls.teacher_modules:
        head: Any = getattr(module, name, None)
        require(isinstance(head, nn.Module), f"teacher_modules names {name!r}, and the loss has no module of that name")
        require(list(head.parameters()), f"teacher_modules names {name!r}, which has no parameters to average")
    require(fit.needs.teacher, "it has teacher_modules and needs no teacher: return Needs(teacher={...})")


@checks(KIND)
def teacher_targets(case: Case) -> None:
    """Modules in `teacher_modules` are read through `outputs.ema`; no gradient goes through them to the teacher."""
    if not case.cls.teacher_modules:
        raise NotApplicable("it has no teacher_modules")
    fit, module, outputs = ready(case)
    expected = total(module, outputs)
    for name in case.cls.teacher_modules:
        altered = outputs_for(case, fit, module)
        with torch.no_grad():
            for parameter in altered.ema(getattr(module, name)).parameters():
                parameter.add_(torch.randn_like(parameter))
        require(
            not close([expected], [total(module, altered)], 1e-6),
            f"the terms do not depend on the teacher's copy of {name!r}: read it as outputs.ema(self.{name})",
        )
        _require_no_targets(module, name, outputs_for(case, fit, module))


def _require_no_targets(module: Any, name: str, outputs: Outputs) -> None:
    """No gradient flows through the module's own outputs for the teacher's features."""
    results: list[Tensor] = []

    def remember(_: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
        if any(isinstance(x, Tensor) and x.requires_grad for x in arguments) and isinstance(result, Tensor):
            results.append(result)

    for side, learns in ((outputs.student, False), *((side, True) for side in outputs.teacher.values())):
        for _, x in tensors(side, ""):
            if x.is_leaf and x.is_floating_point():
                x.requires_grad_(learns)
    for _, x in tensors(outputs.fused, ""):
        if x.is_leaf:
            x.requires_grad_(False)
    handle = getattr(module, name).register_forward_hook(remember)
    try:
        value = total(module, outputs)
    finally:
        handle.remove()
    results = [x for x in results if x.requires_grad]
    gradients = torch.autograd.grad(value, results, allow_unused=True) if results and value.requires_grad else ()
    require(
        not any(x is not None and bool((x != 0).any()) for x in gradients),
        f"a gradient goes through {name!r} to the teacher's features: compute targets with outputs.ema(self.{name})",
    )


@checks(KIND)
def ranks(case: Case) -> None:
    """On two ranks, the mean of terms and of gradients equals that of all rows in one process, and state stays equal.
    Where `across_ranks` is False, a rank's terms still do not depend on its number."""  # fmt: skip
    fit, module, outputs = ready(case, batch=2 * BATCH)
    if not close([total(module, outputs)], [total(module, outputs, seed=1)], 1e-5):
        raise NotApplicable("it draws random numbers, which differ between ranks and one process")
    step = JointStep(case.cls, case.config, case.inputs, fit, ids(case), module.state_dict())
    rows = [(0, BATCH), (BATCH, 2 * BATCH)]
    results, swapped = (on_two_ranks(rank_step, [(step, *rows[i]) for i in order]) for order in ((0, 1), (1, 0)))
    for rank in (0, 1):
        require(
            close(results[rank].terms, swapped[1 - rank].terms),
            "the same rows give different terms on another rank: rank r's rows start at r * B of the gathered rows",
        )
    require(
        close(results[0].state, results[1].state, 1e-6),
        "after `after_step` two ranks hold different states: take the mean over ranks (distributed.all_gather)",
    )
    if not _all(module, "across_ranks"):
        return
    expected = rank_step(step, 0, 2 * BATCH)
    require(
        close([(a + b) / 2 for a, b in zip(results[0].terms, results[1].terms, strict=True)], expected.terms),
        "the mean of the terms of two ranks is not the term of all their rows: compare with `gathered` (a loss "
        "over each rank's own rows sets across_ranks = False)",
    )
    message = "gradient differs between two ranks and one process: gather with gradients (distributed.all_gather)"
    mean = [(a + b) / 2 for a, b in zip(results[0].parameters, results[1].parameters, strict=True)]
    require(close(mean, expected.parameters, 1e-3), f"a parameter's {message}")
    joined = [
        torch.cat([a, b], dim) / 2 for a, b, dim in zip(results[0].rows, results[1].rows, results[0].dims, strict=True)
    ]
    require(close(joined, expected.rows, 1e-3), f"the student's {message}")


@checks(KIND)
def absence(case: Case) -> None:
    """Where `partial`, two ranks with different numbers of samples, one of them perhaps with none, equal all their
    samples in one process: values, gradients, and state."""
    if not case.cls.partial:
        raise NotApplicable("it is not partial: a recipe that lets samples lack what it needs is refused")
    fit, module, outputs = ready(case, batch=2 * BATCH)
    if not _all(module, "partial"):
        raise NotApplicable("a loss inside it is not partial: a recipe that lets samples lack what it needs is refused")
    if not close([total(module, outputs)], [total(module, outputs, seed=1)], 1e-5):
        raise NotApplicable("it draws random numbers, which differ between ranks and one process")
    step = JointStep(case.cls, case.config, case.inputs, fit, ids(case), module.state_dict())
    for fewer in (1, 0):
        counts = (BATCH, fewer)
        results = on_two_ranks(
            rank_step, [(step, 0, BATCH, counts, 0), (step, BATCH, BATCH + max(fewer, 1), counts, 1)]
        )
        what = f"two ranks with {BATCH} and {counted(fewer, 'sample')}"
        expected = rank_step(step, 0, sum(counts))
        require(
            close(results[0].state, results[1].state, 1e-6),
            f"after `after_step`, {what} hold different states: take the mean over ranks, by outputs.weight",
        )
        if not _all(module, "across_ranks"):
            continue
        require(
            close([a + b for a, b in zip(results[0].terms, results[1].terms, strict=True)], expected.terms),
            f"{what} have other terms than all samples in one process: own rows begin at Rows.offset, and what the "
            "loss makes itself is gathered by outputs.rows(x)",
        )
        summed = [a + b for a, b in zip(results[0].parameters, results[1].parameters, strict=True)]
        require(
            close(summed, expected.parameters, 1e-3), f"a parameter's gradient differs between {what} and one process"
        )
        require(
            close(results[0].state, expected.state, 1e-4),
            f"after `after_step`, {what} hold another state than one process: means over ranks heed outputs.weight",
        )


@dataclass(frozen=True)
class JointStep:
    """A loss on a batch of two ranks; sent to their processes, each of which takes its rows."""

    cls: Any
    config: Any
    inputs: ConformanceCase
    fit: Fit
    ids: tuple[str, ...]
    """As `ids` has them."""
    state: dict[str, Tensor]
    """The loss's."""

    def loss(self) -> Any:
        """Built anew."""
        module = self.cls(self.config, self.fit.plan)
        module.load_state_dict(self.state)
        return module

    def outputs(self, module: Any) -> Outputs:
        """Outputs of the joint batch of both ranks, always the same."""
        return example_outputs(self.fit, self.inputs, self.config, module, batch=2 * BATCH, ids=self.ids)


def rank_step(step: JointStep, start: int, end: int, counts: tuple[int, int] | None = None, rank: int = 0) -> RankStep:
    """Forward, backward and `after_step` on rows start..end of a batch of two ranks.

    `counts`: of the samples of both ranks, where they differ; terms are then weighed, by half of what a mean of two
    wants.
    """
    module = step.loss()
    torch.manual_seed(0)
    joint = step.outputs(module)
    outputs = _rank_part(joint, start, end)
    if counts is not None:
        outputs = of_some(outputs, counts, rank)
    terms = call(module, outputs)[0]
    if counts is not None:
        terms = {name: term * outputs.weight / 2 for name, term in terms.items()}
    value = torch.stack([term.float() for term in terms.values()]).sum()
    if value.requires_grad:
        value.backward()  # type: ignore[no-untyped-call]
    parameters = [p for p in module.parameters() if p.requires_grad]
    rows = leaves(outputs)
    sizes = [(a.shape, b.shape) for a, b in zip(leaves(joint), rows, strict=True)]
    dims = [next((i for i, (m, n) in enumerate(zip(a, b, strict=True)) if m != n), 0) for a, b in sizes]
    module.after_step(outputs, PROGRESS)
    return RankStep(
        [term.detach() for term in terms.values()],
        [torch.zeros_like(x) if x.grad is None else x.grad for x in parameters],
        [torch.zeros_like(x) if x.grad is None else x.grad for x in rows],
        dims,
        [x.detach().float() for x in module.state_dict().values()],
    )


def _rank_part(joint: Outputs, start: int, end: int) -> Outputs:
    has_fusion = bool(joint.fused) and not all(x.pooled.is_leaf for x in joint.fused.values())
    return part(joint, start, end, joint.fusion if has_fusion else None)


@dataclass
class RankStep:
    """One rank's terms, gradients of parameters and of the student's rows (along `dims`), and state after the step."""

    terms: list[Tensor]
    parameters: list[Tensor]
    rows: list[Tensor]
    dims: list[int]
    state: list[Tensor]


@checks(KIND)
def gathers(case: Case) -> None:
    """On two ranks, `gathers` names the rows whose `gathered` is read, and those alone."""
    applicable = False
    for fit in fits(case):
        with on(fit):
            state = generic(case.cls(case.config, fit.plan)).state_dict()
            step = JointStep(case.cls, case.config, case.inputs, fit, ids(case), state)
            for named, read in on_two_ranks(gathered_step, [(step, 0, BATCH), (step, BATCH, 2 * BATCH)]):
                applicable = applicable or bool(named or read)
                require(
                    read <= named,
                    f"it reads `gathered` of {_listed(read - named)}, which `gathers` does not name: each such read is "
                    "a collective of its own, which the other ranks wait for",
                )
                require(
                    named <= read,
                    f"`gathers` names {_listed(named - read)}, whose `gathered` is not read: they travel for nothing",
                )
    if not applicable:
        raise NotApplicable("it reads no other rank's rows by `gathered`")


def gathered_step(step: JointStep, start: int, end: int) -> tuple[set[tuple[str, int]], set[tuple[str, int]]]:
    """(rows of the outputs, view) that `gathers` names, and that `forward` and `after_step` read."""
    module = step.loss()
    outputs = _rank_part(step.outputs(module), start, end)
    names = {
        id(features.rows): where
        for where, features in [
            *((f"student[{m!r}]", f) for m, f in outputs.student.items()),
            *((f"teacher[{t!r}][{m!r}]", f) for t, side in outputs.teacher.items() for m, f in side.items()),
            *((f"fused[{m!r}]", f) for m, f in outputs.fused.items()),
        ]
    }

    def views(rows: Rows) -> set[tuple[str, int]]:
        return {(names[id(whole)], view) for whole, view in rows.origins if id(whole) in names}

    named = {view for rows in module.gathers(outputs) for view in views(rows)}
    read: set[tuple[str, int]] = set()
    with _watched(lambda rows: read.update(views(rows))):
        value = total(module, outputs)
        if value.requires_grad:
            value.backward()  # type: ignore[no-untyped-call]
        module.after_step(outputs, PROGRESS)
    return named, read


@contextmanager
def _watched(seen: Callable[[Rows], None]) -> Iterator[None]:
    """Calls `seen` with all rows whose `gathered` is read."""
    original: Any = vars(Rows)["gathered"]

    def gathered(rows: Rows) -> Tensor:
        seen(rows)
        result: Tensor = original.fget(rows)
        return result

    Rows.gathered = property(gathered)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Rows.gathered = original  # type: ignore[method-assign]


def _listed(views: set[tuple[str, int]]) -> str:
    by_rows: dict[str, list[str]] = {}
    for where, view in sorted(views):
        by_rows.setdefault(where, []).append(str(view))
    return ", ".join(f"outputs.{where} (view {', '.join(numbers)})" for where, numbers in by_rows.items())


@checks(KIND)
def masked_tokens(case: Case) -> None:
    """A batch without any masked token gives finite terms and gradients."""
    fit = richest(case)
    if not fit.needs.masked:
        raise NotApplicable("it needs no masked views")
    module = case.cls(case.config, fit.plan)
    outputs = outputs_for(case, fit, module, hidden=False)
    value = total(module, outputs)
    require(finite([value]), f"the loss is {float(value)} where no token is masked: divide by at least 1")
    if value.requires_grad:
        value.backward()  # type: ignore[no-untyped-call]
        require(
            finite(x.grad for x in leaves(outputs) if x.grad is not None),
            "a gradient is not finite where no token is masked",
        )


def _half(outputs: Mapping[str, Features]) -> dict[str, Features]:
    return {
        name: Features(
            f.pooled.bfloat16(),
            {view: x.bfloat16() for view, x in f.tokens.items()},
            f.masks,
            f.class_tokens.bfloat16() if f.class_tokens is not None else None,
            {layer: {view: x.bfloat16() for view, x in views.items()} for layer, views in f.layers.items()},
        )
        for name, f in outputs.items()
    }


@checks(KIND)
def autocast(case: Case) -> None:
    """bf16 features under autocast give finite terms near those of fp32, and gradients."""
    fit, module, outputs = ready(case)
    with torch.no_grad():
        full = float(total(module, outputs))
    half = outputs_for(case, fit, module)
    half.student = _half(half.student)
    half.teacher = {name: _half(side) for name, side in half.teacher.items()}
    with torch.autocast("cpu", torch.bfloat16):
        value = total(module, half)
        narrow = [name for name, term in call(module, half)[0].items() if not _wide(term)]
    require(finite([value]), "the loss is not finite under bf16 autocast")
    require(not narrow, f"the term(s) {', '.join(narrow)} are in half precision under autocast: compute them in fp32")
    near = abs(float(value) - full) <= 0.1 * max(abs(full), 1.0)
    require(near, f"the loss is {float(value):.4g} under bf16 autocast and {full:.4g} in fp32: compute logits in fp32")
    if value.requires_grad:
        value.backward()  # type: ignore[no-untyped-call]


@checks(KIND)
def units(case: Case) -> None:
    """Each of `units` is entered by `forward` alone, is one graph, and computes the same when it is compiled."""
    fit, module, _ = ready(case)
    module.eval()
    require_units(module, lambda: list(call(module, outputs_for(case, fit, module))[0].values()))
