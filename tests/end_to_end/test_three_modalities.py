"""Images, texts and speech, and frames that share the images' tower: everything that a run can be asked for."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder

pytestmark = pytest.mark.slow

RECIPE = """\
augment:
  image: {{name: random_crop, size: 16}}
  text: {{name: caption}}
  speech: {{name: log_mel, seconds: 0.2, mels: 16, rate: 8000}}
  frames: {{name: random_crop, size: 16, fields: [frame.png]}}
backbone:
  image: {{name: vit, image_size: 16, patch: 8, width: 16, layers: 1, heads: 2, dim: 16}}
  text: {{name: clip_text, width: 16, layers: 1, heads: 2, dim: 16, padding: longest}}
  speech: {{name: speech_transformer, mels: 16, frames: 20, patch: 5, width: 16, layers: 1, heads: 2, dim: 16}}
  frames: {{same: image}}
fusion: {{name: cross_attention, heads: 2}}
fusions: {{heard: {{name: mean_pooling, modalities: [speech, text]}}}}
loss:
  - {{name: clip}}
  - {{name: clip, id: image_speech, modalities: [image, speech]}}
  - {{name: clip, id: speech_text, modalities: [speech, text]}}
  - {{name: clip, id: frames_text, modalities: [frames, text]}}
  - {{name: cross_modal_distillation}}
teacher: {{momentum: 0.9}}
data:
  source: {{name: webdataset, urls: "{folder}/train.tar", validation: "{folder}/test.tar", test: "{folder}/test.tar"}}
  optional: [speech]
  batch_size: 4
  workers: 0
  shuffle: 4
train: {{steps: 4, threads: 1, log_every: 1, checkpoint: {{every: 2, keep: 3}}}}
evaluate:
  tasks:
    - {{name: retrieval, modalities: [image, text]}}
    - {{name: retrieval, id: spoken, modalities: [speech, image]}}
    - {{name: retrieval, id: framed, modalities: [frames, text]}}
    - {{name: knn, modality: speech, learn: null, label: cls, k: 1}}
tracking: null
"""


def picture(rng: np.random.Generator) -> bytes:
    """A PNG of noise."""
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def recording(rng: np.random.Generator) -> bytes:
    """A wav of noise."""
    file = io.BytesIO()
    soundfile.write(file, rng.standard_normal(2400).clip(-3, 3) / 4, 8000, format="WAV")
    return file.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, and shards in which every fifth sample has no recording."""
    folder, rng = tmp_path_factory.mktemp("three"), np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 10)):
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            for i in range(count):
                sample = {"png": picture(rng), "frame.png": picture(rng), "txt": f"thing {i} of {split}".encode()}
                sample |= {"cls": b"ab"[i % 2 : i % 2 + 1], **({} if i % 5 == 4 else {"wav": recording(rng)})}
                for field, data in sample.items():
                    entry = tarfile.TarInfo(f"{split}-{i}.{field}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    (folder / "three.yaml").write_text(RECIPE.format(folder=folder), encoding="utf-8")
    return folder


def distill(*arguments: object, ranks: int = 1) -> str:
    """The output of a command. Raises AssertionError where it fails."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launch, "-m", "distill_core.cli", *map(str, arguments)],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    distill("run", place / "three.yaml", "--runs", place / "runs")
    return place / "runs" / "three"


def tensors(run: Path, step: str = "last") -> dict[str, torch.Tensor]:
    return dict(Checkpoints(run).read(step)["objective"])


def test_it_trains_and_scores_every_pair(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    names = {(score["side"], score["task"], score["name"]) for score in report["scores"]}
    for side in ("student", "teacher"):
        assert {(side, "retrieval", "M"), (side, "spoken", "M"), (side, "framed", "M")} <= names
        assert any(name[:2] == (side, "knn") for name in names)
    assert report["absences"]["speech"] > 0
    state = tensors(run)
    for name in ("backbone.", "teacher.default.backbone."):
        assert torch.equal(state[f"{name}image.proj"], state[f"{name}frames.proj"])


def test_it_resumes_bit_for_bit(run: Path, place: Path) -> None:
    folder = place / "again"
    shutil.copytree(run, folder)
    (folder / "checkpoints" / "step-00000004.pt").unlink()
    distill("resume", folder)
    expected, resumed = tensors(run), tensors(folder)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(x, resumed[name]) for name, x in expected.items())


@pytest.mark.parametrize("own", ["", "[proj]"])
def test_two_ranks_train_what_one_does(own: str, place: Path) -> None:
    """A batch of 8 on one rank, of 4 on each of two: the shared tower's gradient is one sum of both modalities'.
    Catches a shared tower that is split, or averaged, twice."""
    frames = f"{{same: image{f', own: {own}' if own else ''}}}"
    changes = (
        "evaluate=null",
        f"backbone.frames={frames}",
        "train.optimizer={name: adamw, eps: 1e-3}",
        "train.steps=2",
    )
    settings = [word for change in changes for word in ("--set", change)]
    where = place / f"ranks{len(own)}"
    distill("run", place / "three.yaml", "--runs", where / "one", *settings, "--set", "data.batch_size=8")
    distill("run", place / "three.yaml", "--runs", where / "two", *settings, ranks=2)
    one, two = tensors(where / "one" / "three"), tensors(where / "two" / "three")
    assert one.keys() == two.keys()
    for name, x in one.items():
        torch.testing.assert_close(two[name], x, rtol=1e-4, atol=2e-5, msg=name)
    rows = [[row for row in RunFolder(where / n / "three").rows() if "terms" in row] for n in ("one", "two")]
    terms = [of_run[0]["terms"] for of_run in rows]
    assert terms[0] == pytest.approx(terms[1], rel=1e-4)


def test_it_is_embedded_searched_exported_planned(run: Path, place: Path, tmp_path: Path) -> None:
    for modality in ("image", "text", "speech", "frames"):
        out = tmp_path / f"{modality}.npy"
        distill("embed", run, place / "test.tar", "--modality", modality, "--out", out)
        assert np.load(out).shape == (8 if modality == "speech" else 10, 16)
    wav = tmp_path / "heard.wav"
    soundfile.write(wav, np.zeros(1600), 8000)
    source = ("--in", place / "test.tar", "--out", tmp_path / "s.png")
    assert "test-" in distill("search", run, wav, *source, "--by", "speech", "--json")
    with pytest.raises(AssertionError, match="--by: QUERY may be of text, speech, frames"):
        distill("search", run, "a thing", *source)
    said = distill("export", run, "--to", "open_clip", "--out", tmp_path / "clip")
    assert "backbone.speech (speech_transformer)" in said
    planned = distill("plan", place / "three.yaml", "--devices", "1")
    assert "speech" in planned
    assert "same: image" in distill("show", place / "three.yaml")
    assert "R@1" in distill("eval", run, "--full", "--task", "{name: retrieval, modalities: [speech, text]}")
