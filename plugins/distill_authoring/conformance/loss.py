"""Checks of losses."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from distill_authoring.conformance.inputs import BATCH, PROGRESS, Fit, fits, leaves, on, outputs, part
from distill_authoring.conformance.modules import (
    close,
    finite,
    generic,
    require_gradients,
    require_lets_draw,
    require_state_dict,
    tensors,
    unmoved,
    untouched,
)
from distill_authoring.conformance.ranks import on_two_ranks
from distill_authoring.conformance.suite import Case, NotApplicable, checks, require
from distill_core import Features, Fused, Outputs

KIND = "loss"


def first(case: Case) -> Fit:
    """The richest plan that it accepts."""
    return fits(case.cls, case.config)[0]


def call(module: Any, given: Outputs, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(terms, metrics), with what it may draw fixed."""
    torch.manual_seed(seed)
    found = module(given)
    require(
        isinstance(found, tuple) and len(found) == 2 and all(isinstance(part, dict) for part in found),
        "`forward` must return ({term: tensor}, {metric: tensor})",
    )
    return found[0], found[1]


def total(module: Any, given: Outputs, seed: int = 0) -> Tensor:
    """The sum of the terms."""
    return torch.stack([term.float() for term in call(module, given, seed)[0].values()]).sum()


def inputs(case: Case, fit: Fit, module: Any, **options: Any) -> Outputs:
    """What a step gives this loss."""
    return outputs(fit, case.cls, case.config, module, ids=ids(case), **options)


def ids(case: Case) -> tuple[str, ...]:
    """The modalities whose views are integer ids: none, where the loss takes floats (or does not look)."""
    if "ids" not in case.memo:
        fit = first(case)
        names = tuple(fit.plan.modalities)
        case.memo["ids"] = ()
        for chosen in ((), *((name,) for name in names), names):
            module = case.cls(case.config, fit.plan)
            try:
                call(module, outputs(fit, case.cls, case.config, module, ids=chosen))
            except Exception:
                continue
            case.memo["ids"] = chosen
            break
    return cast(tuple[str, ...], case.memo["ids"])


@checks(KIND)
def terms(case: Case) -> None:
    """Terms and metrics are finite 0-dim tensors, metrics detached; on several plans, and for one sample."""
    for fit in fits(case.cls, case.config):
        with on(fit):
            _terms(case, fit)


def _terms(case: Case, fit: Fit) -> None:
    module = case.cls(case.config, fit.plan)
    for batch in (BATCH, 1):
        found, metrics = call(module, inputs(case, fit, module, batch=batch))
        require(found, "`forward` gives no term")
        for what, group in (("term", found), ("metric", metrics)):
            for name, value in group.items():
                require(isinstance(value, Tensor) and value.ndim == 0, f"the {what} {name!r} must be a 0-dim tensor")
                require(finite([value]), f"the {what} {name!r} is {float(value)} for a batch of {batch}")
        for name, value in found.items():
            require(_wide(value), f"the term {name!r} is {value.dtype}: compute it in fp32 or wider")
        kept = [name for name, value in metrics.items() if value.requires_grad]
        require(not kept, f"the metric(s) {', '.join(kept)} hold on to the graph: .detach() them")


def _wide(value: Tensor) -> bool:
    return torch.promote_types(value.dtype, torch.float32) == value.dtype


@checks(KIND)
def inputs_untouched(case: Case) -> None:
    """Other losses read the same outputs: `forward` and `after_step` change nothing of them, and seed no generator."""
    fit = replace(first(case), padding="all")
    module: Any = generic(case.cls(case.config, fit.plan)).train()
    given = inputs(case, fit, module)
    heads = {name: given.ema(getattr(module, name)) for name in case.cls.teacher_modules}
    with ExitStack() as stack:
        for name, head in heads.items():
            stack.enter_context(unmoved(head, f"the loss, in the teacher's copy of {name!r},"))
        with untouched(given, "outputs", "`forward`"), unmoved(module, "`forward`"):
            call(module, given)
        _require_memo(given, "`forward`")
        value = total(module, given)
        if value.requires_grad:
            value.backward()  # type: ignore[no-untyped-call]
        with untouched(given, "outputs", "`after_step`"):
            module.after_step(given, PROGRESS)
        _require_memo(given, "`after_step`")
    with torch.no_grad(), untouched(given, "outputs", "`forward`"):
        call(module, given)
    require_lets_draw(lambda: module(inputs(case, fit, module)))


def _require_memo(given: Outputs, who: str) -> None:
    """The `rows` that were made, which other losses read, are what they would be anew."""
    parts: list[tuple[str, Features | Fused]] = [
        *((f"student[{name!r}]", f) for name, f in given.student.items()),
        *(
            (f"teacher[{teacher!r}][{name!r}]", f)
            for teacher, side in given.teacher.items()
            for name, f in side.items()
        ),
        *((f"fused[{name!r}]", f) for name, f in given.fused.items()),
    ]
    for where, made in parts:
        if "rows" in vars(made):
            fresh = replace(made)
            for what in ("embedding", "gathered"):
                require(
                    torch.equal(getattr(made, what), getattr(fresh, what)),
                    f"{who} changes outputs.{where}.{what} in place: other losses are given the same",
                )


@checks(KIND)
def padding(case: Case) -> None:
    """What stands in padded tokens, the student's and the teacher's, changes no term."""
    read = False
    for fit in (replace(first(case), padding="all"), *fits(case.cls, case.config)):
        with on(fit), torch.no_grad():
            module = generic(case.cls(case.config, fit.plan))
            given = inputs(case, fit, module)
            if any(f.masks for side in (given.student, *given.teacher.values()) for f in side.values()):
                read = True
                whole = call(module, given)[0]
                spoilt = call(module, inputs(case, fit, module, fill=9.0))[0]
                changed = [name for name in whole if not close([whole[name]], [spoilt[name]])]
                require(
                    not changed,
                    f"padded tokens change the term(s) {', '.join(changed)}: use features.masks, True where a token is "
                    "real",
                )
    if not read:
        raise NotApplicable("it reads no tokens of a modality with padding")


@checks(KIND)
def gradients(case: Case) -> None:
    """A finite gradient reaches every parameter, and what the student made."""
    fit = first(case)
    module = generic(case.cls(case.config, fit.plan)).train()
    given = inputs(case, fit, module)
    found = call(module, given)[0]
    dead = [name for name, term in found.items() if not term.requires_grad]
    require(not dead, f"the term(s) {', '.join(dead)} carry no gradient: something detaches them")
    value = torch.stack([term.float() for term in found.values()]).sum()
    require_gradients(module, value, "the terms")
    got = [x.grad for x in leaves(given) if x.grad is not None]
    require(got and any(bool((x != 0).any()) for x in got), "no gradient reaches the student: something detaches it")
    require(finite(got), "the student's gradient is not finite")
    with torch.no_grad():
        for name in fit.plan.modalities:
            other = inputs(case, fit, module)
            for x in leaves(other, name):
                x += 0.3 * torch.randn_like(x)
            reached = any(x.grad is not None and bool((x.grad != 0).any()) for x in leaves(given, name))
            require(
                reached or close([total(module, other)], [value], 1e-5),
                f"the terms move with the student of {name!r}, and no gradient reaches it: something detaches it "
                "(what must not learn, a recipe freezes)",
            )


@checks(KIND)
def embeddings(case: Case) -> None:
    """`Needs.embeddings` names the modalities whose embedding (`pooled`) the loss trains: others are not scored."""
    fit = first(case)
    if fit.needs.fused:
        raise NotApplicable("it reads fused views: which embeddings it trains depends on the fusion")
    module = generic(case.cls(case.config, fit.plan)).train()
    given = inputs(case, fit, module)
    pooled = {name: features.pooled for name, features in given.student.items()}
    found = torch.autograd.grad(total(module, given), list(pooled.values()), allow_unused=True)
    learns = {name for name, x in zip(pooled, found, strict=True) if x is not None and bool((x != 0).any())}
    said = fit.needs.named if fit.needs.embeddings is None else set(fit.needs.embeddings)
    idle, unsaid = sorted(said - learns), sorted(learns - said if said or fit.needs.named else ())
    require(
        not idle,
        f"no gradient reaches the embedding of {', '.join(idle)}: leave it out of Needs.embeddings (None: all that "
        "are named)",
    )
    require(not unsaid, f"it trains the embedding of {', '.join(unsaid)}: name it in Needs.embeddings")


@checks(KIND)
def purity(case: Case) -> None:
    """`forward` twice on the same outputs gives the same, and moves no state; `after_step` does."""
    fit = first(case)
    module = case.cls(case.config, fit.plan)
    given = inputs(case, fit, module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    one, other = (call(module, given)[0] for _ in range(2))
    require(one.keys() == other.keys(), "the same outputs give other terms the second time")
    changed = [name for name in one if not torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-5)]
    require(not changed, f"{', '.join(changed)} changes when `forward` is called again: keep no state in it")
    moved = [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]
    require(not moved, f"`forward` moves {', '.join(moved)}; move state in `after_step`")


@checks(KIND)
def after_step(case: Case) -> None:
    """`after_step` runs, leaves finite state, and the loss goes on from it; a state dict carries all of it."""
    fit = first(case)

    def build() -> nn.Module:
        module: nn.Module = case.cls(case.config, fit.plan)
        return module

    module: Any = build()
    given = inputs(case, fit, module)
    value = total(module, given)
    if value.requires_grad:
        value.backward()  # type: ignore[no-untyped-call]
    module.after_step(given, PROGRESS)  # with gradients recorded, as the trainer calls it
    kept = [name for name, x in module.state_dict(keep_vars=True).items() if x.grad_fn is not None]
    require(not kept, f"`after_step` leaves {', '.join(kept)} in the step's graph: decorate it with @torch.no_grad()")
    require(finite(x for x in module.state_dict().values() if x.is_floating_point()), "its state is not finite then")
    require(finite(call(module, inputs(case, fit, module, seed=20))[0].values()), "the next terms are not finite")

    def run(one: nn.Module) -> list[Tensor]:
        return list(call(one, inputs(case, fit, one))[0].values())

    def stepped() -> nn.Module:
        one: Any = build()
        step = inputs(case, fit, one, seed=torch.initial_seed())
        call(one, step)
        one.after_step(step, PROGRESS)
        return one  # type: ignore[no-any-return]

    require_state_dict(stepped, run, build)


@checks(KIND)
def teacher_modules(case: Case) -> None:
    """Each name in `teacher_modules` is a module of its own with parameters."""
    if not case.cls.teacher_modules:
        raise NotApplicable("it has no teacher_modules")
    fit = first(case)
    module = case.cls(case.config, fit.plan)
    for name in case.cls.teacher_modules:
        head: Any = getattr(module, name, None)
        require(isinstance(head, nn.Module), f"teacher_modules names {name!r}, and the loss has no module of that name")
        require(list(head.parameters()), f"teacher_modules names {name!r}, which has no parameters to average")
    require(fit.needs.teacher, "it has teacher_modules and does not need a teacher: say Needs(teacher=(...))")


@checks(KIND)
def teacher_targets(case: Case) -> None:
    """What `teacher_modules` names is read by `outputs.ema`; the loss's own learns nothing of what the teacher saw."""
    if not case.cls.teacher_modules:
        raise NotApplicable("it has no teacher_modules")
    fit = first(case)
    module = generic(case.cls(case.config, fit.plan))
    given = inputs(case, fit, module)
    whole = total(module, given)
    for name in case.cls.teacher_modules:
        other = inputs(case, fit, module)
        with torch.no_grad():
            for parameter in other.ema(getattr(module, name)).parameters():
                parameter.add_(torch.randn_like(parameter))
        require(
            not close([whole], [total(module, other)], 1e-6),
            f"the terms do not depend on the teacher's copy of {name!r}: read it by outputs.ema(self.{name})",
        )
        _require_no_targets(module, name, inputs(case, fit, module))


def _require_no_targets(module: Any, name: str, given: Outputs) -> None:
    """Whatever the module itself makes of the teacher's features takes no gradient."""
    made: list[Tensor] = []

    def remember(_: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
        if any(isinstance(x, Tensor) and x.requires_grad for x in arguments) and isinstance(result, Tensor):
            made.append(result)

    for side, learns in ((given.student, False), *((side, True) for side in given.teacher.values())):
        for _, x in tensors(side, ""):
            if x.is_leaf and x.is_floating_point():
                x.requires_grad_(learns)
    for _, x in tensors(given.fused, ""):
        if x.is_leaf:
            x.requires_grad_(False)
    handle = getattr(module, name).register_forward_hook(remember)
    try:
        value = total(module, given)
    finally:
        handle.remove()
    made = [x for x in made if x.requires_grad]
    gradients = torch.autograd.grad(value, made, allow_unused=True) if made and value.requires_grad else ()
    require(
        not any(x is not None and bool((x != 0).any()) for x in gradients),
        f"a gradient goes through {name!r} to the teacher's features: make targets by outputs.ema(self.{name})",
    )


@checks(KIND)
def ranks(case: Case) -> None:
    """On two ranks, the mean of the terms and of the gradients is that of both ranks' rows in one process, and state
    stays equal. Where `across_ranks` is False, a rank's terms still do not depend on its number."""  # fmt: skip
    fit = first(case)
    module = generic(case.cls(case.config, fit.plan))
    given = inputs(case, fit, module, batch=2 * BATCH)
    if not close([total(module, given)], [total(module, given, seed=1)], 1e-5):
        raise NotApplicable("it draws random numbers: ranks draw others than one process")
    step = (case.cls, case.config, fit, ids(case), module.state_dict())
    rows = [(0, BATCH), (BATCH, 2 * BATCH)]
    same, turned = (on_two_ranks(rank_step, [(*step, *rows[i]) for i in order]) for order in ((0, 1), (1, 0)))
    for rank in (0, 1):
        require(
            close(same[rank].terms, turned[1 - rank].terms),
            "the same rows give other terms on another rank: rank r's rows begin at r * B of what is gathered",
        )
    require(
        close(same[0].state, same[1].state, 1e-6),
        "after `after_step` two ranks hold different states: take the mean over ranks (distributed.all_gather)",
    )
    if not case.cls.across_ranks:
        return
    whole = rank_step(*step, 0, 2 * BATCH)
    require(
        close([(a + b) / 2 for a, b in zip(same[0].terms, same[1].terms, strict=True)], whole.terms),
        "the mean of the terms of two ranks is not the term of all their rows: compare with `gathered` (a loss "
        "of each rank's own rows says across_ranks = False)",
    )
    about = "gradient is another on two ranks than in one process: gather with gradients (distributed.all_gather)"
    mean = [(a + b) / 2 for a, b in zip(same[0].parameters, same[1].parameters, strict=True)]
    require(close(mean, whole.parameters, 1e-3), f"a parameter's {about}")
    joined = [torch.cat([a, b], dim) / 2 for a, b, dim in zip(same[0].rows, same[1].rows, same[0].dims, strict=True)]
    require(close(joined, whole.rows, 1e-3), f"the student's {about}")


def rank_step(
    cls: Any, config: Any, fit: Fit, chosen: tuple[str, ...], state: dict[str, Tensor], start: int, end: int
) -> RankStep:
    """Forward, backward and `after_step` on rows start..end of a batch of two ranks."""
    module = cls(config, fit.plan)
    module.load_state_dict(state)
    torch.manual_seed(0)
    joint = outputs(fit, cls, config, module, batch=2 * BATCH, ids=chosen)
    own_fusion = bool(joint.fused) and not all(x.pooled.is_leaf for x in joint.fused.values())
    given = part(joint, start, end, joint.fusion if own_fusion else None)
    found = call(module, given)[0]
    value = torch.stack([term.float() for term in found.values()]).sum()
    if value.requires_grad:
        value.backward()  # type: ignore[no-untyped-call]
    moved = [p for p in module.parameters() if p.requires_grad]
    rows = leaves(given)
    sizes = [(a.shape, b.shape) for a, b in zip(leaves(joint), rows, strict=True)]
    dims = [next((i for i, (m, n) in enumerate(zip(a, b, strict=True)) if m != n), 0) for a, b in sizes]
    module.after_step(given, PROGRESS)
    return RankStep(
        [term.detach() for term in found.values()],
        [torch.zeros_like(x) if x.grad is None else x.grad for x in moved],
        [torch.zeros_like(x) if x.grad is None else x.grad for x in rows],
        dims,
        [x.detach().float() for x in module.state_dict().values()],
    )


@dataclass
class RankStep:
    """One rank's terms, gradients of parameters and of the student's rows (along `spec`), and state after the step."""

    terms: list[Tensor]
    parameters: list[Tensor]
    rows: list[Tensor]
    dims: list[int]
    state: list[Tensor]


@checks(KIND)
def masked_tokens(case: Case) -> None:
    """A batch in which no token happens to be masked gives finite terms and gradients."""
    fit = first(case)
    if not fit.needs.masked:
        raise NotApplicable("it needs no masked views")
    module = case.cls(case.config, fit.plan)
    given = inputs(case, fit, module, hidden=False)
    value = total(module, given)
    require(finite([value]), f"the loss is {float(value)} where no token is masked: divide by at least 1")
    if value.requires_grad:
        value.backward()  # type: ignore[no-untyped-call]
        require(finite(x.grad for x in leaves(given) if x.grad is not None), "a gradient is not finite then")


def _half(given: dict[str, Features]) -> dict[str, Features]:
    return {
        name: Features(
            f.pooled.bfloat16(),
            {view: x.bfloat16() for view, x in f.tokens.items()},
            f.masks,
            f.class_tokens.bfloat16() if f.class_tokens is not None else None,
        )
        for name, f in given.items()
    }


@checks(KIND)
def autocast(case: Case) -> None:
    """bf16 features under autocast give finite terms near those of fp32, and gradients."""
    fit = first(case)
    module = generic(case.cls(case.config, fit.plan))
    given = inputs(case, fit, module)
    with torch.no_grad():
        full = float(total(module, given))
    half = inputs(case, fit, module)
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
