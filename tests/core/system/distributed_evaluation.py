"""An evaluation whose pictures need embeddings that `run` did not compute, one whose shards rank 1 lacks, and one
whose second sample rank 1 cannot read; run by test_distributed:
`python -m torch.distributed.run --nproc-per-node 2 distributed_evaluation.py OUT`.
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

from distill_composition.task import Composition
from distill_core.errors import DataError, UserError
from distill_core.evaluate import run
from distill_core.evaluate.cache import EmbeddingCache
from distill_core.evaluate.score import Score
from distill_core.evaluate.sets import EvaluationSet, encode_shared
from distill_core.plan import Plan
from distill_core.system import distributed
from distill_segment.task import Segmentation
from distill_tasks.probes import Knn
from distill_tasks.zero_shot import ZeroShot
from distill_vl import example

PLAN = Plan({})


class Model:
    """Embeds an item, a list of numbers, as itself; each modality's items are the samples' keys' lengths."""

    def __init__(self) -> None:
        decode = lambda sample, field: ["x"] if field == "class" else [[float(len(sample["__key__"])), 1.0]]  # noqa: E731
        self.device = torch.device("cpu")
        self.augment = {name: SimpleNamespace(decode=decode) for name in ("a", "b")}

    def default_features(self, modality: str) -> str:
        return "embedding"

    def encode(self, modality: str, items: Iterable[Any], *, features: str = "embedding") -> Tensor:
        if modality == "broken" and distributed.rank() == 1:
            raise UserError("out of order")
        return torch.nn.functional.normalize(torch.tensor(list(items)).reshape(-1, 2), dim=1)


class Task:
    """Scores the number of embeddings of `modality`; its pictures ask for those of `b`."""

    def __init__(self, modality: str) -> None:
        self.modality = modality

    def run(self, model: Any, sets: Sequence[EvaluationSet]) -> list[Score]:
        return [Score(None, "n", float(len(sets[0].embeddings(model, self.modality)[0])))]

    def note(self) -> str:
        return ""

    def media(self, model: Any, sets: Sequence[EvaluationSet], samples: int) -> Iterator[Any]:
        sets[0].embeddings(model, self.modality)  # it is there
        sets[0].embeddings(model, "b")
        yield from ()


def node(name: str, modality: str) -> SimpleNamespace:
    path = f"evaluate.tasks.{name}"
    return SimpleNamespace(id=name, path=path, config=SimpleNamespace(source=None), build=lambda: Task(modality))


def learned() -> dict[str, float]:
    """A probe whose train split is encoded by both ranks, a sample each in turn: keys of length 1 to 6, odd or even."""
    samples = [{"__key__": "k" * (i + 1), "__url__": "u", "class": str(i % 2).encode()} for i in range(6)]
    train = [EvaluationSet("train", samples)]
    config = Knn.Config.model_validate_json('{"k": 1, "modality": "a"}')
    scores = Knn(config).run(Model(), [EvaluationSet("set", samples[:5], open_split=lambda split: train)])  # type: ignore[arg-type]
    return {score.name: score.value for score in scores if score.set is None}


class Cut:
    """Samples of which rank 1 cannot read the second."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield {"__key__": "k", "__url__": "u", "class": b"x"}
        if distributed.rank() == 1:
            raise DataError("cut.tar: ends too early")
        yield {"__key__": "kk", "__url__": "u", "class": b"x"}


class Late:
    """A task that rank 1 gives up behind all that ranks do together."""

    def run(self, model: Any, sets: Sequence[EvaluationSet]) -> list[Score]:
        sets[0].embeddings(model, "a")
        if distributed.rank() == 1:
            raise DataError("no sample is left")
        return []


def unread(out: Path) -> run.EvaluationResult:
    """Tasks of which each reads a cut source in another place (labels, prompts, samples), and one that is sound."""
    options = {"learn": None, "modality": "a"}
    tasks: list[Any] = [
        Knn(Knn.Config(**options)),
        ZeroShot(ZeroShot.Config(modalities=("a", "b"))),
        Task("a"),
        Late(),
        Task("a"),
    ]
    sound = [{"__key__": "k" * (i + 1), "__url__": "u"} for i in range(3)]
    own: Any = SimpleNamespace(samples=lambda split: {"set": sound}, prepare=lambda: None)
    source: Any = SimpleNamespace(
        build=lambda: own, dump=lambda: {}, cls=SimpleNamespace(splits=lambda c: None), config=0
    )
    nodes = [
        SimpleNamespace(
            id=str(i),
            path=f"tasks.{i}",
            config=SimpleNamespace(source=source if i > 2 else None),
            build=lambda task=task: task,
        )
        for i, task in enumerate(tasks)
    ]
    recipe: Any = SimpleNamespace(evaluate=SimpleNamespace(split="test", tasks=nodes), heads={}, plan=PLAN)
    shared: Any = SimpleNamespace(samples=lambda split: {"set": Cut()})
    cache = EmbeddingCache(out, lambda model, modality: ("m", "m"), print)
    return run.evaluate(recipe, {"student": Model()}, shared, "test", cache=cache)  # type: ignore[dict-item]


def first_unread() -> list[str]:
    """Tasks that look at the first sample before ranks do anything together, where rank 1 cannot read it."""

    class CutAtOnce:
        def __iter__(self) -> Iterator[dict[str, Any]]:
            if distributed.rank() == 1:
                raise DataError("cut.tar: ends at once")
            captions = json.dumps({"caption_0": "a", "caption_1": "b"}).encode()
            yield {"__key__": "k", "__url__": "u", "classes.txt": b"x\ny", "image_0": b"", "json": captions}

    tasks = [Segmentation(Segmentation.Config()), Composition(Composition.Config())]
    nodes = [
        SimpleNamespace(id=task.name, path="tasks", config=SimpleNamespace(source=None), build=lambda task=task: task)
        for task in tasks
    ]
    recipe: Any = SimpleNamespace(evaluate=SimpleNamespace(split="test", tasks=nodes), heads={}, plan=PLAN)
    shared: Any = SimpleNamespace(samples=lambda split: {"set": CutAtOnce()})
    return run.evaluate(recipe, {"student": example.model()}, shared, "test").failed


def refused() -> str:
    """What each rank says where rank 1 cannot encode its share."""
    try:
        encode_shared(Model(), "broken", [[0.0, 1.0]] * 3)  # type: ignore[arg-type]
    except UserError as error:
        return str(error)
    return "nothing"


def main(out: Path) -> None:
    distributed.start(torch.device("cpu"))
    rank = distributed.rank()
    samples = [{"__key__": "k" * (i + 1), "__url__": "u"} for i in range(3)]
    tasks = [node("one", "a"), node("two", "b")]
    recipe: Any = SimpleNamespace(evaluate=SimpleNamespace(split="test", tasks=tasks), heads={}, plan=PLAN)
    source: Any = SimpleNamespace(samples=lambda split: {"set": samples})
    models: Any = {"student": Model()}
    made = run.evaluate(recipe, models, source, "test", media=2 if rank == 0 else 0)

    def of(split: str) -> dict[str, list[Any]]:
        if rank == 1:
            raise DataError("gone.tar: no such file")
        return {"set": samples}

    source = SimpleNamespace(samples=of)
    missing = run.evaluate(recipe, models, source, "test")
    cut = unread(out / f"rank-{rank}")
    found = {
        "scores": made.values,
        "no_media": str(made.no_media) if made.no_media else None,
        "missing": missing.failed,
        "shared": encode_shared(models["student"], "a", [[float(i), 1.0] for i in range(5)]).tolist(),
        "learned": learned(),
        "unread": [cut.failed, cut.values],
        "refused": refused(),
        "first": first_unread(),
    }
    (out / f"rank-{rank}.json").write_text(json.dumps(found))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
