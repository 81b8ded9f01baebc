"""A stall is named: in a component, in a data worker, and of two ranks the one for which the other waits."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distill_core.batch import Sample, View
from distill_core.interfaces import Loss
from distill_core.outputs import Outputs
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Entry, Registry
from distill_core.run import stalls
from distill_core.run.folder import RunFolder
from distill_core.run.stalls import StallWatch
from distill_core.system import distributed
from distill_core.system.peers import Peers
from distill_core.train import Trainer
from distill_vl.captions import CaptionAugmentation, CaptionConfig


class Sleeps(Loss):
    """At step 1 (from 0), until a file is there that somebody makes once the stall is named."""

    name = "sleeps"
    until: ClassVar[Path]

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if outputs.progress.step == 1:
            wait_for(self.until)
        return {"sleeps": outputs.student["image"].embedding.mean()}, {}


class SleepsReading(CaptionAugmentation):
    """In the worker, at its sixth sample."""

    name = "sleeps_reading"
    Config = CaptionConfig
    until: ClassVar[Path]
    made = 0

    @classmethod
    def roles(cls, config: CaptionConfig) -> tuple[str, ...]:
        return ("global",)

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        self.made += 1
        if self.made == 6:
            wait_for(self.until)
        return [View("a bird")]


def wait_for(path: Path) -> None:
    end = time.monotonic() + 400
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


def let_go(stack: Path, inside: str, path: Path) -> None:
    """Make `path` once `stack` names the function in which the run is stuck."""
    end = time.monotonic() + 300
    while time.monotonic() < end and not (stack.exists() and inside in stack.read_text()):
        time.sleep(0.05)
    path.touch()


Train = Callable[..., tuple[str, str]]


@pytest.fixture
def train(tiny_recipe: Path, registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Train:
    """What a run of these overrides said, and the stack that it wrote, with `inside` in it."""

    def make(inside: str, *overrides: str) -> tuple[str, str]:
        Sleeps.until = SleepsReading.until = tmp_path / "go"
        mine = Registry([*registry.entries.values(), *(Entry(cls, "mine", "mine") for cls in (Sleeps, SleepsReading))])
        settings = ["fusion=null", "teacher=null", "evaluate=null", "train.stall_warning=1", *overrides]
        recipe = load_recipe(tiny_recipe, registry=mine, overrides=settings)
        folder = RunFolder.create(tmp_path / "runs", recipe)
        stack = folder.path / "stalls" / "rank-0.txt"
        thread = threading.Thread(target=let_go, args=(stack, inside, tmp_path / "go"))
        thread.start()
        trainer = Trainer(recipe, folder, quiet=True)
        trainer.run()
        thread.join()
        return capsys.readouterr().err, stack.read_text()

    return make


@pytest.mark.slow
def test_a_component(train: Train) -> None:
    """Would catch a watch that stalls with what it watches, and a place in a library in place of the component's."""
    said, stack = train("wait_for", "loss=[{name: sleeps}]")
    where = r"it is in wait_for \(\S+test_stalls\.py:\d+\)\. Its stack: \S+rank-0\.txt"
    assert re.search(rf"warning: no step for \d+ s after step 1: {where}", said), said
    assert "s after step 1" in stack
    assert "in forward" in stack


@pytest.mark.slow
def test_a_data_worker(train: Train) -> None:
    """Whose stack is another process's. Would catch a worker that the signal ends, and files that stay behind."""
    said, stack = train(
        "wait_for", "loss=[{name: contrastive}]", "augment.text={name: sleeps_reading}", "data.workers=1"
    )
    assert re.search(r"no step for \d+ s after step 1", said)
    assert re.search(r"data worker 0 \(pid \d+\) is reading \S+; the data workers:", stack)
    assert "in train_views" in stack


@pytest.mark.slow
def test_a_watch_that_has_nothing_to_say(tmp_path: Path) -> None:
    """Would catch a warning of steps that are slow but come, and a warning that does not double its time."""
    said: list[str] = []
    watch = StallWatch(tmp_path, 4.0, said.append, lambda: "")
    with watch.running():
        for step in range(10):
            time.sleep(0.5)
            watch.step(step)
    assert said == []
    assert not (tmp_path / "stalls").exists()
    watch = StallWatch(tmp_path, 0.2, said.append, lambda: "")
    with watch.running():
        end = time.monotonic() + 200
        while len(said) < 3 and time.monotonic() < end:
            time.sleep(0.02)
    assert [re.findall(r"no step for (\S+) s", line) for line in said[:3]] == [["0.2"], ["0.4"], ["0.8"]]


def test_torch_is_not_where_a_stall_is(tmp_path: Path) -> None:
    """Would catch a line that names torch's own file for a component that is stuck in it."""
    said: list[str] = []
    watch = StallWatch(tmp_path, 0.1, said.append, lambda: "")

    class Stuck(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            end = time.monotonic() + 200
            while not said and time.monotonic() < end:
                time.sleep(0.02)
            return x

    with watch.running():
        torch.nn.Sequential(Stuck())(torch.zeros(1))
    assert "it is in test_torch_is_not_where_a_stall_is.<locals>.Stuck.forward" in said[0]


@pytest.mark.parametrize("other", ["waits", "is_busy", "does_not_answer"])
def test_of_ranks_that_wait_one_says_for_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    """Two ranks, of which this one waits in a collective. Would catch silence where both wait or the other is frozen,
    and a line beside that of a rank that is named already."""
    monkeypatch.setattr(stalls, "SECONDS_TO_ANSWER", 0.5)
    store = dist.TCPStore("localhost", 0, 2, is_master=True, wait_for_workers=False)
    peers, others = Peers(store, 0, 2, 4), Peers(store.clone(), 1, 2, 4)
    monkeypatch.setattr(distributed, "peers", lambda: peers)
    monkeypatch.setattr(stalls, "_place", lambda thread: ("in all_reduce (a.py:1)", True))
    said: list[str] = []
    watch = StallWatch(tmp_path, 30.0, said.append, lambda: "")
    if other != "does_not_answer":
        others.publish("stall/7/30", json.dumps(["in all_gather (b.py:2)", other == "waits"]))
    watch._report(0, 7, 30.0)
    watch._report(0, 7, 30.0)
    expected = {
        "waits": ["all ranks wait for one another: rank 0 is in all_reduce (a.py:1); rank 1 is in all_gather (b.py:2)"],
        "does_not_answer": ["no answer from rank 1 ("],
        "is_busy": [],
    }
    assert len(said) == len(expected[other]), said
    assert all(part in line for part, line in zip(expected[other], said, strict=True))
    peers.close(), others.close()
