"""Checks of backbones and their collators."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from distill_authoring.conformance.augmentation import equal
from distill_authoring.conformance.modules import (
    close,
    finite,
    generic,
    of_samples,
    require_autocast,
    require_copy,
    require_gradients,
    require_lets_draw,
    require_single,
    require_state_dict,
    require_true_gradients,
    require_units,
    require_weights,
    unmoved,
    untouched,
    weighted_sum,
)
from distill_authoring.conformance.ranks import on_two_ranks
from distill_authoring.conformance.suite import Case, NotApplicable, checks, input_of, require
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
    make = input_of(case, "views", case.inputs.views)
    return [make(case.config, np.random.default_rng(seed)) for seed in range(batch)]


def collated(case: Case, batch: int = BATCH) -> Views:
    """The collator's views of B samples."""
    views: Views = case.cls.collator(case.config)(raw_views(case, batch), list(range(10, 10 + batch)))
    return views


def build(case: Case, seed: int = 0) -> nn.Module:
    """A backbone with weights of this seed, in evaluation mode."""
    if not case.cls.spec(case.config).dim:
        raise NotApplicable("`spec` says that it encodes nothing")
    torch.manual_seed(seed)
    module: nn.Module = case.cls(case.config)
    return module.eval()


def flat(features: Features) -> list[Tensor]:
    """Every floating tensor of the features."""
    extra = [features.class_tokens] if features.class_tokens is not None else []
    return [features.pooled, *(features.tokens[view] for view in sorted(features.tokens)), *extra]


def all_views(case: Case, views: Views) -> tuple[int, ...]:
    """The indices of the views whose tokens can be requested."""
    return tuple(range(len(views))) if case.cls.spec(case.config).has_tokens else ()


def fields(group: Group) -> list[Tensor | None]:
    """The tensors of a group."""
    return [group.x, group.token_mask, group.targets, group.keep]


@checks(KIND)
def collator(case: Case) -> None:
    """The collator is picklable, depends on its arguments alone, keeps views in order, and accepts one sample."""
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
    for what, collator_copy in (
        ("a pickled copy", pickle.loads(pickle.dumps(collate))),
        ("the same collator, called again,", collate),
    ):
        torch.manual_seed(3)
        repeated = collator_copy(raw, [10, 11, 12])
        require(
            all(equal(fields(a), fields(b)) for a, b in zip(views.groups, repeated.groups, strict=True)),
            f"{what} returns different views for the same samples and seeds: draw only from generators of the seeds",
        )
    single = collate(raw[1:2], [11])
    for group, single_group in zip(views.groups, single.groups, strict=True):
        require(single_group.x.shape[1] == 1, "one sample is collated to B = 1")
        require(
            _prefix(group.x[:, 1:2], single_group.x),
            "a sample alone is collated to a different x than in a batch: keep the order",
        )
        if group.token_mask is not None and single_group.token_mask is not None:
            shared = min(group.token_mask.shape[2], single_group.token_mask.shape[2])
            require(
                torch.equal(group.token_mask[:, 1, :shared], single_group.token_mask[:, 0, :shared]),
                "a sample's token_mask depends on the other samples of its batch: draw it from the sample's seed",
            )
        if group.keep is not None:
            require(
                group.keep.dtype == torch.int64 and group.keep.ndim == 3 and group.keep.shape[:2] == group.x.shape[:2],
                "a group's keep is int64, [V, B, L']",
            )
            require(
                single_group.keep is not None and torch.equal(group.keep[:, 1], single_group.keep[:, 0]),
                "a sample's keep depends on the other samples of its batch: draw it from the sample's seed",
            )


@checks(KIND)
def processes(case: Case) -> None:
    """The collator returns the same in loader workers, where `hash` of a str differs."""
    collate, raw = case.cls.collator(case.config), raw_views(case)
    expected = collate(raw, [10, 11, 12])
    for views in on_two_ranks(_collate, [(collate, raw)] * 2):
        require(
            all(equal(fields(a), fields(b)) for a, b in zip(expected.groups, views.groups, strict=True)),
            "the collator returns different views in another process: draw only from generators of the seeds",
        )


def _collate(collate: Collator, raw: list[list[View]]) -> Views:
    return collate(raw, [10, 11, 12])


def _prefix(x: Tensor, y: Tensor) -> bool:
    """Whether the tensors agree where both have values; they may be padded to different lengths."""
    shared = tuple(slice(min(a, b)) for a, b in zip(x.shape, y.shape, strict=True))
    return x.dtype == y.dtype and torch.equal(x[shared], y[shared])


@checks(KIND)
def inputs_untouched(case: Case) -> None:
    """A call changes none of its views, in training or evaluation, and seeds no global generator."""
    module, views = build(case), collated(case)
    masked = any(group.token_mask is not None or group.keep is not None for group in views.groups)
    for mode in (True, False):
        for hide in {False, masked}:
            module.train(mode)
            with untouched(views, "views", "`forward`"), unmoved(module, "`forward`", values=False):
                module(views, tokens_of=all_views(case, views), masked=hide)
    require_lets_draw(lambda: module.train()(views))


@checks(KIND)
def shapes(case: Case) -> None:
    """pooled [V, B, D], tokens [B, L, W], masks [B, L], class_tokens [V, B, C, W], as `spec` says; B may be 1 or 0."""
    spec = case.cls.spec(case.config)
    require(isinstance(spec, BackboneSpec), "`spec` must return BackboneSpec(width, dim)")
    module = build(case)
    for batch in (BATCH, 1, 0):
        views = collated(case, batch) if batch else _without_samples(collated(case, 1))
        with of_samples(batch):
            features, bare = module(views, tokens_of=all_views(case, views)), module(views)
        require(bare.pooled.shape == features.pooled.shape, "pooled has a different shape when no tokens are requested")
        require(
            features.pooled.shape == (len(views), batch, spec.dim),
            f"pooled is {list(features.pooled.shape)}, not [V, B, D] = {[len(views), batch, spec.dim]}",
        )
        for view, tokens in features.tokens.items():
            require(
                tokens.ndim == 3 and tokens.shape[0] == batch and tokens.shape[2] == spec.width,
                f"tokens of view {view} are {list(tokens.shape)}, not [B, L, W] with B = {batch}, W = {spec.width}",
            )
        for view, mask in features.masks.items():
            require(view in features.tokens, f"view {view} has a mask and no tokens")
            require(
                mask.dtype == torch.bool and mask.shape == features.tokens[view].shape[:2],
                f"the mask of view {view} must be bool, [B, L] as its tokens",
            )
            require(bool(mask.any(1).all()), f"the mask of view {view} leaves a sample without any token")
        if features.class_tokens is not None:
            shape = features.class_tokens.shape
            require(
                len(shape) == 4 and shape[:2] == (len(views), batch) and shape[3] == spec.width,
                f"class_tokens are {list(shape)}, not [V, B, C, W]",
            )
        count = 0 if features.class_tokens is None else features.class_tokens.shape[2]
        require(spec.class_tokens == count, f"`spec` says class_tokens={spec.class_tokens}; there are {count}")
        require(finite(flat(features)), "an output is not finite")
        require_single(flat(features), "an output")


@checks(KIND)
def tokens_of(case: Case) -> None:
    """Tokens are returned for exactly the views in `tokens_of`; neither they nor pooled depend on that choice."""
    module, views = build(case), collated(case)
    if not all_views(case, views):
        require(not module(views, tokens_of=()).tokens, "`spec` says has_tokens=False, yet there are tokens")
        raise NotApplicable("it has no tokens")
    with torch.no_grad():
        full = module(views, tokens_of=all_views(case, views))
        for requested in ((), (0,), (len(views) - 1,), all_views(case, views)):
            features = module(views, tokens_of=requested)
            require(
                set(features.tokens) == set(requested),
                f"with tokens_of={requested} there are tokens of {tuple(sorted(features.tokens))}: return these alone",
            )
            require(
                close([features.pooled], [full.pooled]),
                f"pooled changes with tokens_of={requested}; it must not depend on it",
            )
            for view in features.tokens:
                tokens, expected = (torch.cat([_real(x, view, i) for i in range(BATCH)]) for x in (features, full))
                require(close([tokens], [expected]), f"the tokens of view {view} change with tokens_of={requested}")


@checks(KIND)
def layers(case: Case) -> None:
    """Each layer of the spec gives [B, L, W] for exactly the views in `layers_of`; nothing else depends on that."""
    count = case.cls.spec(case.config).layers
    module, views = generic(build(case)), collated(case)
    if not count:
        raise NotApplicable("`spec` says that it hands on its last layer's tokens alone")
    every = all_views(case, views)
    layers_of = {layer: every if layer % 2 else every[-1:] for layer in range(count)}
    with torch.no_grad():
        plain = module(views, tokens_of=every)
        features = module(views, tokens_of=every, layers_of=layers_of)
        alone = module(views, tokens_of=every[-1:], layers_of={0: every[-1:]})
    require(close(flat(plain), flat(features)), "the embedding or the tokens change with layers_of")
    shapes = {layer: {view: list(x.shape) for view, x in of.items()} for layer, of in features.layers.items()}
    expected = {layer: {view: list(plain.tokens[view].shape) for view in of} for layer, of in layers_of.items()}
    require(shapes == expected, f"with layers_of={layers_of} the layers have the shapes {shapes}, not those of tokens")
    for view in every[-1:]:
        real = [torch.cat([_real_of(f.layers[0][view], f, view, i) for i in range(BATCH)]) for f in (features, alone)]
        require(close(real[:1], real[1:]), "the tokens of a layer change with what else is asked for")
        distinct = [features.layers[layer][view] for layer in range(count)]
        require(
            not any(close([a], [b], 1e-6) for a, b in pairwise(distinct)),
            "two layers give the same tokens: hand on what each gives",
        )


def _real(features: Features, view: int, sample: int) -> Tensor:
    """The real tokens of one sample's view, [L, W]."""
    return _real_of(features.tokens[view], features, view, sample)


def _real_of(tokens: Tensor, features: Features, view: int, sample: int) -> Tensor:
    mask = features.masks.get(view)
    return tokens[sample] if mask is None else tokens[sample][mask[sample]]


@checks(KIND)
def independence(case: Case) -> None:
    """Packing and padding mix no samples: a sample, or a group of views, encoded alone gives the same embedding."""
    module, views = build(case), collated(case)
    raw, collate, requested = raw_views(case), case.cls.collator(case.config), all_views(case, views)
    with torch.no_grad():
        full = module(views, tokens_of=requested)
        pooled = module(views).pooled
        for i, sample in enumerate(raw):
            single = module(collate([sample], [10 + i]), tokens_of=requested)
            require(
                close([pooled[:, i : i + 1]], [single.pooled]),
                "a sample's embedding depends on the rest of its batch (in evaluation mode)",
            )
            if full.class_tokens is not None:
                require(
                    close([full.class_tokens[:, i : i + 1]], [single.class_tokens]),
                    "a sample's class tokens depend on the rest of its batch (in evaluation mode)",
                )
            for view in requested:
                in_batch, by_itself = _real(full, view, i), _real(single, view, 0)
                require(
                    len(in_batch) == len(by_itself),
                    f"view {view} of a sample has {len(by_itself)} real tokens alone and {len(in_batch)} in a batch: "
                    "its mask must be True where a token is real, False at padding",
                )
                require(
                    close([in_batch], [by_itself]),
                    f"the tokens of view {view} of a sample depend on its batch or on padding (in evaluation mode)",
                )
        for start, group in views.numbered():
            pooled_of_group = module(Views([group])).pooled
            require(
                close([pooled[start : start + len(pooled_of_group)]], [pooled_of_group]),
                "a view's embedding depends on the other groups",
            )


@checks(KIND)
def dense(case: Case) -> None:
    """With each attention of the spec, `dense` returns finite [N, D] and [N, ..., D]; `plain`'s [N, D] is `pooled`."""
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
                embedding, tokens = module.dense(group.x[0], attention=attention)  # type: ignore[operator]
                shape, ends = (BATCH, spec.dim), (tokens.shape[0], tokens.shape[-1])
                require(
                    embedding.shape == shape and ends == shape and tokens.ndim > 2,
                    f"`dense` must give {list(shape)} and [{BATCH}, ..., {spec.dim}], not {list(embedding.shape)} and "
                    f"{list(tokens.shape)}",
                )
                require(finite([embedding, tokens]), f"a dense embedding is not finite with {attention!r} attention")
                same_pooled = close([embedding], [pooled[start]])
                require(
                    attention != "plain" or same_pooled,
                    "with plain attention `dense` must return the embedding of `encode`",
                )


@checks(KIND)
def hidden_tokens(case: Case) -> None:
    """`masked=True` hides the tokens of token_mask, and has no effect where no token is hidden."""
    module, views = generic(build(case)), collated(case)
    if not case.cls.spec(case.config).can_mask:
        raise NotApplicable("`spec` says that it cannot hide tokens")
    if all(group.token_mask is None for group in views.groups):
        raise NotApplicable("its collator draws no token_mask with these options; add an example that does")
    if not any(bool(group.token_mask.any()) for group in views.groups if group.token_mask is not None):
        raise NotApplicable("its collator hides nothing of three samples with these options; add an example that does")
    empty_masks = [None if g.token_mask is None else torch.zeros_like(g.token_mask) for g in views.groups]
    unmasked = Views([Group(g.x, g.role, mask) for g, mask in zip(views.groups, empty_masks, strict=True)])
    with torch.no_grad():
        plain, hidden, nothing_hidden = module(views), module(views, masked=True), module(unmasked, masked=True)
    require(
        close([plain.pooled], [nothing_hidden.pooled]), "masked=True changes the embedding though no token is hidden"
    )
    require(not close([plain.pooled], [hidden.pooled], 1e-6), "masked=True changes nothing: token_mask is not used")
    require(finite(flat(hidden)), "an output is not finite with hidden tokens")


@checks(KIND)
def dropped_tokens(case: Case) -> None:
    """`masked=True` computes the tokens of `keep` alone, in its order; all of them are as many as none dropped."""
    module, views = generic(build(case)), collated(case)
    if not case.cls.spec(case.config).can_drop:
        raise NotApplicable("`spec` says that it cannot drop tokens")
    every = all_views(case, views)
    require(bool(every), "a backbone that drops tokens has some: has_tokens in `spec`")

    def with_keep(order: Callable[[int], Tensor]) -> Features:
        groups = []
        for start, group in views.numbered():
            keep = order(whole.tokens[start].shape[1]).expand(*group.x.shape[:2], -1)
            groups.append(replace(group, keep=keep, token_mask=None, targets=None, hidden=None))
        features: Features = module(Views(groups), tokens_of=every, masked=True)
        return features

    with torch.no_grad():
        whole = module(views, tokens_of=every)
        all_kept = with_keep(torch.arange)
        some, turned = with_keep(lambda n: torch.arange(0, n, 2)), with_keep(lambda n: torch.arange(0, n, 2).flip(0))
    require(close(flat(whole), flat(all_kept)), "keeping every token is not the same as dropping none")
    require(not close([whole.pooled], [some.pooled], 1e-6), "dropping tokens changes nothing: keep is not used")
    for view in every:
        expected = [BATCH, (whole.tokens[view].shape[1] + 1) // 2, whole.tokens[view].shape[2]]
        require(
            list(some.tokens[view].shape) == expected,
            f"tokens of view {view} are {list(some.tokens[view].shape)}, not the kept ones, [B, L', W] = {expected}",
        )
        require(
            close([some.tokens[view]], [turned.tokens[view].flip(1)]),
            f"the tokens of view {view} do not follow keep's order",
        )
    require(finite(flat(some)), "an output is not finite with dropped tokens")


@checks(KIND)
def attention(case: Case) -> None:
    """`class_attention` and `token_layout`, if it has them: weights [N, H, L] and a position for each real token."""
    has_weights, has_layout = issubclass(case.cls, ClassAttention), issubclass(case.cls, LaidOutTokens)
    if not has_weights and not has_layout:
        raise NotApplicable("it has neither `class_attention` nor `token_layout`")
    module, raw, views = generic(build(case)), raw_views(case), collated(case)
    with torch.no_grad():
        features = module(views, tokens_of=all_views(case, views))
    for start, group in views.numbered():
        for view, x in enumerate(group.x, start):
            tokens, mask = features.tokens.get(view), features.masks.get(view)
            length = 0 if tokens is None else tokens.shape[1]
            if has_weights:
                require_weights(module.class_attention(x).detach(), [BATCH, 0, length], mask)  # type: ignore[operator]
            for i, sample in enumerate(raw if has_layout else []):
                layout = module.token_layout(sample[view])  # type: ignore[operator]
                places = len(layout) if isinstance(layout, list) else layout[0] * layout[1]
                real = length if mask is None else int(mask[i].sum())
                require(places == real, f"`token_layout` of view {view} has {places} positions for {real} real tokens")


def _scalar(module: nn.Module, views: Views, tokens_of: tuple[int, ...]) -> Tensor:
    """A number that depends on all outputs, with tokens hidden where they can be."""
    masked = any(group.token_mask is not None or group.keep is not None for group in views.groups)
    outputs = [flat(module(views, tokens_of=tokens_of, masked=hide)) for hide in {False, masked}]
    return weighted_sum([x for part in outputs for x in part])


@checks(KIND)
def gradients(case: Case) -> None:
    """A finite gradient reaches every parameter."""
    module, views = generic(build(case)).train(), collated(case)
    require_gradients(module, _scalar(module, views, all_views(case, views)), "the features")


@checks(KIND)
def true_gradients(case: Case) -> None:
    """Every output's gradient is that of finite differences, for every parameter."""
    module, views = generic(build(case)), collated(case)
    masked = any(group.token_mask is not None or group.keep is not None for group in views.groups)
    require_true_gradients(
        module, lambda m: flat(m(views, tokens_of=all_views(case, views), masked=masked)), (), "the parameters"
    )


@checks(KIND)
def state_dict(case: Case) -> None:
    """Its state dict holds all its state, and survives a file that holds only tensors."""
    views = collated(case)
    require_state_dict(lambda: build(case, torch.initial_seed()), lambda module: _features(case, module, views))


@checks(KIND)
def teacher_copy(case: Case) -> None:
    """A deep copy, such as the teacher, computes the same and shares nothing."""
    views = collated(case)
    require_copy(build(case), lambda module: _features(case, module, views))


@checks(KIND)
def determinism(case: Case) -> None:
    """The same seed gives the same weights, and in evaluation mode the same features."""
    first, second, views = build(case, 4), build(case, 4), collated(case)
    require(
        close(first.state_dict().values(), second.state_dict().values(), 0.0),
        "the same seed gives different weights: draw them from torch's global generator",
    )
    require(
        close(_features(case, first, views), _features(case, second, views)),
        "the same weights give different features",
    )


@checks(KIND)
def autocast(case: Case) -> None:
    """bf16 autocast runs forward and backward, and stays near fp32."""
    module, views = generic(build(case)), collated(case)
    require_autocast(lambda: _features(case, module, views))


@checks(KIND)
def units(case: Case) -> None:
    """Each of `units` is entered by `forward` alone, is one graph, and computes the same when it is compiled."""
    module, views = generic(build(case)), collated(case)
    require_units(module, lambda: _features(case, module, views))


def _features(case: Case, module: nn.Module, views: Views) -> list[Tensor]:
    return flat(module(views, tokens_of=all_views(case, views)))


def _without_samples(views: Views) -> Views:
    groups = [replace(group, lengths=None if group.lengths is None else group.lengths[:, :0]) for group in views.groups]
    return Views(groups).map(lambda x: x[:, :0])
