"""What several folders of tests share: the installed plugins, small shards, and a recipe that trains in a second."""

import io
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tars import write_tar

from distill_core.registry import Registry

if not torch.cuda.is_available():
    # kernels run in Triton's interpreter, which is chosen when triton is first imported (by torch, too)
    os.environ["TRITON_INTERPRET"] = "1"

WORDS = ("red", "green", "blue", "small", "large", "round", "old", "quiet", "bird", "boat", "tree", "house", "river")

RECIPE = """\
augment:
  image: {{name: multi_crop, size: 16, local_size: 8, global: 2, local: 1}}
  text: {{name: text_crop, global: 2, local: 1}}
backbone:
  image: {{name: vit, image_size: 16, patch: 8, width: 16, layers: 2, heads: 2, dim: 16}}
  text: {{name: clip_text, width: 16, layers: 1, heads: 2, dim: 16, padding: longest}}
fusion: {{name: cross_attention, heads: 2}}
loss:
  - {{name: contrastive}}
  - {{name: cross_modal_distillation}}
teacher: {{momentum: 0.9}}
data:
  source: {{name: webdataset, urls: "{folder}/train-*.tar", validation: "{folder}/validation-*.tar", \
test: "{folder}/test-*.tar"}}
  batch_size: 4
  workers: 0
  shuffle: 4
train:
  steps: 4
  optimizer: {{name: adamw, lr: 1e-3, eps: 1e-6}}
  schedule: {{name: warmup_cosine, warmup: 1}}
  threads: 1
  log_every: 1
evaluate:
  tasks:
    - {{name: retrieval}}
tracking: null
"""


@pytest.fixture(autouse=True)
def matmul_precision() -> Iterator[None]:
    """A trainer sets it for its process: the next test finds torch's default again."""
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def png(rng: np.random.Generator, size: int = 20) -> bytes:
    """A small picture of noise."""
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def registry() -> Registry:
    """Every installed plugin's components."""
    return Registry.discover()


@pytest.fixture(scope="session")
def write_shards() -> Callable[..., list[Path]]:
    """`write_shards(folder, n_shards, samples_per_shard, **options)` -> the shards' paths.

    Shard i is `folder/PREFIX-00i.tar`; its samples `PREFIX-i-j` hold a noise `png` and a `txt` of three sentences.
    Options: `prefix` ("train"), `seed` (0), `replace` ({(i, j): {extension: bytes}}: what a sample holds instead).
    """

    def write(
        folder: Path,
        n_shards: int,
        samples_per_shard: int,
        *,
        prefix: str = "train",
        seed: int = 0,
        replace: Mapping[tuple[int, int], Mapping[str, bytes]] | None = None,
    ) -> list[Path]:
        rng = np.random.default_rng((seed, len(prefix)))
        paths = []
        for i in range(n_shards):
            samples = []
            for j in range(samples_per_shard):
                text = ". ".join(f"a {' '.join(rng.choice(WORDS, 3))} {i * samples_per_shard + j}" for _ in range(3))
                fields: Mapping[str, bytes] = {"png": png(rng), "txt": text.encode()}
                samples.append((f"{prefix}-{i}-{j}", (replace or {}).get((i, j), fields)))
            paths.append(write_tar(folder / f"{prefix}-{i:03d}.tar", samples))
        return paths

    return write


@pytest.fixture(scope="session")
def recipe_text() -> str:
    """`tiny_recipe`'s text, with {folder} for that of the shards."""
    return RECIPE


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory, write_shards: Callable[..., list[Path]]) -> str:
    """`tiny_recipe`'s text, with two shards of six samples a split (for `small_runs.parse`)."""
    folder = tmp_path_factory.mktemp("small")
    for prefix in ("train", "validation", "test"):
        write_shards(folder, 2, 6, prefix=prefix)
    return RECIPE.format(folder=folder)


@pytest.fixture
def tiny_recipe(tmp_path: Path, write_shards: Callable[..., list[Path]]) -> Path:
    """`tmp_path/tiny.yaml`: COSMOS on 16 px, 4 steps of 4 samples on the CPU, without a tracker.

    Its shards lie in `tmp_path/shards`: 3 of 4 samples to train on, one of 4 to validate and one of 4 to test.
    """
    folder = tmp_path / "shards"
    write_shards(folder, 3, 4)
    write_shards(folder, 1, 4, prefix="validation")
    write_shards(folder, 1, 4, prefix="test")
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(folder=folder), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def install_plugin() -> Callable[[Path, Path], Path]:
    """`install_plugin(project, site)` leaves in `site` what an installer would, and returns it.

    The packages of the folder `project` are copied, and its pyproject.toml's name, version and entry points become a
    .dist-info. No build backend is needed, so that the tests run on a machine that has none and reaches no index.
    """

    def install(project: Path, site: Path) -> Path:
        table = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for package in project.iterdir():
            if (package / "__init__.py").is_file():
                shutil.copytree(package, site / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        info = site / f"{table['name'].replace('-', '_')}-{table['version']}.dist-info"
        info.mkdir(parents=True)
        head = f"Metadata-Version: 2.1\nName: {table['name']}\nVersion: {table['version']}\n"
        (info / "METADATA").write_text(head, encoding="utf-8")
        lines = [
            line
            for group, points in table["entry-points"].items()
            for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return site

    return install
