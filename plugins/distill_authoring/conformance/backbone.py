"""Checks of backbones and their collators."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill_authoring.conformance.augmentation import same
from distill_authoring.conformance.modules import (
    close,
    finite,
    generic,
    of_samples,
    require_copy,
    require_gradients,
    require_lets_draw,
    require_single,
    require_state_dict,
    require_true_gradients,
    require_weights,
    unmoved,
    untouched,
)
from distill_authoring.conformance.ranks import on_two_ranks
from distill_authoring.conformance.suite import Case, NotApplicable, checks, require
from distill_core import (
    BackboneSpec,
    ClassAttention,
    Collator,
    DenseEmbeddings,
    Features,
    Group,
    LaidOutTokens,
    View,
    Views,
)

KIND = "backbone"
BATCH = 3


def raw_views(case: Case, batch: int = BATCH) -> list[list[View]]:
    """The views of B samples."""
    return [case.cls.example_views(case.config, np.random.default_rng(seed)) for seed in range(batch)]


def collated(case: Case, batch: int = BATCH) -> Views:
    """The collator's views of B samples."""
    views: Views = case.cls.collator(case.config)(raw_views(case, batch), list(range(10, 10 + batch)))
    return views


def build(case: Case, seed: int = 0) -> nn.Module:
    """A backbone with weights of this seed, for evaluation."""
    torch.manual_seed(seed)
    module: nn.Module = case.cls(case.config)
    return module.eval()


def flat(features: Features) -> list[Tensor]:
    """Every floating tensor of the features."""
    extra = [features.class_tokens] if features.class_tokens is not None else []
    return [features.pooled, *(features.tokens[view] for view in sorted(features.tokens)), *extra]


def everything(case: Case, views: Views) -> tuple[int, ...]:
    """The views whose tokens can be asked for."""
    return tuple(range(len(views))) if case.cls.spec(case.config).has_tokens else ()


def fields(group: Group) -> list[Tensor | None]:
    """The tensors of a group."""
    return [group.x, group.token_mask, group.targets]


@checks(KIND)
def collator(case: Case) -> None:
    """The collator is picklable, a function of its arguments, keeps views in order, and takes one sample."""
    raw = raw_views(case)
    collate = case.cls.collator(case.config)
    with untouched(raw, "views", "the collator"):
        views = collate(raw, [10, 11, 12])
    require(views.roles == tuple(view.role for view in raw[0]), "the groups do not keep the views' roles in order")
    for group in views.groups:
        count, batch = group.x.shape[:2]
        require(batch == BATCH, f"a group's x is [V, B, ...]; B is {BATCH}, the second dimension {batch}")
        if group.token_mask is not None:
            require(
                group.token_mask.dtype == torch.bool and group.token_mask.shape[:2] == (count, batch),
                "a group's token_mask is bool, [V, B, L]",
            )
        if group.targets is not None and group.token_mask is not None:
            require(
                group.targets.shape[:3] == group.token_mask.shape, "a group's targets are [V, B, L, ...], as token_mask"
            )
    for what, other in (
        ("a pickled copy", pickle.loads(pickle.dumps(collate))),
        ("the same collator, asked again,", collate),
    ):
        torch.manual_seed(3)
        again = other(raw, [10, 11, 12])
        require(
            all(same(fields(a), fields(b)) for a, b in zip(views.groups, again.groups, strict=True)),
            f"{what} gives other views for the same samples and seeds: draw from generators of the seeds alone",
        )
    alone = collate(raw[1:2], [11])
    for group, one in zip(views.groups, alone.groups, strict=True):
        require(one.x.shape[1] == 1, "one sample is collated to B = 1")
        require(
            _prefix(group.x[:, 1:2], one.x), "a sample alone is collated to another x than in a batch: keep the order"
        )
        if group.token_mask is not None and one.token_mask is not None:
            shared = min(group.token_mask.shape[2], one.token_mask.shape[2])
            require(
                torch.equal(group.token_mask[:, 1, :shared], one.token_mask[:, 0, :shared]),
                "a sample's token_mask depends on the other samples of its batch: draw it from the sample's own seed",
            )


@checks(KIND)
def processes(case: Case) -> None:
    """The collator makes the same in the loader's workers, which hash strings otherwise."""
    collate, raw = case.cls.collator(case.config), raw_views(case)
    here = collate(raw, [10, 11, 12])
    for there in on_two_ranks(_collate, [(collate, raw)] * 2):
        require(
            all(same(fields(a), fields(b)) for a, b in zip(here.groups, there.groups, strict=True)),
            "the collator makes other views in another process: draw from generators of the seeds alone, hash nothing",
        )


def _collate(collate: Collator, raw: list[list[View]]) -> Views:
    return collate(raw, [10, 11, 12])


def _prefix(x: Tensor, y: Tensor) -> bool:
    """Whether what both tensors hold is the same; they may be padded to different lengths."""
    shared = tuple(slice(min(a, b)) for a, b in zip(x.shape, y.shape, strict=True))
    return x.dtype == y.dtype and torch.equal(x[shared], y[shared])


@checks(KIND)
def inputs_untouched(case: Case) -> None:
    """A call changes nothing of its views, in training and evaluation, and seeds no generator."""
    module, views = build(case), collated(case)
    masked = any(group.token_mask is not None for group in views.groups)
    for mode in (True, False):
        for hide in {False, masked}:
            module.train(mode)
            with untouched(views, "views", "`forward`"), unmoved(module, "`forward`", values=False):
                module(views, tokens_of=everything(case, views), masked=hide)
    require_lets_draw(lambda: module.train()(views))


@checks(KIND)
def shapes(case: Case) -> None:
    """pooled [V, B, D], tokens [B, L, W], masks [B, L], class_tokens [V, B, C, W], as `spec` says; B may be 1 or 0."""
    spec = case.cls.spec(case.config)
    require(isinstance(spec, BackboneSpec), "`spec` must return BackboneSpec(width, dim)")
    module = build(case)
    for batch in (BATCH, 1, 0):
        views = collated(case, batch) if batch else collated(case, 1).map(lambda x: x[:, :0])
        with of_samples(batch):
            found, bare = module(views, tokens_of=everything(case, views)), module(views)
        require(bare.pooled.shape == found.pooled.shape, "pooled has another shape where no tokens are asked for")
        require(
            found.pooled.shape == (len(views), batch, spec.dim),
            f"pooled is {list(found.pooled.shape)}, not [V, B, D] = {[len(views), batch, spec.dim]}",
        )
        for view, tokens in found.tokens.items():
            require(
                tokens.ndim == 3 and tokens.shape[0] == batch and tokens.shape[2] == spec.width,
                f"tokens of view {view} are {list(tokens.shape)}, not [B, L, W] with B = {batch}, W = {spec.width}",
            )
        for view, mask in found.masks.items():
            require(view in found.tokens, f"view {view} has a mask and no tokens")
            require(
                mask.dtype == torch.bool and mask.shape == found.tokens[view].shape[:2],
                f"the mask of view {view} must be bool, [B, L] as its tokens",
            )
            require(bool(mask.any(1).all()), f"the mask of view {view} leaves a sample without any token")
        if found.class_tokens is not None:
            shape = found.class_tokens.shape
            require(
                len(shape) == 4 and shape[:2] == (len(views), batch) and shape[3] == spec.width,
                f"class_tokens are {list(shape)}, not [V, B, C, W]",
            )
        given = 0 if found.class_tokens is None else found.class_tokens.shape[2]
        require(spec.class_tokens == given, f"`spec` says class_tokens={spec.class_tokens}; there are {given}")
        require(finite(flat(found)), "an output is not finite")
        require_single(flat(found), "an output")


@checks(KIND)
def tokens_of(case: Case) -> None:
    """Tokens come for exactly the views in `tokens_of`, and neither they nor pooled depend on which those are."""
    module, views = build(case), collated(case)
    if not everything(case, views):
        require(not module(views, tokens_of=()).tokens, "`spec` says has_tokens=False, yet there are tokens")
        raise NotApplicable("it has no tokens")
    with torch.no_grad():
        full = module(views, tokens_of=everything(case, views))
        for wanted in ((), (0,), (len(views) - 1,), everything(case, views)):
            found = module(views, tokens_of=wanted)
            require(
                set(found.tokens) == set(wanted),
                f"with tokens_of={wanted} there are tokens of {tuple(sorted(found.tokens))}: give those asked for",
            )
            require(
                close([found.pooled], [full.pooled]),
                f"pooled changes with tokens_of={wanted}; it must not depend on it",
            )
            for view in found.tokens:
                one, other = (torch.cat([_real(f, view, i) for i in range(BATCH)]) for f in (found, full))
                require(close([one], [other]), f"the tokens of view {view} change with tokens_of={wanted}")


def _real(features: Features, view: int, sample: int) -> Tensor:
    """The real tokens of one sample's view, [L, W]."""
    tokens, mask = features.tokens[view][sample], features.masks.get(view)
    return tokens if mask is None else tokens[mask[sample]]


@checks(KIND)
def independence(case: Case) -> None:
    """Packing and padding mix nothing: a sample, or a group of views, encoded alone gives the same embedding."""
    module, views = build(case), collated(case)
    raw, collate, wanted = raw_views(case), case.cls.collator(case.config), everything(case, views)
    with torch.no_grad():
        full = module(views, tokens_of=wanted)
        together = module(views).pooled
        for i, sample in enumerate(raw):
            alone = module(collate([sample], [10 + i]), tokens_of=wanted)
            require(
                close([together[:, i : i + 1]], [alone.pooled]),
                "a sample's embedding depends on the others of its batch (in eval)",
            )
            if full.class_tokens is not None:
                require(
                    close([full.class_tokens[:, i : i + 1]], [alone.class_tokens]),
                    "a sample's class tokens depend on the others of its batch (in eval)",
                )
            for view in wanted:
                mine, by_itself = _real(full, view, i), _real(alone, view, 0)
                require(
                    len(mine) == len(by_itself),
                    f"view {view} of a sample has {len(by_itself)} real tokens alone and {len(mine)} in a batch: its "
                    "mask must be True where a token is real, False at padding",
                )
                require(
                    close([mine], [by_itself]),
                    f"the tokens of view {view} of a sample depend on the others of its batch, or on padding (in eval)",
                )
        for start, group in views.numbered():
            one = module(Views([group])).pooled
            require(
                close([together[start : start + len(one)]], [one]), "a view's embedding depends on the other groups"
            )


@checks(KIND)
def dense(case: Case) -> None:
    """With each attention of the spec, `dense` gives finite [N, D] and [N, ..., D]; that of `plain` is `pooled`."""
    spec = case.cls.spec(case.config)
    if not spec.dense:
        raise NotApplicable("`spec` says that it has no dense embeddings")
    require(
        issubclass(case.cls, DenseEmbeddings),
        f"`spec` says dense={spec.dense}, and there is no method `dense`: write it, as in DenseEmbeddings",
    )
    module, views = generic(build(case)), collated(case)
    with torch.no_grad():
        pooled = module(views).pooled
        for start, group in views.numbered():
            for attention in spec.dense:
                one, tokens = module.dense(group.x[0], attention=attention)  # type: ignore[operator]
                shape, ends = (BATCH, spec.dim), (tokens.shape[0], tokens.shape[-1])
                require(
                    one.shape == shape and ends == shape and tokens.ndim > 2,
                    f"`dense` must give {list(shape)} and [{BATCH}, ..., {spec.dim}], not {list(one.shape)} and "
                    f"{list(tokens.shape)}",
                )
                require(finite([one, tokens]), f"a dense embedding is not finite with {attention!r} attention")
                same_pooled = close([one], [pooled[start]])
                require(
                    attention != "plain" or same_pooled, "with plain attention `dense` must give what `encode` gives"
                )


@checks(KIND)
def hidden_tokens(case: Case) -> None:
    """`masked=True` hides the tokens of token_mask; where none is hidden it changes nothing."""
    module, views = generic(build(case)), collated(case)
    if not case.cls.spec(case.config).can_mask:
        raise NotApplicable("`spec` says that it cannot hide tokens")
    if all(group.token_mask is None for group in views.groups):
        raise NotApplicable("its collator draws no token_mask with these options; add an example that does")
    if not any(bool(group.token_mask.any()) for group in views.groups if group.token_mask is not None):
        raise NotApplicable("its collator hides nothing of three samples with these options; add an example that does")
    nothing = [None if g.token_mask is None else torch.zeros_like(g.token_mask) for g in views.groups]
    bare = Views([Group(g.x, g.role, mask) for g, mask in zip(views.groups, nothing, strict=True)])
    with torch.no_grad():
        seen, hidden, none = module(views), module(views, masked=True), module(bare, masked=True)
    require(close([seen.pooled], [none.pooled]), "masked=True changes the embedding though no token is hidden")
    require(not close([seen.pooled], [hidden.pooled], 1e-6), "masked=True changes nothing: token_mask is not used")
    require(finite(flat(hidden)), "an output is not finite with hidden tokens")


@checks(KIND)
def attention(case: Case) -> None:
    """`class_attention` and `token_layout`, where it has them: weights [N, H, L] and a place for each real token."""
    weighs, lays_out = issubclass(case.cls, ClassAttention), issubclass(case.cls, LaidOutTokens)
    if not weighs and not lays_out:
        raise NotApplicable("it has neither `class_attention` nor `token_layout`")
    module, raw, views = generic(build(case)), raw_views(case), collated(case)
    with torch.no_grad():
        found = module(views, tokens_of=everything(case, views))
    for start, group in views.numbered():
        for view, x in enumerate(group.x, start):
            tokens, mask = found.tokens.get(view), found.masks.get(view)
            length = 0 if tokens is None else tokens.shape[1]
            if weighs:
                require_weights(module.class_attention(x).detach(), [BATCH, 0, length], mask)  # type: ignore[operator]
            for i, sample in enumerate(raw if lays_out else []):
                layout = module.token_layout(sample[view])  # type: ignore[operator]
                places = len(layout) if isinstance(layout, list) else layout[0] * layout[1]
                real = length if mask is None else int(mask[i].sum())
                require(places == real, f"`token_layout` of view {view} has {places} places for {real} real tokens")


def _scalar(module: nn.Module, views: Views, tokens_of: tuple[int, ...]) -> Tensor:
    """A number that all outputs go into, with fixed weights."""
    draw = torch.Generator().manual_seed(5)
    masked = any(group.token_mask is not None for group in views.groups)
    parts = []
    for hide in {False, masked}:
        found = module(views, tokens_of=tokens_of, masked=hide)
        parts += [(x.float() * torch.randn(x.shape, generator=draw)).mean() for x in flat(found)]
    return torch.stack(parts).sum()


@checks(KIND)
def gradients(case: Case) -> None:
    """A finite gradient reaches every parameter."""
    module, views = generic(build(case)).train(), collated(case)
    require_gradients(module, _scalar(module, views, everything(case, views)), "the features")


@checks(KIND)
def true_gradients(case: Case) -> None:
    """Every output's gradient is that of finite differences, for every parameter."""
    module, views = generic(build(case)), collated(case)
    masked = any(group.token_mask is not None for group in views.groups)
    require_true_gradients(
        module, lambda m: flat(m(views, tokens_of=everything(case, views), masked=masked)), (), "the parameters"
    )


@checks(KIND)
def state_dict(case: Case) -> None:
    """A state dict carries all its state, through a file that holds tensors alone."""
    views = collated(case)
    require_state_dict(lambda: build(case, torch.initial_seed()), lambda module: _features(case, module, views))


@checks(KIND)
def teacher_copy(case: Case) -> None:
    """A deep copy, which the teacher is, computes the same and shares nothing."""
    views = collated(case)
    require_copy(build(case), lambda module: _features(case, module, views))


@checks(KIND)
def determinism(case: Case) -> None:
    """The same seed gives the same weights, and in evaluation mode the same features."""
    one, other, views = build(case, 4), build(case, 4), collated(case)
    require(
        close(one.state_dict().values(), other.state_dict().values(), 0.0),
        "the same seed gives other weights: draw them from torch's global generator",
    )
    require(
        close(_features(case, one, views), _features(case, other, views)),
        "the same weights give other features",
    )


@checks(KIND)
def autocast(case: Case) -> None:
    """bf16 autocast runs, forward and backward, and stays near fp32."""
    module, views = generic(build(case)), collated(case)
    with torch.no_grad():
        full = _features(case, module, views)
    with torch.autocast("cpu", torch.bfloat16):
        half = flat(module(views, tokens_of=everything(case, views)))
    torch.stack([x.float().mean() for x in half]).sum().backward()  # type: ignore[no-untyped-call]
    require_near(half, full)


def require_near(half: list[Tensor], full: list[Tensor]) -> None:
    """bf16 against fp32, by the cosine of all of an output's numbers."""
    require(finite(half), "an output is not finite under bf16 autocast")
    for a, b in zip(half, full, strict=True):
        require(a.shape == b.shape, "an output has another shape under bf16 autocast")
        cosine: Any = nn.functional.cosine_similarity(a.float().flatten(), b.float().flatten(), dim=0)
        require(float(cosine) > 0.98, f"bf16 autocast is far from fp32 (cosine {float(cosine):.3f})")


def _features(case: Case, module: nn.Module, views: Views) -> list[Tensor]:
    return flat(module(views, tokens_of=everything(case, views)))
