"""A trained model to use: encodes items of each modality."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from distill_core.batch import Group, View, Views, join_views
from distill_core.contracts.optional import ClassAttention, Detokenizes, TokenPooling, offers
from distill_core.errors import BadSample, UserError, did_you_mean
from distill_core.generate import write
from distill_core.interfaces import Augmentation, Backbone, Collator, Decoder, FusionHead, Head
from distill_core.outputs import Encoded, Features
from distill_core.plan import joined
from distill_core.system.prefetch import prefetch_map
from distill_core.system.process import reading_threads

FeatureKind = Literal["embedding", "class_token", "mean_token"]
"""What an item is turned into: see `Model.encode`."""


class Model:
    """Backbones of one side (student or teacher), with the views and collators that evaluation uses."""

    def __init__(
        self,
        backbone: Mapping[str, Backbone],
        augment: Mapping[str, Augmentation],
        collators: Mapping[str, Collator],
        *,
        fusion: FusionHead | None = None,
        fusions: Mapping[str, FusionHead] | None = None,
        teacher: bool = False,
        device: torch.device | str = "cpu",
        batch_size: int = 256,
        precision: str = "fp32",
        untrained: Collection[str] = (),
        heads: Mapping[str, Head] | None = None,
    ) -> None:
        """`fusions`: those besides `fusion`, by name; `untrained`: modalities whose embedding no loss trained
        (`Recipe.untrained_embeddings`); `heads`: those of the recipe, of a teacher those that it has copies of."""
        self.heads = dict(heads or {})
        self.untrained = frozenset(untrained)
        self.backbone = dict(backbone)
        self.augment = dict(augment)
        self.collators = dict(collators)
        self.fusion, self.fusions = fusion, dict(fusions or {})
        self.teacher = teacher
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.precision = precision

    @property
    def side(self) -> str:
        """`student` or `teacher`."""
        return "teacher" if self.teacher else "student"

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those of this side with a tower, in the recipe's order: a teacher may have fewer than the student. What reads
        several at once (`NAME+OTHER`) is none of them, and encodes by its key."""
        return tuple(name for name in self.backbone if len(joined(name)) == 1)

    def default_features(self, modality: str) -> FeatureKind:
        """`embedding`; `class_token`, from which it is projected, where no loss trained the embedding."""
        module = self.backbone[modality]
        if modality in self.untrained and module.spec(module.config).class_tokens:
            return "class_token"
        return "embedding"

    def encode(self, modality: str, items: Iterable[Any], *, features: FeatureKind | None = None) -> Tensor:
        """Embeddings [N, D] of N items (pictures as paths, bytes, arrays or PIL images; texts as str), L2-normalised,
        fp32, on the CPU. What is no collection, or is a str or bytes, is one item.

        `features: class_token` gives instead what the embedding is projected from, [N, W]; None, the default, does so
        where no loss trained the embedding (`default_features`). `mean_token` gives the mean of the tokens, [N, W].
        Raises `UserError` for a modality that this side lacks, a backbone without such tokens, or an item that cannot
        be read.
        """
        if modality not in self.backbone:
            raise UserError(f"the {self.side} has no modality {modality!r}{did_you_mean(modality, self.modalities)}")
        features = features or self.default_features(modality)
        if features not in get_args(FeatureKind):
            raise UserError(f"no features {features!r}; there are {', '.join(get_args(FeatureKind))}")
        spec = self.backbone[modality].spec(self.backbone[modality].config)
        if features == "class_token" and not spec.class_tokens:
            raise UserError(f"the backbone of {modality!r} gives no class tokens")
        if features == "mean_token" and not spec.has_tokens:
            raise UserError(f"the backbone of {modality!r} gives no tokens")
        parts = [self._encode(modality, views, features) for views in self._views(modality, items, self.batch_size)]
        if not parts:
            return torch.empty(0, spec.dim if features == "embedding" else spec.width)
        return torch.cat(parts)

    def _views(self, modality: str, items: Iterable[Any], size: int) -> Iterator[list[list[View]]]:
        """The view of each item, so many at a time. Raises `UserError` for one that cannot be read."""
        if isinstance(items, str | bytes) or not isinstance(items, Iterable):
            items = [items]

        def view(numbered: tuple[int, Any]) -> View:
            try:
                return self.eval_view(modality, numbered[1])
            except BadSample as error:
                raise UserError(f"{modality} {numbered[0]}: {error}") from error

        waiting = []
        for view_of_item in prefetch_map(view, enumerate(items), reading_threads(self.device)):
            waiting.append([view_of_item])
            if len(waiting) == size:
                yield waiting
                waiting = []
        if waiting:
            yield waiting

    def decoder(self, name: str | None = None) -> tuple[str, Decoder]:
        """A decoder among `heads` and its name; None takes the only one. Raises `UserError` where there is none."""
        known = {head_name: head for head_name, head in self.heads.items() if isinstance(head, Decoder)}
        if name is None and len(known) != 1:
            has = f"has several decoders, {', '.join(known)}; name one" if known else "has no decoder among its heads"
            raise UserError(f"the {self.side} {has}")
        chosen = name if name is not None else next(iter(known))
        if chosen not in known:
            raise UserError(f"the {self.side} has no decoder {chosen!r}{did_you_mean(chosen, list(known))}")
        return chosen, known[chosen]

    @torch.no_grad()
    def generate(
        self,
        modality: str,
        items: Iterable[Any],
        *,
        head: str | None = None,
        prompt: Any = None,
        beams: int = 1,
        longest: int | None = None,
    ) -> list[Any]:
        """What a decoder writes about each of N items: items of the modality that it writes (the captions of images).

        `head` names the decoder, None takes the only one. What is written begins with `prompt`, an item of that
        modality, and ends after `longest` tokens at the latest (None: as many as its backbone takes). `beams`: how many
        continuations are followed at a time (`generate.write`); one is greedy. Raises `UserError` where the model
        cannot write about this modality, and for fewer than one beam or token.
        """
        for option, value in (("beams", beams), ("longest", longest)):
            if value is not None and value < 1:
                raise UserError(f"{option} must be at least 1, not {value}")
        name, decoder = self.decoder(head)
        writes, reads = decoder.writes(decoder.config), decoder.reads(decoder.config)
        if set(reads) - {writes} != {modality} - {writes}:
            raise UserError(
                f"the decoder {name!r} does not write about {modality!r} alone: it reads {', '.join(reads)}"
            )
        for needed in (modality, writes):
            if needed not in self.backbone:
                raise UserError(f"the {self.side} has no modality {needed!r}, which the decoder {name!r} needs")
        tower = self.backbone[writes]
        reader: object = tower
        vocabulary = tower.spec(tower.config).vocabulary
        if vocabulary is None or not offers(reader, Detokenizes):
            raise UserError(f"the backbone {tower.name!r} of {writes!r} has no ids that can be read (`detokenize`)")
        start = torch.tensor([[vocabulary.start]])
        if prompt is not None:
            (views,) = self._views(writes, [prompt], 1)
            ids = self._batch(writes, views).groups[0].x[0].cpu()
            start = ids[:, : int((ids[0] == vocabulary.end).nonzero()[0, 0])]
        longest = min(longest or vocabulary.longest, vocabulary.longest)
        written: list[Any] = []
        for views in self._views(modality, items, max(1, self.batch_size // beams)):
            with self._evaluating(self.backbone[modality]) as module, evaluating(decoder), evaluating(tower):
                encoded = module(self._batch(modality, views), tokens_of=(0,)).view(0).repeated(beams)

                def follow(ids: Tensor, encoded: Encoded = encoded) -> Tensor:
                    context = {modality: encoded}
                    if writes in reads:
                        context[writes] = tower(Views([Group(ids[None])]), tokens_of=(0,)).view(0)
                    last = torch.arange(1, len(ids) + 1, device=ids.device) * ids.shape[1] - 1
                    logits: Tensor = decoder(context, ids, last)
                    return logits

                prompts = start.to(self.device).expand(len(views), -1)
                ids = write(follow, prompts, end=vocabulary.end, longest=longest, beams=beams)
            written += reader.detokenize(ids.cpu())
        return written

    def eval_view(self, modality: str, item: Any) -> View:
        """The deterministic view of an item; of several modalities at once, of {modality: item}. Raises `BadSample`."""
        names = joined(modality)
        if len(names) == 1:
            return self.augment[modality].eval_view(item)
        if not isinstance(item, Mapping) or set(item) != set(names):
            raise BadSample(f"an item of {modality!r} is a mapping with {', '.join(names)}")
        views = {name: self.augment[name].eval_view(item[name]) for name in names}
        return View(views, next(iter(views.values())).role)

    def _encode(self, modality: str, views: list[list[View]], features: str) -> Tensor:
        outputs = self.features(modality, views, tokens_of=(0,) if features == "mean_token" else ())
        embedded = outputs.pooled
        if features == "mean_token":
            real = outputs.masks.get(0, torch.ones_like(outputs.tokens[0][..., 0], dtype=torch.bool))[..., None]
            embedded = ((outputs.tokens[0].float() * real).sum(1) / real.sum(1).clamp(min=1))[None]
        if features == "class_token":
            assert outputs.class_tokens is not None
            embedded = outputs.class_tokens[:, :, 0]  # the first makes the embedding
        return normalize(embedded[0].float(), dim=-1).cpu()

    @torch.no_grad()
    def features(self, modality: str, views: list[list[View]], *, tokens_of: Sequence[int] = ()) -> Features:
        """Features of the views of B samples (V each), in one batch, with the tokens of the views in `tokens_of`.

        For evaluations that read tokens or call `fusion` (the student's; None for a teacher or without one).
        """
        with self._evaluating(self.backbone[modality]) as module:
            outputs: Features = module(self._batch(modality, views), tokens_of=tokens_of)
        return outputs

    @torch.no_grad()
    def pool(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """`TokenPooling.pool` of the fusion: queries [V, B, D] over one modality's tokens [B, L, W], mask [B, L] ->
        [V, B, D], fp32, on the model's device.

        Raises `UserError` for a side without a fusion (a teacher), and a fusion that does not offer it.
        """
        fusion = self.fusion
        if fusion is None:
            raise UserError(f"the {self.side} has no fusion")
        if not offers(self.fusion, TokenPooling):
            raise UserError(f"the fusion {fusion.name!r} has no `pool`")
        with self._evaluating(fusion) as module:
            pooled: Tensor = module.pool(modality, queries, tokens, mask)
        return pooled.float()

    @torch.no_grad()
    def dense(self, modality: str, views: Sequence[View], *, attention: str = "plain") -> Tensor:
        """Embeddings of the tokens of N views of one shape, where they stand: [N, ..., D], L2-normalised, fp32, on the
        model's device.

        See `DenseEmbeddings`. Raises `UserError` for a backbone that has none, or a shape that it does not take.
        """
        offered = self.backbone[modality].spec(self.backbone[modality].config).dense
        if attention not in offered:
            raise UserError(f"the backbone of {modality!r} gives no dense embeddings with {attention!r} attention")
        try:
            (group,) = self._batch(modality, [[view] for view in views]).groups
            with self._evaluating(self.backbone[modality]) as module:
                _, embedded = module.dense(group.x[0], attention=attention)
        except ValueError as error:
            raise UserError(f"{modality}: {error}") from error
        return normalize(embedded.float(), dim=-1)

    def _batch(self, modality: str, views: list[list[View]]) -> Views:
        names, seeds = joined(modality), [0] * len(views)
        if len(names) == 1:
            return self.collators[modality](views, seeds).map(lambda x: x.to(self.device))
        own = {name: [[view.data[name] for view in sample] for sample in views] for name in names}
        parts = {name: self.collators[name](own[name], seeds) for name in names}
        return join_views(parts, [view.role for view in views[0]]).map(lambda x: x.to(self.device))

    @contextmanager
    def _evaluating(self, module: nn.Module) -> Iterator[Any]:
        """A backbone or the fusion in evaluation mode and the run's precision; its modes come back."""
        bf16 = self.precision == "bf16"
        with evaluating(module), torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext():
            yield module

    @torch.no_grad()
    def class_attention(self, modality: str, views: Sequence[View]) -> Tensor:
        """`ClassAttention.class_attention` [B, H, L] of one view each of B samples.

        Raises `UserError` for a backbone that does not offer it.
        """
        module = self.backbone[modality]
        if not offers(module, ClassAttention):
            raise UserError(f"the backbone {module.name!r} of {modality!r} has no `class_attention`")
        batch = self._batch(modality, [[view] for view in views])
        with evaluating(self.backbone[modality]):
            return module.class_attention(batch.groups[0].x[0])


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A module in evaluation mode for a while; each part goes back to the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
