"""Retrieval by conditioned embeddings: each item of one side is pooled anew for each item of the other (FLAIR)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from distill_core import EvaluationSet, Features, Media, Model, Plan, gather_objects, raise_on_all_ranks, wide
from distill_tasks.retrieval import Compared, Retrieval, RetrievalConfig


class ConditionedRetrievalConfig(RetrievalConfig):
    """Options of `conditioned_retrieval`."""

    pairs: Annotated[int, Field(gt=0)] = 8192
    """Pairs that are pooled at a time: memory against speed. With as many as there are texts (or more), the keys and
    values of an image's tokens are made once."""


class ConditionedRetrieval(Retrieval):
    """As `retrieval`, by the cosine of each text with what the fusion pools of the image's tokens for this text, as
    FLAIR (arXiv 2412.03561) retrieves. The second modality conditions the pooling of the first one's tokens.

    Every pair is pooled: the work grows with images x texts. Nothing is cached.
    """

    name = "conditioned_retrieval"
    Config = ConditionedRetrievalConfig

    @classmethod
    def problems(cls, config: RetrievalConfig, plan: Plan) -> Iterator[str]:
        """The recipe lacks a modality, tokens, or a fusion that pools."""
        yield from super().problems(config, plan)
        if not plan.fusion:
            yield f"{cls.name!r} pools with the fusion, and there is none"
        elif not plan.fusion_pools:
            yield f"{cls.name!r} pools with the fusion, and this recipe's has no `pool`"
        for name in (config.modalities or tuple(plan.modalities))[:1]:
            if not plan.modalities[name].spec.has_tokens:
                yield f"{cls.name!r} pools the tokens of {name!r}; its backbone has none"

    def compared(self, model: Model, samples: EvaluationSet) -> Compared:
        """Of every pair, computed at once; each rank pools its share of the images.

        Raises `UserError` where the fusion does not pool the first modality's tokens.
        """
        a, b = self.config.modalities or model.modalities
        texts, of_text = _joined(raise_on_all_ranks(partial(self._texts, model, samples, b)))
        rows, of_image = _joined(raise_on_all_ranks(partial(self._rows, model, samples, a, texts)))
        images, captions = torch.isin(of_image, of_text), torch.isin(of_text, of_image)
        matrix = rows[images][:, captions]
        by_query = {a: matrix, b: matrix.T}
        return Compared({a: of_image[images], b: of_text[captions]}, lambda query, part: by_query[query][part])

    def media(self, model: Model, sets: Sequence[EvaluationSet], samples: int) -> Iterator[Media]:
        """None: `retrieval` draws what the towers' own embeddings say."""
        return iter(())

    def _texts(self, model: Model, samples: EvaluationSet, modality: str) -> tuple[Tensor, Tensor]:
        """This rank's share: what the pooling is asked with, [m, D] as the loss has it (not normalised), and whose."""
        spec = model.backbone[modality].spec(model.backbone[modality].config)
        parts, owners = [torch.empty(0, spec.dim)], [torch.empty(0, dtype=torch.long)]
        for of, features in self._encoded(model, samples, modality, ()):
            parts.append(wide(features.pooled[0]).cpu())
            owners.append(of)
        return torch.cat(parts), torch.cat(owners)

    def _rows(self, model: Model, samples: EvaluationSet, modality: str, texts: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's share of the images: their similarities with all texts [m, M], and whose they are."""
        rows, owners = [torch.empty(0, len(texts))], [torch.empty(0, dtype=torch.long)]
        if not len(texts):
            return rows[0], owners[0]
        pairs, at_once = self.config.pairs, max(1, self.config.pairs // len(texts))
        chunks = [texts[first : first + pairs].to(model.device) for first in range(0, len(texts), pairs)]
        for of, features in self._encoded(model, samples, modality, (0,)):
            owners.append(of)
            tokens, mask = features.tokens[0], features.masks.get(0)
            for first in range(0, len(tokens), at_once):
                part = slice(first, first + at_once)
                of_part = tokens[part], None if mask is None else mask[part]
                similarity = [_similarity(model, modality, some, *of_part) for some in chunks]
                rows.append(torch.cat(similarity, 1).cpu())
        return torch.cat(rows), torch.cat(owners)

    def _encoded(
        self, model: Model, samples: EvaluationSet, modality: str, tokens_of: Sequence[int]
    ) -> Iterator[tuple[Tensor, Features]]:
        """(whose items [n], their features) of this rank's share, batch by batch."""
        items = samples.items(model, modality, self.config.fields.get(modality), share=True)
        while batch := list(islice(items, model.batch_size)):
            views = [[model.augment[modality].eval_view(item)] for _, item in batch]
            yield torch.tensor([owner for owner, _ in batch]), model.features(modality, views, tokens_of=tokens_of)


def _similarity(model: Model, modality: str, texts: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Texts [M, D], tokens [n, L, W] of images, mask [n, L] -> [n, M]."""
    pooled = model.pool(modality, texts[:, None].expand(-1, len(tokens), -1), tokens, mask)  # [M, n, D]
    return torch.einsum("mnd,md->nm", normalize(pooled, dim=-1), normalize(texts, dim=-1))


def _joined(share: tuple[Tensor, Tensor]) -> tuple[Any, Tensor]:
    """All ranks' shares, in the order of the samples."""
    parts = gather_objects(share)
    owners = torch.cat([of for _, of in parts])
    order = torch.argsort(owners, stable=True)
    return torch.cat([values for values, _ in parts])[order], owners[order]
