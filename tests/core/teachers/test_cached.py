"""Caches of teachers: a run that reads one is the run that encodes, and one that does not fit is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill_core import BadSample, Loss, LossConfig, Needs, Outputs, Plan, Sample, View
from distill_core.errors import DataError, RecipeErrors, UserError
from distill_core.recipe.resolve import load_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Entry, Registry
from distill_core.run import caches
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_core.train import Trainer
from distill_vl.multi_crop import MultiCrop, MultiCropConfig

VIT = "{name: vit, image_size: 16, patch: 8, width: 16, layers: 2, heads: 2, dim: 16}"
TEXT = "{name: clip_text, width: 16, layers: 1, heads: 2, dim: 16, padding: longest}"
OPTIONS = [
    "evaluate=null", "teacher=null", "loss.1={name: cross_modal_distillation, teacher: big}",
    "train.epochs=2", "train.steps=null",
]  # fmt: skip


class Tokens(Loss):
    """How far the student's embeddings are from the mean of some of the teacher's tokens."""

    name = "tokens"
    Config = LossConfig

    @classmethod
    def needs(cls, config: Any, plan: Plan) -> Needs:
        return Needs(student=("image", "text"), teacher={"big": {"image": (1,), "text": (0, 1)}})

    def forward(self, outputs: Outputs) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        total = torch.zeros(())
        for m, view in (("image", 1), ("text", 0), ("text", 1)):
            teacher = outputs.teacher["big"][m]
            tokens = teacher.tokens[view]
            real = teacher.masks.get(view, torch.ones(tokens.shape[:2], dtype=torch.bool))[..., None]
            mean = (tokens * real).sum(1) / real.sum(1)
            total = total + (outputs.student[m].pooled[view] - mean).square().mean()
        return {"tokens": total}, {}


class Picky(MultiCrop):
    """An augmentation that cannot use one of the samples."""

    name = "picky"
    Config = MultiCropConfig

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        if sample["__key__"] == "train-1-2":
            raise BadSample("not this one")
        return super().train_views(sample, rng)


class Runs:
    """Runs of the tiny recipe with a frozen teacher `big`, whose cache is `folder`."""

    def __init__(self, file: Path, registry: Registry, folder: Path) -> None:
        self.file, self.registry, self.folder = file, registry, folder
        self.cache = folder / "cache"
        self.made: list[Trainer] = []
        self.source = folder / "runs" / "source"
        self.train("name=source", "train.steps=1", "train.epochs=null", "seed=7", "loss.1=null", "teachers=null")

    def recipe(self, *overrides: str, cached: bool = False, file: Path | None = None) -> Recipe:
        weights = f"weights: [{{name: state_dict, source: '{self.source}', to: backbone}}]"
        big = f"teachers={{big: {{name: frozen, backbone: {{image: {VIT}, text: {TEXT}}}, {weights}}}}}"
        cache = [f"teachers.big.cache={self.cache}"] if cached else []
        options = [*OPTIONS, big, *cache] if file is None else ["evaluate=null", *cache]
        return load_recipe(file or self.file, registry=self.registry, overrides=[*options, *overrides])

    def trainer(self, *overrides: str, cached: bool = False, resume: Path | None = None) -> Trainer:
        recipe = self.recipe(*overrides, cached=cached, file=resume and resume / "recipe.yaml")
        folder = RunFolder(resume) if resume is not None else RunFolder.create(self.folder / "runs", recipe)
        self.made.append(Trainer(recipe, folder, resume="last" if resume is not None else None, quiet=True))
        return self.made[-1]

    def train(self, *overrides: str, **options: Any) -> dict[int, float]:
        """Step -> its last term."""
        trainer = self.trainer(*overrides, **options)
        trainer.run()
        return losses(trainer.folder.path)

    def teach(self, *overrides: str, passes: int | None = None) -> list[str]:
        return caches.write(self.recipe(*overrides, cached=True), passes, quiet=True)

    def close(self) -> None:
        for trainer in self.made:
            trainer.loader.close()
            trainer.folder.unlock()


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: list(row["terms"].values())[-1] for row in rows if "terms" in row}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def runs(tiny_recipe: Path, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    monkeypatch.setattr(caches, "ROWS", 5)  # which divides neither a batch nor a pass
    made = Runs(tiny_recipe, registry, tmp_path)
    yield made
    made.close()


def close(ours: dict[int, float], theirs: dict[int, float]) -> None:
    assert ours.keys() == theirs.keys()
    assert len(set(theirs.values())) > 1
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_a_run_with_the_cache_is_the_run_with_the_teacher(runs: Runs) -> None:
    """Over two shuffled passes, with workers and without, and continued by the one from the other's checkpoint.
    Catches rows of another sample, view or pass, a teacher that is built all the same, a resume that begins anew."""
    live = runs.train("name=live")
    assert len(live) == 6
    lines = runs.teach()
    assert "30 positions" not in lines[-1]
    assert "25 positions of the teacher 'big' (5 chunks written" in lines[-1]
    cached = runs.trainer("name=cached", cached=True)
    assert list(cached.objective.teachers["big"].parameters()) == []
    assert not cached.objective.teachers["big"].towers()
    cached.run()
    close(losses(cached.folder.path), live)
    close(runs.train("name=workers", "data.workers=2", cached=True), live)
    half = runs.trainer("name=half", "train.checkpoint.every=3", "train.checkpoint.keep=9")
    half.run()
    Checkpoints(half.folder.path).path(6).unlink()
    resumed = runs.trainer(cached=True, resume=half.folder.path)
    assert resumed.state.step == 3
    resumed.run()
    close(losses(half.folder.path), live)


def test_views_of_several_modalities_at_once(runs: Runs) -> None:
    """The cached run sees the student's views, which a joint augmentation changes. Catches a cache of the modalities'
    own draws, and one that does for both."""
    joint = ("augment.image+text={name: caption_aware_flips, words: [[a, the]], exchange: true}",)
    live = runs.train("name=live", *joint)
    assert live != runs.train("name=own")
    runs.teach(*joint)
    close(runs.train("name=cached", *joint, cached=True), live)
    with pytest.raises(UserError, match=r"augment\.image\+text"):
        runs.trainer("name=other", cached=True)


def test_what_was_stopped_continues_to_the_same_bytes(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a half-written chunk that counts as one, and chunks that depend on where the writer began."""
    runs.teach(passes=3)
    whole, runs.cache = files(runs.cache), runs.folder / "again"
    write, written = caches.write_bytes, []

    def killed(path: Path, data: bytes) -> None:
        if len(written) == 3:
            path.with_name(f".{path.name}.4711").write_bytes(data[:7])
            raise KeyboardInterrupt
        written.append(path)
        write(path, data)

    monkeypatch.setattr(caches, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        runs.teach(passes=3)
    with pytest.raises(UserError, match=r"has seen 0 of the 24 samples of this run. Go on writing: .* --passes 2"):
        runs.trainer("name=early", cached=True)
    monkeypatch.setattr(caches, "write_bytes", write)
    stamps = {path: path.stat().st_mtime_ns for path in written}
    lines = runs.teach(passes=3)
    assert "5 chunks written, 3 chunks already there" in lines[-1]
    assert {path: path.stat().st_mtime_ns for path in written} == stamps
    assert files(runs.cache) == whole


def test_more_passes_are_added(runs: Runs) -> None:
    runs.teach(passes=1)
    with pytest.raises(UserError, match="has seen 15 of the 24 samples of this run"):
        runs.trainer("name=long", cached=True)
    assert "2 chunks written, 3 chunks already there" in runs.teach(passes=2)[-1]
    runs.trainer("name=long", cached=True)


def test_bad_samples_and_lists_that_name_a_shard_twice(
    runs: Runs, write_shards: Callable[..., list[Path]], tmp_path: Path
) -> None:
    """Substitutes, weights and a sample that comes twice in a pass are read as they were written."""
    folder = tmp_path / "more"
    write_shards(folder, 2, 6, replace={(0, 2): {"png": b"no picture", "txt": b"a bird"}})
    urls = [f"{folder}/train-000.tar", f"{folder}/train-001.tar", f"{folder}/train-000.tar"]
    options = [
        f"data.source={{name: webdataset, urls: {json.dumps(urls)}}}", "data.max_bad_fraction=0.5", "data.shuffle=7",
    ]  # fmt: skip
    live = runs.train("name=live", *options)
    runs.teach(*options)
    close(runs.train("name=cached", *options, cached=True), live)


def test_samples_that_lack_a_modality(runs: Runs, write_shards: Callable[..., list[Path]], tmp_path: Path) -> None:
    """Batches and chunks without any text are read too. Catches rows that are counted through all samples."""
    folder = tmp_path / "more"
    picture = (tmp_path / "shards").joinpath("train-000.tar")
    import tarfile

    with tarfile.open(picture) as tar:
        png = tar.extractfile("train-0-0.png").read()  # type: ignore[union-attr]
    write_shards(folder, 1, 16, replace={(0, i): {"png": png} for i in range(10)})
    options = [
        f"data.source={{name: webdataset, urls: '{folder}/train-000.tar'}}", "data.optional=[text]", "data.shuffle=0",
    ]  # fmt: skip
    live = runs.train("name=live", *options)
    runs.teach(*options)
    close(runs.train("name=cached", *options, cached=True), live)


def test_tokens_are_written_where_a_loss_reads_them(runs: Runs, registry: Registry) -> None:
    """Those of padded texts, and of one view of two. Catches padding that counts, and a cache without tokens that is
    taken by a run that reads them."""
    runs.teach()
    runs.registry = Registry([*registry.entries.values(), Entry(Tokens, "outside", "outside")])
    with pytest.raises(UserError, match=r"tokens of 'image' are read of the views \[1\], and were written of \[\]"):
        runs.trainer("name=other", "loss.1={name: tokens}", cached=True)
    runs.cache = runs.folder / "tokens"
    live = runs.train("name=live", "loss.1={name: tokens}")
    runs.teach("loss.1={name: tokens}")
    close(runs.train("name=cached", "loss.1={name: tokens}", cached=True), live)


def test_a_sample_that_the_teacher_cannot_use_is_passed_over_again(runs: Runs, registry: Registry) -> None:
    """Of an ensemble, whose member has views of its own. Catches a run that trains on a sample without features."""
    runs.registry = Registry([*registry.entries.values(), Entry(Picky, "outside", "outside")])
    weights = f"weights: [{{name: state_dict, source: '{runs.source}', to: backbone}}]"
    own = "augment: {image: {name: picky, size: 16, local_size: 8, global: 2, local: 1}}"
    member = f"{{name: frozen, backbone: {{image: {VIT}, text: {TEXT}}}, {weights}, {own}}}"
    both = [f"teachers.big={{name: ensemble, members: {{a: {member}}}}}", "data.max_bad_fraction=0.5"]
    live = runs.trainer("name=live", *both)
    live.run()
    runs.teach(*both, f"teachers.big.cache={runs.cache}")
    cached = runs.trainer("name=cached", *both, f"teachers.big.cache={runs.cache}")
    cached.run()
    close(losses(cached.folder.path), losses(live.folder.path))
    assert cached.state.skipped_samples == live.state.skipped_samples > 0


def test_a_stage_with_other_views_is_refused_at_the_start(runs: Runs) -> None:
    runs.teach()
    with pytest.raises(UserError, match=r"augment.image.local is 2, and was 1"):
        runs.trainer("name=staged", "stages=[{at: 0.5, set: {augment.image.local: 2}}]", cached=True)
    staged = runs.trainer("name=rate", "stages=[{at: 0.5, set: {loss.1.weight: 0.5}}]", cached=True)
    staged.run()


@pytest.mark.slow
def test_two_ranks_write_the_same_chunks(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command. Catches chunks that two ranks write, that none does, or that depend on the number of ranks."""
    monkeypatch.undo()
    weights = f"weights: [{{name: state_dict, source: '{runs.source}', to: backbone}}]"
    big = f"teachers={{big: {{name: frozen, backbone: {{image: {VIT}, text: {TEXT}}}, {weights}}}}}"
    options = [*OPTIONS, big, f"teachers.big.cache={runs.cache}"]
    command = [
        sys.executable,
        "-P",
        "-m",
        "distill_core.cli",
        "teach",
        str(runs.file),
        "--passes",
        "100",
        "--nproc",
        "2",
    ]
    done = subprocess.run(
        [*command, *(x for option in options for x in ("--set", option))], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert "2048 positions of the teacher 'big' (2 chunks written" in done.stdout
    both, runs.cache = files(runs.cache), runs.folder / "single"
    runs.teach(passes=100)
    assert both == files(runs.cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed=3", "seed is 3, and was 0"),
        ("data.shuffle=5", "data.shuffle is 5, and was 4"),
        ("augment.image.local=2", "augment.image.local is 2, and was 1"),
        ("data.batches=one_set", "data.batches is one_set, and was mixed"),
        ("train.precision=bf16", "precision is bf16, and was fp32"),
        ("teachers.big.backbone.image.patch=4", "teacher.backbone.image.patch is 4, and was 8"),
    ],
)
def test_a_cache_of_another_run_is_refused(runs: Runs, change: str, message: str) -> None:
    """Before the first step, with what differs; and nothing is written into it."""
    runs.teach(passes=2)
    before = files(runs.cache)
    with pytest.raises(UserError, match=f"was written for another run: .*{message}") as caught:
        runs.trainer("name=other", change, cached=True)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(UserError, match=f"{message}|hold nothing|shape"):
        runs.teach(change, passes=2)
    assert files(runs.cache) == before


def test_other_data_is_refused(runs: Runs, write_shards: Callable[..., list[Path]], tmp_path: Path) -> None:
    runs.teach(passes=2)
    write_shards(tmp_path / "shards", 4, 4)
    with pytest.raises(UserError, match=r"data.shards.count is 4, and was 3; .*data.shards.samples is 16, and was 12"):
        runs.trainer("name=other", cached=True)


def test_what_is_not_there(runs: Runs) -> None:
    with pytest.raises(UserError, match=r"index.json: there is no cache of the teacher 'big'. Write it: distill teach"):
        runs.trainer("name=none", cached=True)
    with pytest.raises(UserError, match="no teacher of this recipe has a `cache`"):
        caches.write(runs.recipe(), None, quiet=True)
    runs.teach()
    (runs.cache / "index.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read as the index of a cache"):
        runs.trainer("name=none", cached=True)


def test_other_weights_are_refused(runs: Runs) -> None:
    """The same file with other values: by `distill teach`, and by a run that has learned from the others."""
    live = runs.trainer("name=live", "train.checkpoint.every=3", "train.checkpoint.keep=9")
    live.run()
    runs.train("name=source", "train.steps=1", "train.epochs=null", "seed=8", "loss.1=null", "teachers=null")
    index = runs.folder / "runs"
    other = next(path for path in sorted(index.iterdir()) if path.name.startswith("source") and path != runs.source)
    runs.source.rename(index / "old")
    other.rename(runs.source)
    runs.teach()
    with pytest.raises(UserError, match="the teacher 'big' is another than the run has learned from"):
        runs.trainer(cached=True, resume=live.folder.path)
    runs.source.rename(index / "other")
    (index / "old").rename(runs.source)
    with pytest.raises(UserError, match="was written with other weights"):
        runs.teach()


def test_a_shard_that_goes_while_training_is_an_error(runs: Runs) -> None:
    """The order then has another sample at a position. Catches a teacher's features of another sample."""
    runs.teach()
    made = runs.trainer("name=less", "data.retries=0", cached=True)
    (runs.folder / "shards" / "train-001.tar").unlink()
    with pytest.raises(DataError, match=r"safetensors: holds another sample than 'train-.*cannot be read now"):
        made.run()


def test_a_shard_that_cannot_be_read_is_not_written(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    make_loader = caches.make_loader

    def make(*arguments: Any, **options: Any) -> Any:
        loader = make_loader(*arguments, **options)
        (runs.folder / "shards" / "train-001.tar").unlink()
        return loader

    monkeypatch.setattr(caches, "make_loader", make)
    with pytest.raises(DataError, match=r"train-001.tar.*a teacher's cache needs all shards"):
        runs.teach("data.retries=0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("teacher={name: ema, cache: x}", "teacher: 'ema': cache: only what a teacher makes of its views alone"),
        ("teachers.big={name: snapshot, every: 2, cache: x}", "teachers.big: 'snapshot': cache: only what"),
        ("teachers.big={name: ensemble, cache: x, members: {a: {name: ema}}}", "teachers.big: 'ensemble': cache: only"),
        (
            "teachers.big={name: ensemble, members: {a: {name: frozen, cache: x}}}",
            "'ensemble': members.a: cache: give it to the ensemble, which is cached as a whole",
        ),
    ],
)
def test_teachers_that_cannot_be_cached(tiny_recipe: Path, registry: Registry, change: str, message: str) -> None:
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(tiny_recipe, registry=registry, overrides=["fusion=null", "loss.1=null", change])
    assert sum(message in line for line in caught.value.lines) == 1, caught.value.lines
