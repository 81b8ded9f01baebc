"""An evaluation whose pictures ask for what no score has made, and one whose shards rank 1 lacks; run by
test_distributed: `python -m torch.distributed.run --nproc-per-node 2 distributed_evaluation.py OUT`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from distill_core import distributed
from distill_core.errors import DataError
from distill_core.evaluate import run
from distill_core.evaluate.probes import Knn
from distill_core.evaluate.sets import EvaluationSet, encode_shared


class Model:
    """Embeds an item, a list of numbers, as itself; each modality's items are the samples' keys' lengths."""

    def __init__(self) -> None:
        read = lambda sample, field: [[float(len(sample["__key__"])), 1.0]]  # noqa: E731
        self.device = torch.device("cpu")
        self.augment = {name: SimpleNamespace(read=read) for name in ("a", "b")}

    def encode(self, modality: str, items: Iterable[Any]) -> Tensor:
        return torch.nn.functional.normalize(torch.tensor(list(items)).reshape(-1, 2), dim=1)


class Task:
    """Scores the number of embeddings of `modality`; its pictures ask for those of `b`."""

    def __init__(self, modality: str) -> None:
        self.modality = modality

    def run(self, model: Any, sets: Sequence[EvaluationSet]) -> dict[str, float]:
        return {"n": float(len(sets[0].embeddings(model, self.modality)[0]))}

    def media(self, model: Any, sets: Sequence[EvaluationSet], samples: int) -> Iterator[Any]:
        sets[0].embeddings(model, self.modality)  # it is there
        sets[0].embeddings(model, "b")
        yield from ()


def node(name: str, modality: str) -> SimpleNamespace:
    path = f"evaluate.tasks.{name}"
    return SimpleNamespace(id=name, path=path, source=None, build=lambda: Task(modality))


def learned() -> dict[str, float]:
    """A probe whose train split is encoded by both ranks, a sample each in turn: keys of length 1 to 6, odd or even."""
    samples = [{"__key__": "k" * (i + 1), "__url__": "u", "class": str(i % 2).encode()} for i in range(6)]
    train = [EvaluationSet("train", samples)]
    config = Knn.Config.model_validate_json('{"k": 1, "modality": "a"}')
    return Knn(config).run(Model(), [EvaluationSet("set", samples[:5], others=lambda split: train)])  # type: ignore[arg-type]


def main(out: Path) -> None:
    distributed.start(torch.device("cpu"))
    rank = distributed.rank()
    samples = [{"__key__": "k" * (i + 1), "__url__": "u"} for i in range(3)]
    tasks = [node("one", "a"), node("two", "b")]
    recipe: Any = SimpleNamespace(tasks=tasks, evaluate=SimpleNamespace(split="test"))
    source: Any = SimpleNamespace(samples=lambda split: {"set": samples})
    models: Any = {"student": Model()}
    made = run.evaluate(recipe, models, source, "test", media=2 if rank == 0 else 0)

    def of(split: str) -> dict[str, list[Any]]:
        if rank == 1:
            raise DataError("gone.tar: no such file")
        return {"set": samples}

    source = SimpleNamespace(samples=of)
    missing = run.evaluate(recipe, models, source, "test")
    found = {
        "scores": made.scores,
        "no_media": str(made.no_media) if made.no_media else None,
        "missing": missing.failed,
        "shared": encode_shared(models["student"], "a", [[float(i), 1.0] for i in range(5)]).tolist(),
        "learned": learned(),
    }
    (out / f"rank-{rank}.json").write_text(json.dumps(found))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
