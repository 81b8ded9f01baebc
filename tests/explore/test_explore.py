"""`distill embed` and `distill search`: what they write is what the model says, and mistakes are one line."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import distill_core
from distill_core.registry import Registry
from distill_core.resolve import load_recipe
from distill_core.tracking import RunFolder
from distill_core.train import Trainer

Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, registry: Registry, write_shards: Callable[..., list[Path]]) -> Path:
    """A run of two steps, beside its shards."""
    from tests.conftest import RECIPE

    folder = tmp_path_factory.mktemp("explore")
    for prefix in ("train", "validation", "test"):
        write_shards(folder / "shards", 1, 6, prefix=prefix)
    (folder / "r.yaml").write_text(RECIPE.format(folder=folder / "shards"))
    recipe = load_recipe(folder / "r.yaml", registry=registry, overrides=["train.steps=2", "evaluate.tasks=[]"])
    made = RunFolder.create(folder / "runs", recipe)
    Trainer(recipe, made, quiet=True).run()
    return made.path


@pytest.fixture(scope="module")
def call(run: Path) -> Call:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "distill_core.cli", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=run.parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )

    return command


def pictures(folder: Path, count: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    made = {}
    for i in range(count):
        pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        path = folder / ("deep" if i % 2 else ".") / f"p{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        made[path.relative_to(folder).as_posix()] = pixels
    return made


def test_embed_writes_the_models_embeddings(run: Path, call: Call, tmp_path: Path) -> None:
    """Catches keys in another order than the rows, a broken picture that ends it, and a wrong tower."""
    made = pictures(tmp_path / "p")
    (tmp_path / "p" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "p" / "notes.txt").write_text("no picture either")
    done = call("embed", str(run), str(tmp_path / "p"), "--out", str(tmp_path / "e.npy"))
    assert done.returncode == 0, done.stderr
    assert "5 embeddings of width 16" in done.stdout
    assert "broken.png" in done.stderr
    keys = (tmp_path / "e.keys.txt").read_text().splitlines()
    assert sorted(keys) == sorted(made)
    expected = distill_core.load(run).encode("image", [made[key] for key in keys])
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "e.npy")), expected)


def test_embed_texts_of_shards(run: Path, call: Call, tmp_path: Path) -> None:
    """The second modality, of a source's split, by wildcard or as a recipe names it."""
    shards = run.parents[1] / "shards"
    source = f"{{name: webdataset, urls: '{shards}/train-*.tar', test: '{shards}/test-*.tar'}}"
    for name, where in (("a", f"{shards}/test-*.tar"), ("b", source)):
        out = str(tmp_path / f"{name}.npy")
        done = call("embed", str(run), where, "--modality", "text", "--teacher", "--out", out)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.keys.txt").read_text().split() == [f"test-0-{j}" for j in range(6)]
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))


def test_search_finds_the_nearest_and_draws_them(run: Path, call: Call, tmp_path: Path) -> None:
    made = pictures(tmp_path / "p")
    sheet = tmp_path / "out" / "sheet.png"
    command = (
        "search",
        str(run),
        "a red bird",
        "--in",
        str(tmp_path / "p"),
        "--top",
        "3",
        "--out",
        str(sheet),
        "--json",
    )
    done = call(*command)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    model = distill_core.load(run)
    keys = sorted(made)
    similarity = model.encode("image", [made[key] for key in keys]) @ model.encode("text", "a red bird")[0]
    order = similarity.argsort(descending=True)[:3].tolist()
    assert [row["key"] for row in answer["found"]] == [keys[i] for i in order]
    assert [row["similarity"] for row in answer["found"]] == pytest.approx(similarity[order].tolist(), abs=1e-4)
    assert Image.open(io.BytesIO(sheet.read_bytes())).width > 300
    kept = list((run / "embeddings").glob("*.npy"))
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert json.loads(call(*command).stdout) == answer
    assert {path: path.stat().st_mtime_ns for path in (run / "embeddings").glob("*.npy")} == before
    (tmp_path / "p" / keys[order[0]]).unlink()
    again = json.loads(call(*command).stdout)
    assert keys[order[0]] not in {row["key"] for row in again["found"]}, "a stale cache"


def test_search_by_a_picture_tells_the_captions(run: Path, call: Call, tmp_path: Path) -> None:
    """What is most like a picture of the collection is that picture."""
    import tarfile

    shard = run.parents[1] / "shards" / "test-000.tar"
    with tarfile.open(shard) as tar:
        file = tar.extractfile("test-0-4.png")
        assert file is not None
        (tmp_path / "q.png").write_bytes(file.read())
    out = str(tmp_path / "s.png")
    done = call("search", str(run), str(tmp_path / "q.png"), "--like", "--in", str(shard), "--top", "2", "--out", out)
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0].split()
    assert first[:3] == ["1", "1.000", "test-0-4"]
    assert first[3] == "a", "the caption stands beside it"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("embed", "RUN", "nowhere", "--out", "x.npy"), "'nowhere' is no folder of pictures"),
        (("embed", "RUN", "none-*.tar", "--out", "x.npy"), "none-*.tar"),
        (("embed", "RUN", "emoji", "--out", "x.csv"), "neither in .npy nor in .parquet"),
        (("embed", "RUN", "EMPTY", "--out", "x.npy"), "holds no picture"),
        (("embed", "RUN", "EMPTY", "--modality", "imagge", "--out", "x.npy"), "did you mean 'image'?"),
        (("search", "RUN", "x", "--in", "{name: emoji, sizes: 3}"), "sizes"),
        (("search", "missing", "x", "--in", "EMPTY"), "not a run folder"),
    ],
)
def test_mistakes(run: Path, call: Call, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    places = {"RUN": str(run), "EMPTY": str(tmp_path)}
    done = call(*(places.get(argument, argument) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
