"""Retrieval with several captions a picture against independent tools, and the median rank by hand."""

from __future__ import annotations

import pytest
import torch
from score_values import values
from torch.nn.functional import normalize

from distill_core.evaluate.sets import EvaluationSet
from distill_tasks.retrieval import Retrieval, ranks_in


def several(pictures: int, most: int, dim: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures [N, D], captions [M, D] near theirs, and the captions' pictures [M]; 1 to `most` captions each."""
    owners = torch.arange(pictures).repeat_interleave(torch.randint(1, most + 1, (pictures,)))
    images = normalize(torch.randn(pictures, dim), dim=-1)
    return images, normalize(images[owners] + torch.randn(len(owners), dim), dim=-1), owners


@pytest.mark.parametrize("chunk", [7, 1024])
def test_against_clip_benchmark(chunk: int) -> None:
    """Would catch a last chunk that is lost, and R@k of text retrieval that counts captions and not pictures."""
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    images, texts, owners = several(97, 5)
    similarity = texts @ images.T
    positive = torch.zeros_like(similarity, dtype=torch.bool)
    positive[torch.arange(len(texts)), owners] = True
    own = torch.arange(len(images))
    for k in (1, 5, 10):
        for found, scores, pairs in (
            (ranks_in(similarity.__getitem__, owners, own, chunk), similarity, positive),
            (ranks_in(similarity.T.__getitem__, own, owners, chunk), similarity.T, positive.T),
        ):
            assert len(found) == len(scores)
            assert ((theirs.recall_at_k(scores, pairs, k) > 0) == (found < k)).all()


def test_against_torchmetrics() -> None:
    torchmetrics = pytest.importorskip("torchmetrics.functional.retrieval")
    images, texts, owners = several(40, 4)
    found = ranks_in((images @ texts.T).__getitem__, torch.arange(40), owners)
    for i, scores in enumerate(images @ texts.T):
        for k in (1, 5, 10):
            assert torchmetrics.retrieval_hit_rate(scores, owners == i, top_k=k).item() == float(found[i] < k)


class Given:
    """Two pictures and three captions whose ranks are known."""

    modalities = ("image", "text")

    def __init__(self) -> None:
        self.of = {
            "image": (torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])),
            "text": (torch.tensor([[0.6, 0.8], [0.0, 1.0], [0.8, 0.6]]), torch.tensor([0, 1, 1])),
        }


def test_median_rank_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks count from 1: pictures have 2 and 1 (so 1.5), captions 2, 1 and 2 (so 2)."""
    model = Given()
    monkeypatch.setattr(EvaluationSet, "embeddings", lambda self, model, name, field=None: model.of[name])
    scores = values(Retrieval(Retrieval.Config()).run(model, [EvaluationSet("s", [])]))  # type: ignore[arg-type]
    assert scores["s/image_to_text/median_rank"] == 1.5
    assert scores["s/text_to_image/median_rank"] == 2.0
    assert scores["s/image_to_text/R@1"] == 50.0
    assert scores["s/text_to_image/R@1"] == pytest.approx(100 / 3)
