"""The captioning loss: a decoder of the recipe's `heads` predicts each token of a text from those before it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from distill_core import Decoder, Group, Loss, LossConfig, Needs, Outputs, Plan, Vocabulary
from distill_vl.clip_text import to_device


class CaptioningConfig(LossConfig):
    """Which decoder learns, and how."""

    head: str = "decoder"
    """The decoder among the recipe's `heads`."""
    parallel: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of each batch whose captions are predicted in parallel, from masks alone (CapPa); the other rows are
    predicted token by token. Of a `caption_decoder` with `parallel`."""


class Captioning(Loss):
    """Mean cross-entropy of the first text's tokens up to `end`, each given those before it and the first view of what
    the decoder reads. The mean is over all tokens of this rank."""

    name = "captioning"
    Config = CaptioningConfig
    across_ranks = False
    partial = True
    examples = ({}, {"parallel": 0.5})

    def __init__(self, config: CaptioningConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        head = plan.heads[config.head]
        decoder: type[Decoder] = head.component
        self.reads, self.writes = decoder.reads(head.config), decoder.writes(head.config)
        vocabulary = plan.modalities[self.writes].spec.vocabulary
        assert vocabulary is not None  # or the decoder's `problems` say so
        self.vocabulary = vocabulary

    @classmethod
    def needs(cls, config: CaptioningConfig, plan: Plan) -> Needs:
        """The decoder, and a text."""
        head = plan.heads.get(config.head)
        writes = head.component.writes(head.config) if head and issubclass(head.component, Decoder) else None
        return Needs(heads=(config.head,), student=(writes,) if writes is not None else (), embeddings=())

    @classmethod
    def problems(cls, config: CaptioningConfig, plan: Plan) -> Iterable[str]:
        """A decoder; one that predicts in parallel, where that is asked for."""
        known = plan.heads.get(config.head)
        if known is not None and not issubclass(known.component, Decoder):
            yield f"{cls.name!r}: the head {config.head!r} is no decoder"
        elif known is not None and config.parallel and not getattr(known.config, "parallel", False):
            yield f"{cls.name!r}: parallel: the head {config.head!r} must be a `caption_decoder` with parallel: true"

    def units(self) -> Sequence[nn.Module]:
        """None: where the tokens are is read on the host. The decoder has units of its own."""
        return ()

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One term; the share of tokens that were predicted right."""
        group = outputs.views[self.writes].groups[0]
        ids = group.x[0]
        lengths = lengths_of(group, self.vocabulary)
        encoded = {name: outputs.student[name].view(0) for name in self.reads}
        decoder, batch = outputs.heads[self.config.head], len(ids)
        split = round(self.config.parallel * batch)
        losses, right, count = [], [], 0
        for parallel, part in ((True, slice(0, split)), (False, slice(split, batch))):
            if len(own := ids[part]):
                rows = to_device(ids.device, places(lengths[part], own.shape[1] - 1))[0]
                part_encoded = {name: x[part] for name, x in encoded.items()} if split else encoded
                options = {"parallel": True} if parallel else {}
                logits = decoder(part_encoded, own[:, :-1], rows, **options)
                targets = own[:, 1:].flatten()[rows]
                losses.append(cross_entropy(logits, targets, reduction="sum"))
                right.append((logits.detach().argmax(-1) == targets).sum())
                count += len(rows)
        count = max(count, 1)
        return {"captioning": torch.stack(losses).sum() / count}, {"accuracy": torch.stack(right).sum() / count}


def lengths_of(group: Group, vocabulary: Vocabulary) -> Tensor:
    """[B] on the host: tokens of each sample's first view up to its first `end`, that included."""
    if group.lengths is not None:
        return torch.from_numpy(group.lengths[0]).long()
    ids = group.x[0].cpu()
    ended = ids == vocabulary.end
    return torch.where(ended.any(1), ended.int().argmax(1) + 1, ids.shape[1])


def places(lengths: Tensor, length: int) -> Tensor:
    """The places among N * L, [R], of the tokens that another one follows: of N sequences of so many tokens [N]."""
    return (torch.arange(length) < lengths[:, None] - 1).flatten().nonzero()[:, 0]
