"""`distill embed` and `distill search`: what they write is what the model says, and mistakes are one line."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

import distill_core
from distill_core.cli import main
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_core.run.folder import RunFolder
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
    def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "distill_core.cli", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=run.parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
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


@pytest.mark.slow
def test_embed_writes_the_models_embeddings(run: Path, call: Call, tmp_path: Path) -> None:
    """Catches keys in another order than the rows, a broken picture that ends it, and a wrong tower."""
    made = pictures(tmp_path / "p")
    (tmp_path / "p" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "p" / "notes.txt").write_text("no picture either")
    done = call("embed", str(run), str(tmp_path / "p"), "--out", str(tmp_path / "e.npy"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{tmp_path / 'e.npy'}: 5 embeddings of width 16, float32, L2-normalised",
        f"{tmp_path / 'e.keys.txt'}: their keys, one a line",
    ]
    assert "broken.png" in done.stderr
    keys = (tmp_path / "e.keys.txt").read_text().splitlines()
    assert sorted(keys) == sorted(made)
    expected = distill_core.load(run).encode("image", [made[key] for key in keys])
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "e.npy")), expected)


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert len(list((run / "embeddings").glob("*.npy"))) == 1, "what no search will read again is removed"


@pytest.mark.slow
def test_search_by_a_picture_tells_the_captions(run: Path, call: Call, tmp_path: Path) -> None:
    """What is most like a picture of the collection is that picture."""
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
    assert done.stdout.splitlines()[-1] == f"{out}: the nearest 2 of 6 in {shard}"


@pytest.mark.slow
def test_search_of_texts(run: Path, call: Call, tmp_path: Path) -> None:
    """By a picture. Would catch texts drawn as pictures, and a picture's repr in the place of a text."""
    shard = run.parents[1] / "shards" / "test-000.tar"
    Image.fromarray(np.full((20, 20, 3), 90, dtype=np.uint8)).save(tmp_path / "q.png")
    asked = (str(tmp_path / "q.png"), "--modality", "text", "--in", str(shard), "--out", str(tmp_path / "s.jpg"))
    done = call("search", str(run), *asked, "--json")
    assert done.returncode == 0, done.stderr
    with tarfile.open(shard) as tar:
        texts = {name[:-4]: tar.extractfile(name).read().decode() for name in tar.getnames() if name.endswith(".txt")}  # type: ignore[union-attr]
    model = distill_core.load(run)
    similarity = model.encode("text", list(texts.values())) @ model.encode("image", str(tmp_path / "q.png"))[0]
    found = json.loads(done.stdout)["found"]
    assert [row["key"] for row in found] == [list(texts)[i] for i in similarity.argsort(descending=True).tolist()]
    assert [row["text"] for row in found] == [texts[row["key"]] for row in found]
    with Image.open(tmp_path / "s.jpg") as page:
        assert page.format == "JPEG"


@pytest.mark.slow
def test_a_search_replaces_no_picture_that_it_searches(run: Path, call: Call, tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "p0.png").rename(tmp_path / "search.png")
    before = (tmp_path / "search.png").read_bytes()
    done = call("search", str(run), "x", "--in", str(tmp_path), "--out", str(tmp_path / "search.png"))
    assert done.returncode == 2
    assert "is one of the searched files" in done.stderr
    assert (tmp_path / "search.png").read_bytes() == before


def test_what_is_replaced_is_told(tmp_path: Path) -> None:
    from distill_explore.files import write

    path, keys = tmp_path / "e.npy", tmp_path / "e.keys.txt"
    assert write(path, torch.eye(2), ["a", "b"]) == [str(path), str(keys)]
    assert write(path, torch.eye(2), ["a", "b"]) == [f"{path} (replaced)", f"{keys} (replaced)"]


@pytest.mark.parametrize("words", ["", "ein rötlicher Vogel über dem Fluß " * 9, "一只红色的鸟" * 30])
@pytest.mark.parametrize("count", [1, 2, 5, 12, 50])
def test_a_contact_sheet_is_a_grid(count: int, words: str) -> None:
    """Would catch a column of small pictures, cells of different sizes, and words that run into the next cell."""
    from distill_explore.contact import GAP, SIDE, SearchResult, contact_sheet

    red = Image.new("RGB", (60, 40), "red")
    found = [SearchResult(0.5, "deep/folder/of/some/very/long/names/k.png", words, red)] * count
    page = np.asarray(contact_sheet("a bird", "the nearest", found))
    drawn = (page == (255, 0, 0)).all(-1)
    lefts = np.flatnonzero(np.diff(drawn.any(0).astype(int)) == 1) + 1
    tops = np.flatnonzero(np.diff(drawn.any(1).astype(int)) == 1) + 1
    columns, side = {1: (1, 2 * SIDE), 2: (2, SIDE), 5: (3, SIDE), 12: (4, SIDE), 50: (7, SIDE)}[count]
    assert lefts.tolist() == [GAP + i * (side + GAP) for i in range(columns)]
    assert len(tops) == -(-count // columns)
    assert len(set(np.diff(tops))) <= 1
    assert drawn.sum() == count * side * round(side * 2 / 3)
    below = page[tops[0] :]
    assert all((below[:, left - GAP : left] == 255).all() for left in lefts), "nothing between the columns"
    assert drawn.mean() > 0.35


def test_words_are_shortened() -> None:
    from distill_core.run.showcase import font_of
    from distill_explore.contact import wrap

    font = font_of(11)
    assert wrap("two words", font, 160, 2) == ["two words"]
    assert wrap(" ", font, 160, 2) == []
    for long in ("word " * 50, "字" * 90):
        lines = wrap(long, font, 160, 2)
        assert len(lines) == 2
        assert lines[1].endswith("…")
        assert all(110 < font.getlength(line) <= 160 for line in lines)


def test_items_of_one_key_are_told_apart(run: Path) -> None:
    """Would catch the first caption of a sample in the place of the one that was found."""
    from distill_core.data.shard import Shards
    from distill_core.data.tar_shards import TarShard
    from distill_explore.collection import Samples, places

    keys = ["test-0-1", "test-0-1", "test-0-2", "test-0-2"]
    assert places(keys) == [("test-0-1", 0), ("test-0-1", 1), ("test-0-2", 0), ("test-0-2", 1)]
    reads = SimpleNamespace(decode=lambda sample: [f"{sample['__key__']} {i}" for i in range(2)])
    shards = Samples("test", Shards([TarShard(run.parents[1] / "shards" / "test-000.tar")]))
    wanted = [("test-0-2", 1), ("test-0-1", 0), ("none", 0)]
    found = shards.read(cast(Any, SimpleNamespace(augment={"text": reads})), "text", wanted)
    assert found == {("test-0-2", 1): "test-0-2 1", ("test-0-1", 0): "test-0-1 0"}


@pytest.mark.slow
def test_a_source_is_read_as_in_a_recipe(run: Path, call: Call, tmp_path: Path) -> None:
    """Lists and ${NAME}: would catch an option that a recipe takes and this refuses."""
    source = "{name: webdataset, urls: ['${SHARDS}/train-*.tar'], test: ['${SHARDS}/test-*.tar']}"
    shards = str(run.parents[1] / "shards")
    done = call("embed", str(run), source, "--out", str(tmp_path / "e.npy"), SHARDS=shards)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "e.keys.txt").read_text().split()) == 6


@pytest.mark.slow
def test_a_run_that_cannot_be_written_to_is_searched(run: Path, call: Call, tmp_path: Path) -> None:
    """Somebody else's. Would catch a search that ends because nothing can be kept."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("embeddings"))
    (tmp_path / "run" / "embeddings").write_text("no folder")
    pictures(tmp_path / "p")
    done = call("search", str(tmp_path / "run"), "x", "--in", str(tmp_path / "p"), "--out", str(tmp_path / "s.png"))
    assert done.returncode == 0, done.stderr
    assert "embeds all of it again" in done.stderr
    assert (tmp_path / "s.png").is_file()


def test_a_file_that_cannot_be_read_is_left_out(run: Path, tmp_path: Path) -> None:
    """As a broken picture is."""
    from distill_explore.collection import Folder

    made = pictures(tmp_path / "p")
    folder = Folder(tmp_path / "p")
    gone = sorted(made)[1]
    (tmp_path / "p" / gone).unlink()
    embedded, keys, bad = folder.embed(distill_core.load(run), "image", None, "embedding")
    assert keys == [key for key in sorted(made) if key != gone]
    assert len(embedded) == 4
    assert len(bad) == 1
    assert "cannot be read" in bad[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("embed", "RUN", "nowhere", "--out", "x.npy"), "'nowhere' is neither a folder of images"),
        (("embed", "RUN", "none-*.tar", "--out", "x.npy"), "none-*.tar"),
        (("embed", "RUN", "emoji", "--out", "x.csv"), "ends in none of .npy, .parquet"),
        (("embed", "RUN", "emoji", "--out", "RUN/recipe.yaml/x.npy"), "recipe.yaml is no folder"),
        (("search", "RUN", "x", "--in", "EMPTY", "--out", "x.foo"), "ends in none of .png, .jpg, .jpeg"),
        (("search", "RUN", "x", "--in", "EMPTY", "--out", "EMPTY"), "ends in none of .png, .jpg, .jpeg"),
        (("search", "RUN", "x", "--in", "{name: webdataset, urls: '${NO_SUCH}/a.tar'}"), "variable NO_SUCH is not set"),
        (("search", "RUN", "x", "--in", "{name: webdataset, urls: [a.tar], tests: b.tar}"), "did you mean 'test'?"),
        (("search", "RUN", "x", "--in", "{name: webdatasets}"), "did you mean 'webdataset'?"),
        (("search", "RUN", "x", "--in", "{name: webdataset, urls: a.tar, urls: b.tar}"), "given twice"),
        (("embed", "RUN", "EMPTY", "--out", "x.npy"), "holds no picture"),
        (("embed", "RUN", "EMPTY", "--modality", "imagge", "--out", "x.npy"), "did you mean 'image'?"),
        (("search", "RUN", "x", "--in", "{name: emoji, sizes: 3}"), "sizes"),
        (("search", "RUN", "RUN/recipe.yaml", "--in", "EMPTY"), "is a file, and QUERY is taken as text here; did you"),
        (("search", "missing", "x", "--in", "EMPTY"), "no such run folder"),
    ],
)
def test_mistakes(run: Path, call: Call, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    places = {"RUN": str(run), "EMPTY": str(tmp_path)}
    done = call(*(places.get(argument, argument.replace("RUN/", f"{run}/")) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_what_no_loss_trains_is_not_what_is_searched(
    run: Path, registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures alone, and a loss of class tokens. Would catch neighbours by a projection that stays as it was drawn."""
    alone = [
        "augment.text=null", "backbone.text=null", "fusion=null", "teacher=null", "loss=[{name: koleo}]",
        "backbone.image.dim=8", "train.steps=1", "evaluate.tasks=[]",
    ]  # fmt: skip
    recipe = load_recipe(run.parents[1] / "r.yaml", registry=registry, overrides=alone)
    made = RunFolder.create(tmp_path / "runs", recipe)
    Trainer(recipe, made, quiet=True).run()
    pictures(tmp_path / "pictures")
    capsys.readouterr()
    main(["embed", str(made.path), str(tmp_path / "pictures"), "--out", str(tmp_path / "e.npy")])
    assert "5 class tokens (no loss trains the embedding) of width 16" in capsys.readouterr().out
    embedded = np.load(tmp_path / "e.npy")
    query = str(sorted((tmp_path / "pictures").rglob("*.png"))[0])
    main(["search", str(made.path), query, "--like", "--in", str(tmp_path / "pictures"), "--json",
          "--out", str(tmp_path / "s.png")])  # fmt: skip
    found = [row["similarity"] for row in json.loads(capsys.readouterr().out)["found"]]
    np.testing.assert_allclose(found, sorted(embedded @ embedded[0], reverse=True), atol=1e-4)
